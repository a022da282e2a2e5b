"""What the writer writes, our reader and the `gguf` package read; what that package writes, ours reads."""

from __future__ import annotations

import math
import string
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import DTYPES, TENSOR_TYPES, ValueType
from worker_orcd.gguf.writer import GGUFWriter

FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

MEANT = ("general.alignment", "split.")  # keys that mean something to the reader
KEYS = st.text(string.ascii_letters + "._é", min_size=1, max_size=12).filter(
    lambda key: not key.startswith(MEANT)
)
TEXT = st.text(max_size=20)


def scalars(kind: ValueType) -> st.SearchStrategy[Any]:
    dtype = DTYPES[kind]
    if kind is ValueType.BOOL:
        return st.booleans()
    if dtype.kind == "f":
        return st.floats(width=8 * dtype.itemsize, allow_nan=False)
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max))


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[Any, ValueType | None]:
    kind = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.sampled_from(["scalar", "array", "list", "text", "texts", "nested"]))
    if shape == "text":
        return draw(TEXT), None
    if shape == "texts":
        return draw(st.lists(TEXT, max_size=5)), None
    if shape == "nested":
        return draw(st.lists(st.lists(TEXT, min_size=1, max_size=2), min_size=1, max_size=3)), None
    if shape == "scalar":
        return draw(scalars(kind)), kind
    items = draw(st.lists(scalars(kind), max_size=5))
    return (np.array(items, DTYPES[kind]), None) if shape == "array" else (items, kind)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], int, bytes]:
    number = draw(st.sampled_from(list(TENSOR_TYPES)))
    kind = TENSOR_TYPES[number]
    rows = draw(st.lists(st.integers(1, 3), max_size=3))
    blocks = draw(st.integers(1, 3))
    nbytes = math.prod(rows) * blocks * kind.type_size
    seed = draw(st.integers(0, 2**32 - 1))
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()
    return (*rows, blocks * kind.block_size), number, data


def pieces(data: bytes) -> Iterator[bytes]:
    yield from (data[i : i + 7] for i in range(0, len(data), 7))


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@FAST
@given(
    values=st.dictionaries(KEYS, typed_values(), max_size=6),
    table=st.dictionaries(KEYS, tensors(), max_size=4),
    alignment=st.sampled_from([8, 32, 64, 4096]),
    version=st.sampled_from([2, 3]),
)
def test_reader_returns_what_the_writer_was_given(
    tmp_path: Path, values: dict, table: dict, alignment: int, version: int
) -> None:
    path = tmp_path / "model.gguf"
    with GGUFWriter(path, alignment=alignment, version=version) as writer:
        for key, (value, kind) in values.items():
            writer.add(key, value, kind)
        for name, (shape, number, data) in table.items():
            writer.add_tensor(name, shape, number, pieces(data))

    with GGUFFile(path) as file:
        assert file.version == version
        assert file.file_bytes == path.stat().st_size
        assert set(file.metadata) - {"general.alignment"} == set(values)
        for key, (value, kind) in values.items():
            found = file.metadata.raw(key)
            assert plain(found) == plain(value), key
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype
            if isinstance(value, list) and kind is not None:
                assert found.dtype == DTYPES[kind]
        assert list(file.tensors) == list(table)
        for name, (shape, number, data) in table.items():
            info = file.tensors[name]
            assert (info.shape, info.ggml_type, info.nbytes) == (shape, number, len(data))
            assert info.offset % alignment == 0
            assert file.data(name).tobytes() == data
            assert file.rows(name).shape[0] == math.prod(shape[:-1])
    assert list(tmp_path.iterdir()) == [path]


EVERY_TYPE: dict[str, tuple[Any, ValueType]] = {
    "u8": (255, ValueType.UINT8),
    "i8": (-128, ValueType.INT8),
    "u16": (65535, ValueType.UINT16),
    "i16": (-32768, ValueType.INT16),
    "u32": (2**32 - 1, ValueType.UINT32),
    "i32": (-(2**31), ValueType.INT32),
    "u64": (2**64 - 1, ValueType.UINT64),
    "i64": (-(2**63), ValueType.INT64),
    "f32": (0.5, ValueType.FLOAT32),
    "f64": (math.pi, ValueType.FLOAT64),
    "true": (True, ValueType.BOOL),
}


def random_tensor(number: int) -> tuple[tuple[int, int], np.ndarray]:
    kind = TENSOR_TYPES[number]
    rng = np.random.default_rng(number)
    return (3, 2 * kind.block_size), rng.integers(0, 256, (3, 2 * kind.type_size), np.uint8)


def test_the_gguf_package_reads_what_the_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    with GGUFWriter(path, alignment=64) as writer:
        writer.add("general.architecture", "llama")
        for key, (value, kind) in EVERY_TYPE.items():
            writer.add(key, value, kind)
            writer.add(f"{key}.array", [value, value], kind)
        writer.add("tokens", ["a", "", "é"])
        for number in TENSOR_TYPES:
            shape, rows = random_tensor(number)
            writer.add_tensor(f"t{number}", shape, number, rows)

    reader = gguf.GGUFReader(path)
    for key, (value, kind) in EVERY_TYPE.items():
        assert reader.fields[key].types == [kind]
        assert reader.fields[key].contents() == value
        assert reader.fields[f"{key}.array"].types == [ValueType.ARRAY, kind]
        assert reader.fields[f"{key}.array"].contents() == [value, value]
    assert reader.fields["tokens"].contents() == ["a", "", "é"]
    assert reader.alignment == 64
    assert len(reader.tensors) == len(TENSOR_TYPES)
    for tensor in reader.tensors:
        shape, rows = random_tensor(int(tensor.tensor_type))
        assert tuple(tensor.shape.tolist()) == shape[::-1]
        assert tensor.data.tobytes() == rows.tobytes()


def test_the_reader_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for key, (value, kind) in EVERY_TYPE.items():
        writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    writer.add_array("tokens", ["a", "", "é"])
    writer.add_array("integers", [7, -8])  # the package stores Python integers as int32
    writer.add_array("numbers", [0.5, -1.0])
    for number in TENSOR_TYPES:
        writer.add_tensor(f"t{number}", random_tensor(number)[1], raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        for key, (value, _) in EVERY_TYPE.items():
            found = file.metadata.raw(key)
            assert found == value
            assert type(found) is type(value)
        assert file.metadata.strings("tokens") == ["a", "", "é"]
        assert file.metadata.integers("integers").tolist() == [7, -8]
        assert file.metadata.numbers("numbers").tolist() == [0.5, -1.0]
        assert len(file.tensors) == len(TENSOR_TYPES)
        for info in file.tensors.values():
            shape, rows = random_tensor(info.ggml_type)
            assert info.shape == shape
            assert info.offset % 128 == 0
            assert np.array_equal(file.rows(info.name), rows)


@pytest.mark.slow
def test_the_real_model_reads_as_the_gguf_package_reads_it(demo_model: Path) -> None:
    reader = gguf.GGUFReader(demo_model)
    with GGUFFile(demo_model) as file:
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert set(file.metadata) == set(fields)
        for key, field in fields.items():
            assert plain(file.metadata.raw(key)) == field.contents(), key
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            assert file.tensors[tensor.name].offset == tensor.data_offset
            assert np.array_equal(file.data(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def test_tensors_are_written_in_bounded_memory(tmp_path: Path) -> None:
    """A tensor that comes in pieces is never in memory as a whole."""
    piece, num_pieces = bytes(1 << 20), 64
    tracemalloc.start()
    try:
        with GGUFWriter(tmp_path / "large.gguf") as writer:
            shape = (num_pieces, len(piece) // 4)
            writer.add_tensor("t", shape, 0, (piece for _ in range(num_pieces)))
        assert tracemalloc.get_traced_memory()[1] < 2 * len(piece)
    finally:
        tracemalloc.stop()
    with GGUFFile(tmp_path / "large.gguf") as file:
        assert file.tensors["t"].nbytes == num_pieces * len(piece)


class TestWriterRefuses:
    def test_too_few_and_too_many_bytes_and_leaves_no_file(self, tmp_path: Path) -> None:
        for data in ([b"1234", b"567"], [b"1234", b"56789"], b"1234567", np.zeros(9, np.uint8)):
            writer = GGUFWriter(tmp_path / "x.gguf")
            writer.add_tensor("t", (2,), 0, data)
            with pytest.raises(ValueError, match=r"tensor 't' gave [79].* bytes, but needs 8"):
                writer.write()
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_block_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), GGUFWriter(tmp_path / "x.gguf"):
            raise KeyError
        assert list(tmp_path.iterdir()) == []

    def test_keys_and_tensors_given_twice(self, tmp_path: Path) -> None:
        writer = GGUFWriter(tmp_path / "x.gguf")
        writer.add("a", 1)
        writer.add_tensor("t", (1,), 0, bytes(4))
        for key in ("a", ""):
            with pytest.raises(ValueError, match="added before"):
                writer.add(key, 2)
        for name in ("t", ""):
            with pytest.raises(ValueError, match="added before"):
                writer.add_tensor(name, (1,), 0, bytes(4))

    @pytest.mark.parametrize(
        ("shape", "number"), [((), 0), ((0,), 0), ((1,) * 5, 0), ((16,), 2), ((32,), 23)]
    )
    def test_tensors_the_reader_refuses(self, tmp_path: Path, shape: tuple[int, ...], number: int) -> None:
        with pytest.raises(ValueError, match="tensor 't' has"):
            GGUFWriter(tmp_path / "x.gguf").add_tensor("t", shape, number, b"")

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (256, ValueType.UINT8),
            (-1, ValueType.UINT32),
            (2**63, ValueType.INT64),
            (1.5, ValueType.INT32),
            (1e39, ValueType.FLOAT32),
            (1, ValueType.BOOL),
            (True, ValueType.UINT8),
            (1, ValueType.STRING),
            (2**64, None),
            ([1, -1], None),
            ([1, "a"], None),
        ],
    )
    def test_values_that_do_not_fit(self, tmp_path: Path, value: Any, kind: ValueType | None) -> None:
        with pytest.raises(ValueError, match=r"cannot be stored|does not fit|one kind"):
            GGUFWriter(tmp_path / "x.gguf").add("key", value, kind)

    @pytest.mark.parametrize("alignment", [0, 4, 33, 1 << 17])
    def test_alignments(self, tmp_path: Path, alignment: int) -> None:
        with pytest.raises(ValueError, match="power of two"):
            GGUFWriter(tmp_path / "x.gguf", alignment=alignment)
