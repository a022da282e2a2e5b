"""Opening files: what is no model, split models, views of tensors, and the name of the quantisation."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_mutations import add_tensor, write_model, write_split

from worker_orcd.errors import InvalidModelFile, LoadError, ModelNotFound, UnsupportedFormat
from worker_orcd.gguf.kind import FILE_TYPES, quant_kind, type_shares
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import TENSOR_TYPES, UNSUPPORTED_TENSOR_TYPES, ValueType
from worker_orcd.gguf.writer import GGUFWriter

IDS = {kind.name: number for number, kind in TENSOR_TYPES.items()}


def refusal(path: Path, error: type[LoadError] = InvalidModelFile) -> str:
    """The message a file is refused with, which must not say where the file lies."""
    with pytest.raises(error) as caught:
        GGUFFile(path)
    assert type(caught.value) is error
    message = str(caught.value)
    assert str(path.parent) not in message
    assert message.isprintable()
    return message


class TestWhatIsNoModel:
    def test_no_file(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "nothing.gguf", ModelNotFound) == "'nothing.gguf': no such file"
        assert "no such file" in refusal(tmp_path / "null\0.gguf", ModelNotFound)
        (tmp_path / "file").write_bytes(b"")
        assert "no such file" in refusal(tmp_path / "file" / "x.gguf", ModelNotFound)

    def test_a_directory_and_a_pipe(self, tmp_path: Path) -> None:
        (tmp_path / "directory.gguf").mkdir()
        assert refusal(tmp_path / "directory.gguf") == "'directory.gguf': not a regular file"
        os.mkfifo(tmp_path / "pipe.gguf")  # opening it must not wait for somebody to write
        assert refusal(tmp_path / "pipe.gguf") == "'pipe.gguf': not a regular file"

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        assert "cannot be opened" in refusal(tmp_path / ("x" * 300))

    @pytest.mark.parametrize("data", [b"", b"GGUF", bytes(23)])
    def test_too_short_for_a_header(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "short.gguf"
        path.write_bytes(data)
        assert refusal(path) == f"'short.gguf': a GGUF file has at least 24 bytes, this one {len(data)}"

    def test_other_files_and_versions(self, tmp_path: Path) -> None:
        path = tmp_path / "other.gguf"
        path.write_bytes(b"PK\x03\x04" + bytes(100))
        assert "not a GGUF file: it starts with b'PK\\x03\\x04'" in refusal(path)
        for version, hint in [(0, ""), (1, ""), (4, ""), (0x03000000, " (big-endian)")]:
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
            assert f"version {version}{hint} is not supported; supported: 2 and 3" in refusal(path)


class TestTensors:
    def test_views_are_read_only_and_outlive_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        write_model(path)
        with GGUFFile(path) as file:
            data, rows = file.data("blk.0.attn_q.weight"), file.rows("blk.0.attn_q.weight")
            assert rows.shape == (4, 2 * 18)
            assert np.shares_memory(data, rows)
            for view in (data, rows):
                with pytest.raises(ValueError, match="read-only"):
                    view[0] = 1
        assert rows.sum() > 0
        with pytest.raises(ValueError, match="closed"):
            file.data("blk.0.attn_q.weight")

    def test_rows_of_vectors_and_of_many_dimensions(self, tmp_path: Path) -> None:
        with GGUFWriter(tmp_path / "x.gguf") as writer:
            add_tensor(writer, "vector", (64,), IDS["Q8_0"])
            add_tensor(writer, "experts", (3, 2, 5, 64), IDS["Q4_0"])
        with GGUFFile(tmp_path / "x.gguf") as file:
            assert file.rows("vector").shape == (1, 68)
            assert file.rows("experts").shape == (30, 36)
            assert file.tensors["experts"].shape == (3, 2, 5, 64)

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        write_model(tmp_path / "model.gguf")
        with GGUFFile(tmp_path / "model.gguf") as file:
            for read in (file.data, file.rows):
                with pytest.raises(
                    InvalidModelFile, match=r"'model\.gguf': tensor 'output\.weight' is missing"
                ):
                    read("output.weight")

    @pytest.mark.parametrize("number", [*UNSUPPORTED_TENSOR_TYPES, 4, 5, 36, 99, 2**32 - 1])
    def test_a_type_we_cannot_execute(self, tmp_path: Path, number: int) -> None:
        path = tmp_path / "x.gguf"
        with GGUFWriter(path) as writer:
            add_tensor(writer, "some.weight", (256,), IDS["F32"])
        data = path.read_bytes()
        entry = b"some.weight" + struct.pack("<IQ", 1, 256)
        path.write_bytes(data.replace(entry + struct.pack("<I", 0), entry + struct.pack("<I", number)))
        message = refusal(path, UnsupportedFormat)
        name = UNSUPPORTED_TENSOR_TYPES.get(number, "unknown")
        assert (
            f"tensor 'some.weight' has type {number} ({name}); supported: F32 (0), F16 (1), Q4_0 (2)"
            in message
        )
        assert message.endswith("MXFP4 (39)")


def write_part(path: Path, number: int, count: int, tensors: list[str], total: int | None = None) -> None:
    with GGUFWriter(path) as writer:
        writer.add("split.no", number, ValueType.UINT16)
        writer.add("split.count", count, ValueType.UINT16)
        if total is not None:
            writer.add("split.tensors.count", total, ValueType.INT32)
        for name in tensors:
            writer.add_tensor(name, (2,), IDS["F32"], np.full(2, number, np.float32))


class TestSplit:
    def test_the_parts_are_one_model(self, tmp_path: Path) -> None:
        for number in range(3):
            write_part(
                tmp_path / f"m-0000{number + 1}-of-00003.gguf", number, 3, [f"t{number}", f"u{number}"], 6
            )
        with GGUFFile(tmp_path / "m-00001-of-00003.gguf") as file:
            assert list(file.tensors) == ["t0", "u0", "t1", "u1", "t2", "u2"]
            for number in range(3):
                assert file.tensors[f"u{number}"].part == number
                assert file.data(f"u{number}").view(np.float32).tolist() == [number] * 2
            assert file.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())

    def test_parts_beside_a_link(self, tmp_path: Path) -> None:
        """A download cache links snapshots to blobs of other names: the parts lie beside the link."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "links").mkdir()
        write_split(tmp_path / "blobs" / "s-00001-of-00002.gguf")
        for number in (1, 2):
            blob = tmp_path / "blobs" / f"hash{number}"
            (tmp_path / "blobs" / f"s-0000{number}-of-00002.gguf").rename(blob)
            (tmp_path / "links" / f"s-0000{number}-of-00002.gguf").symlink_to(blob)
        with GGUFFile(tmp_path / "links" / "s-00001-of-00002.gguf") as file:
            assert len(file.tensors) == 3

    def test_one_part_of_one_needs_no_number_in_its_name(self, tmp_path: Path) -> None:
        write_part(tmp_path / "whole.gguf", 0, 1, ["a"], 1)
        assert list(GGUFFile(tmp_path / "whole.gguf").tensors) == ["a"]

    def test_a_missing_part(self, tmp_path: Path) -> None:
        first = tmp_path / "m-00001-of-00003.gguf"
        write_part(first, 0, 3, ["a"])
        write_part(tmp_path / "m-00002-of-00003.gguf", 1, 3, ["b"])
        assert refusal(first, ModelNotFound) == "'m-00003-of-00003.gguf': no such file"

    def test_a_later_part_is_not_the_model(self, tmp_path: Path) -> None:
        write_split(tmp_path / "m-00001-of-00002.gguf")
        message = refusal(tmp_path / "m-00002-of-00002.gguf")
        assert "part 2 of 2; open the first, 'm-00001-of-00002.gguf'" in message

    @pytest.mark.parametrize(
        "name", ["m.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf", "m-1-of-2.gguf"]
    )
    def test_the_name_must_tell_where_the_others_are(self, tmp_path: Path, name: str) -> None:
        write_part(tmp_path / name, 0, 2, ["a"])
        assert "must be named like 'model-00001-of-00002.gguf'" in refusal(tmp_path / name)

    @pytest.mark.parametrize(
        ("number", "count", "key"), [(0, 2, "split.no"), (2, 2, "split.no"), (1, 3, "split.count")]
    )
    def test_parts_that_do_not_belong_together(
        self, tmp_path: Path, number: int, count: int, key: str
    ) -> None:
        first = tmp_path / "m-00001-of-00002.gguf"
        write_part(first, 0, 2, ["a"])
        write_part(tmp_path / "m-00002-of-00002.gguf", number, count, ["b"])
        assert refusal(first).startswith(f"'m-00002-of-00002.gguf': metadata key '{key}' is ")

    def test_a_part_without_its_number(self, tmp_path: Path) -> None:
        first = tmp_path / "m-00001-of-00002.gguf"
        write_part(first, 0, 2, ["a"])
        write_model(tmp_path / "m-00002-of-00002.gguf")
        assert "metadata key 'split.no' is missing" in refusal(first)

    def test_a_tensor_in_two_parts(self, tmp_path: Path) -> None:
        first = tmp_path / "m-00001-of-00002.gguf"
        write_part(first, 0, 2, ["a", "b"])
        write_part(tmp_path / "m-00002-of-00002.gguf", 1, 2, ["c", "a"])
        assert refusal(first).endswith("tensor 'a' is in two parts")

    def test_the_announced_number_of_tensors(self, tmp_path: Path) -> None:
        first = tmp_path / "m-00001-of-00002.gguf"
        write_part(first, 0, 2, ["a"], 3)
        write_part(tmp_path / "m-00002-of-00002.gguf", 1, 2, ["b"])
        assert refusal(first).endswith("'split.tensors.count' is 3, but there are 2 tensors")

    @pytest.mark.parametrize("count", [1025, 65535])
    def test_too_many_parts(self, tmp_path: Path, count: int) -> None:
        write_part(tmp_path / "m-00001-of-00002.gguf", 0, count, ["a"])
        assert f"'split.count' is the integer {count}, but needs" in refusal(
            tmp_path / "m-00001-of-00002.gguf"
        )


class TestQuantKind:
    @staticmethod
    def kind(path: Path, file_type: int | str | None, tensors: dict[str, int]) -> str:
        with GGUFWriter(path) as writer:
            if file_type is not None:
                writer.add("general.file_type", file_type)
            for i, (name, rows) in enumerate(tensors.items()):
                add_tensor(writer, f"t{i}", (rows, 256), IDS[name])
        with GGUFFile(path) as file:
            return quant_kind(file)

    @pytest.mark.parametrize(
        ("file_type", "tensors", "expected"),
        [
            (15, {"Q5_0": 9, "Q8_0": 3, "Q4_K": 2, "Q6_K": 1, "F32": 1}, "Q4_K_M"),  # Qwen2.5-0.5B
            (15, {"Q5_0": 9, "F32": 1}, "Q5_0"),  # the announced type does not occur
            (2, {"Q4_0": 5, "Q8_0": 1}, "Q4_0"),
            (38, {"MXFP4": 8, "Q8_0": 2}, "MXFP4"),
            (None, {"Q4_1": 5, "Q8_0": 2, "F32": 1}, "Q4_1"),
            (None, {"Q4_K": 4, "F32": 2}, "Q4_K"),  # by weights, not by bytes
            (9999, {"IQ4_NL": 2}, "IQ4_NL"),
            ("Q4_K_M", {"BF16": 1}, "BF16"),
            (1, {}, "none"),
        ],
    )
    def test_names(
        self, tmp_path: Path, file_type: int | None, tensors: dict[str, int], expected: str
    ) -> None:
        assert self.kind(tmp_path / "x.gguf", file_type, tensors) == expected

    def test_every_file_type_names_a_type_that_a_file_may_hold(self) -> None:
        assert {main for _, main in FILE_TYPES.values()} <= set(IDS)

    def test_shares(self, tmp_path: Path) -> None:
        write_model(tmp_path / "model.gguf")
        with GGUFFile(tmp_path / "model.gguf") as file:
            shares = type_shares(file)
            assert [share.name for share in shares] == ["Q4_K", "Q8_0", "Q4_0", "F32"]
            assert sum(share.num_bytes for share in shares) == sum(t.nbytes for t in file.tensors.values())
            assert (shares[0].num_tensors, shares[0].num_weights, shares[0].num_bytes) == (1, 512, 288)

    def test_the_real_model(self, demo_model: Path) -> None:
        with GGUFFile(demo_model) as file:
            assert quant_kind(file) == "Q4_1"
