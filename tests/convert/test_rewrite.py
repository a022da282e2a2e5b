"""Requantised files: the right types, the same metadata, weights as near as the formats allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worker_orcd.convert import plan, requantize, tensor_bytes
from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.kind import quant_kind
from worker_orcd.gguf.mixture import MIXTURES, counts
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import TENSOR_TYPES, ValueType
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.model.architectures import configure
from worker_orcd.quant import BY_NAME
from worker_orcd.synth import ARCHITECTURES, shape_named, write_model
from worker_orcd.synth import plan as synth_plan

ERRORS = {"Q4_0": 0.12, "Q4_1": 0.12, "Q5_0": 0.06, "Q5_1": 0.06, "Q8_0": 0.01, "F16": 0.001, "F32": 0.0}
ERRORS |= {"Q2_K": 0.4, "Q3_K": 0.2, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03, "IQ4_NL": 0.1, "MXFP4": 0.15}
ERRORS |= {"BF16": 0.004}


def made(path: Path, architecture: str, mixture: str) -> Path:
    shape = shape_named(architecture, "tiny")
    assert shape is not None
    write_model(path, shape, "tiny", mixture)
    return path


def weights(file: GGUFFile, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    kind = BY_NAME[TENSOR_TYPES[file.tensors[name].ggml_type].name]
    return kind.dequantize_rows(file.rows(name)).astype(np.float64)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture(mixture: str, tmp_path: Path) -> None:
    source = made(tmp_path / "in.gguf", "qwen3", "F32")
    with GGUFFile(source) as before:
        planned = requantize(before, tmp_path / "out.gguf", mixture)
        with GGUFFile(tmp_path / "out.gguf") as after:
            configure(after)
            assert list(after.tensors) == list(before.tensors)
            assert sum(tensor.nbytes for tensor in after.tensors.values()) == tensor_bytes(planned)
            for tensor in planned:
                name = tensor.info.name
                kind = TENSOR_TYPES[after.tensors[name].ggml_type].name
                assert kind == tensor.target.name
                found, wanted = weights(after, name), weights(before, name)
                error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
                assert error <= ERRORS[kind], name
            assert after.metadata.integer("general.file_type") == MIXTURES[mixture]
            if mixture not in ("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q2_K"):  # which rows of 128 leave no trace of
                assert quant_kind(after) == mixture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mixture", ["Q4_K_M", "MXFP4"])
def test_the_types_are_those_of_made_up_files(architecture: str, mixture: str, tmp_path: Path) -> None:
    """The network is read from the file: layers, heads, experts, a tied embedding."""
    shape = shape_named(architecture, "tiny")
    assert shape is not None
    with GGUFFile(made(tmp_path / "in.gguf", architecture, "F16")) as file:
        found = {tensor.info.name: tensor.target.name for tensor in plan(file, mixture)}
    assert found == {tensor.spec.name: tensor.type_name for tensor in synth_plan(shape, mixture)}


def test_metadata_are_stored_as_they_were(tmp_path: Path) -> None:
    values: dict[str, tuple[Any, ValueType | None]] = {
        "general.architecture": ("llama", None),
        "a.u8": (7, ValueType.UINT8),
        "a.i64": (-7, ValueType.INT64),
        "a.u64": (7, ValueType.UINT64),
        "a.f64": (0.1, ValueType.FLOAT64),
        "a.f32": (0.5, ValueType.FLOAT32),
        "a.flag": (True, None),
        "a.words": (["x", "", "ü"], None),
        "a.numbers": (np.arange(5, dtype=np.int16), None),
        "a.nested": ([["a"], ["b", "c"]], None),
        "split.no": (0, ValueType.UINT16),
        "split.count": (1, ValueType.UINT16),
        "general.file_type": (1, ValueType.UINT32),
        "general.alignment": (64, ValueType.UINT32),
    }
    with GGUFWriter(tmp_path / "in.gguf", alignment=64) as writer:
        for key, (value, kind) in values.items():
            if key != "general.alignment":
                writer.add(key, value, kind)
        writer.add_tensor("blk.0.attn_q.weight", (4, 64), 0, np.ones((4, 64), np.float32).view(np.uint8))
    with GGUFFile(tmp_path / "in.gguf") as before, GGUFFile(tmp_path / "in.gguf") as file:
        requantize(file, tmp_path / "out.gguf", "Q8_0")
        with GGUFFile(tmp_path / "out.gguf") as after:
            kept = [key for key in before.metadata if not key.startswith(("split.", "general."))]
            assert [key for key in after.metadata if key in kept] == kept
            for key in kept:
                assert after.metadata.kind(key) == before.metadata.kind(key) is not None
                found, wanted = after.metadata.raw(key), before.metadata.raw(key)
                if isinstance(wanted, np.ndarray):
                    assert isinstance(found, np.ndarray)
                    assert found.dtype == wanted.dtype
                    assert found.tolist() == wanted.tolist()
                else:
                    assert found == wanted
            assert "split.count" not in after.metadata
            assert after.metadata.raw("general.file_type") == MIXTURES["Q8_0"]
            assert after.metadata.raw("general.quantization_version") == 2
            assert after.metadata.raw("general.alignment") == 64
            assert all(tensor.offset % 64 == 0 for tensor in after.tensors.values())


def test_what_has_its_type_is_copied(tmp_path: Path) -> None:
    source = made(tmp_path / "in.gguf", "gpt-oss", "MXFP4")
    with GGUFFile(source) as before:
        planned = requantize(before, tmp_path / "out.gguf", "MXFP4", threads=3)
        assert not any(tensor.loses_twice for tensor in planned)
        with GGUFFile(tmp_path / "out.gguf") as after:
            for name in before.tensors:
                assert np.array_equal(before.data(name), after.data(name))


def test_what_is_lost_twice_is_known(tmp_path: Path) -> None:
    with GGUFFile(made(tmp_path / "in.gguf", "llama", "Q4_0")) as file:
        lost = [tensor for tensor in plan(file, "Q8_0") if tensor.loses_twice]
        assert counts(tensor.source.name for tensor in lost) == {"Q4_0": 28}
        assert not [tensor for tensor in plan(file, "F16") if tensor.loses_twice]


def test_pieces_and_threads_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "in.gguf", "qwen2", "F16")
    with GGUFFile(source) as file:
        requantize(file, tmp_path / "whole.gguf", "Q4_K_M", threads=1)
        monkeypatch.setattr("worker_orcd.convert.rewrite.PIECE_WEIGHTS", 5000)
        requantize(file, tmp_path / "pieces.gguf", "Q4_K_M", threads=4)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


@pytest.mark.parametrize(
    ("value", "mixture", "message"),
    [
        (np.nan, "Q4_0", "has a weight of nan; Q4_0 needs numbers up to 65504 in size"),
        (-np.inf, "BF16", "has a weight of inf; BF16 needs numbers up to 3.38e"),
        (1e5, "F16", "has a weight of 100000; F16 needs numbers up to 65504"),
    ],
)
def test_weights_that_no_format_holds(value: float, mixture: str, message: str, tmp_path: Path) -> None:
    rows = np.ones((4, 64), np.float32)
    rows[2, 3] = value
    with GGUFWriter(tmp_path / "in.gguf") as writer:
        writer.add("general.architecture", "llama")
        writer.add_tensor("blk.0.attn_q.weight", (4, 64), 0, rows.view(np.uint8))
    with GGUFFile(tmp_path / "in.gguf") as file, pytest.raises(InvalidModelFile, match=message):
        requantize(file, tmp_path / "out.gguf", mixture)
    assert not (tmp_path / "out.gguf").exists()


def test_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    """The types that llama.cpp gives it: 576 is no multiple of 256, so a Q4_K_M is mostly Q5_0."""
    with GGUFFile(demo_model) as file:
        types = counts(tensor.target.name for tensor in plan(file, "Q4_K_M"))
    assert types == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
