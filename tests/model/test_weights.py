"""How tensors reach a backend: fused, reordered, with progress, in bounded memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import MODELS, Tiny, TinyFile, interleave
from tiny_variants import VARIANTS, tiny_file

from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Matrix
from worker_orcd.model.architectures import configure
from worker_orcd.model.weights import Weights, deinterleave, load_weights


@dataclass
class Packed:
    parts: list[NDArray[np.float32]]  # decoded
    formats: list[str]
    bias: NDArray[np.float32] | None
    gated: bool
    head_dim: int


class RecordingBackend:
    """Keeps decoded copies of what it is given. Only the part of a backend that loading uses."""

    def matrix(self, parts: Any, bias: Any = (), *, gated: bool = False, head_dim: int = 0) -> Packed:
        joined = np.concatenate(bias) if bias else None
        names = [part.format.name for part in parts]
        return Packed([decoded(part) for part in parts], names, joined, gated, head_dim)

    def embedding(self, table: Matrix) -> Packed:
        return self.matrix([table])

    def vector(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values


def decoded(part: Matrix) -> NDArray[np.float32]:
    assert part.data.shape == (part.n, part.format.row_bytes(part.k))
    return part.format.dequantize_rows(part.data)


def loaded(file: TinyFile, directory: Path) -> Weights:
    backend: Any = RecordingBackend()
    with GGUFFile(file.write(directory / "tiny.gguf")) as opened:
        return load_weights(opened, configure(opened), backend)


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "qwen3"])
def test_weights_are_those_transformers_would_hold(name: str, tmp_path: Path):
    file = TinyFile(MODELS[name])
    weights = loaded(file, tmp_path)
    for index, layer in enumerate(weights.layers):
        theirs = f"model.layers.{index}."
        attention = [file.state[f"{theirs}self_attn.{letter}_proj.weight"] for letter in "qkv"]
        for found, expected in zip(layer.qkv.parts, attention, strict=True):
            np.testing.assert_array_equal(found, expected)
        if file.tiny.qkv_bias:
            biases = [file.state[f"{theirs}self_attn.{letter}_proj.bias"] for letter in "qkv"]
            np.testing.assert_array_equal(layer.qkv.bias, np.concatenate(biases))
        else:
            assert layer.qkv.bias is None
        packed = layer.qkv, layer.attention_output, layer.ffn.up, layer.ffn.down
        assert [one.gated for one in packed] == [False, False, True, False]
        for found, part in zip(layer.ffn.up.parts, ("gate", "up"), strict=True):
            np.testing.assert_array_equal(found, file.state[f"{theirs}mlp.{part}_proj.weight"])
        np.testing.assert_array_equal(
            layer.attention_norm.gain, file.state[f"{theirs}input_layernorm.weight"]
        )
        assert layer.attention_norm.gain.dtype == np.float32
        assert (layer.q_norm is not None) == (layer.k_norm is not None) == file.tiny.head_norms
    assert weights.layers[0].qkv.formats == ["Q8_0", "F16", "Q4_1"]
    assert (weights.output is weights.embedding) == file.tiny.tied


@pytest.mark.parametrize(("name", "gated"), [("phi3", True), ("gpt2", False)])
def test_a_tensor_of_gates_and_what_goes_with_them_is_named_so(name: str, gated: bool, tmp_path: Path):
    for layer in loaded(tiny_file(VARIANTS[name]), tmp_path).layers:
        assert (len(layer.ffn.up.parts), layer.ffn.up.gated) == (1, gated)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "qwen3"])
def test_heads_that_only_turn_as_a_whole_are_named_so(name: str, tmp_path: Path):
    """Of qwen3 they are normalised first."""
    tiny = (MODELS | VARIANTS)[name]
    for layer in loaded(tiny_file(tiny), tmp_path).layers:
        assert layer.qkv.head_dim == (0 if name == "qwen3" else tiny.head_dim)
        assert layer.attention_output.head_dim == layer.ffn.up.head_dim == 0


def test_interleaved_rows_are_moved_as_bytes(tmp_path: Path):
    """Rows keep their very bytes, so nothing is lost that a decoder would lose."""
    file = TinyFile(Tiny(architecture="llama"))
    values, kind = file.tensors["blk.0.attn_q.weight"]
    stored = gguf.quants.quantize(values, kind)
    moved = deinterleave(stored, file.tiny.heads, file.tiny.head_dim)
    assert sorted(map(bytes, moved)) == sorted(map(bytes, stored))
    assert not np.array_equal(moved, stored)
    np.testing.assert_array_equal(interleave(moved, file.tiny.heads), stored)


@given(heads=st.integers(1, 5), half=st.integers(1, 8), rest=st.integers(0, 5), width=st.integers(1, 3))
def test_deinterleave(heads: int, half: int, rest: int, width: int):
    head_dim = 2 * half + rest
    rows = np.arange(heads * head_dim * width).reshape(heads * head_dim, width)
    found = deinterleave(rows, heads, 2 * half)
    for head in range(heads):
        start = head * head_dim
        for index in range(half):
            assert np.array_equal(found[start + index], rows[start + 2 * index])
            assert np.array_equal(found[start + half + index], rows[start + 2 * index + 1])
        for index in range(2 * half, head_dim):
            assert np.array_equal(found[start + index], rows[start + index])
    assert np.array_equal(deinterleave(rows[:, 0], heads, 2 * half), found[:, 0])


def test_progress_rises_from_0_to_1(tmp_path: Path):
    backend: Any = RecordingBackend()
    seen: list[float] = []
    with GGUFFile(TinyFile(MODELS["qwen3"]).write(tmp_path / "tiny.gguf")) as file:
        load_weights(file, configure(file), backend, seen.append)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert seen[-3] < 1.0


def test_loading_checks_the_tensors_itself(tmp_path: Path):
    backend: Any = RecordingBackend()
    file = TinyFile(MODELS["llama"])
    with GGUFFile(file.write(tmp_path / "a.gguf")) as whole:
        config = configure(whole)
    del file.tensors["blk.1.attn_v.weight"]
    with (
        GGUFFile(file.write(tmp_path / "b.gguf")) as lacking,
        pytest.raises(InvalidModelFile, match=r"blk\.1\.attn_v\.weight' is missing"),
    ):
        load_weights(lacking, config, backend)


def mapped_bytes() -> int:
    """Pages of files in this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) << 10
    pytest.skip("this kernel does not count mapped pages")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_file_does_not_pile_up_in_memory(tmp_path: Path):
    tiny = Tiny(architecture="llama", layers=4, dim=384, heads=6, head_dim=64, ffn=1536, formats={})
    path = TinyFile(tiny).write(tmp_path / "big.gguf")
    highest = 0

    class Watching(RecordingBackend):
        def matrix(self, parts: Any, bias: Any = (), *, gated: bool = False, head_dim: int = 0) -> Packed:
            nonlocal highest
            for part in parts:
                part.data.sum()
            highest = max(highest, mapped_bytes())
            return Packed([], [], None, gated, head_dim)

    backend: Any = Watching()
    with GGUFFile(path) as file:
        before = mapped_bytes()
        load_weights(file, configure(file), backend)
        largest = 2 * 1536 * 384 * 4  # gate and up
        assert path.stat().st_size > 6 * largest
        assert highest - before < 1.5 * largest
        assert mapped_bytes() - before < largest / 2
        assert file.tensors["token_embd.weight"].ggml_type == GGMLType.F32
        assert file.data("token_embd.weight").any()  # still there to be read


def cached_pages(path: Path) -> int:
    """Pages of a file in the machine's page cache."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        address = ctypes.addressof(start)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), found)
        del start
    if failed:
        pytest.skip("this system does not tell what is in its page cache")
    return sum(page & 1 for page in found)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_tensor_can_leave_the_page_cache(tmp_path: Path):
    path = TinyFile(MODELS["llama"]).write(tmp_path / "some.gguf")
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_pages(path):
            pytest.skip("this file system is in memory")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # page by page, not in large pieces
        file.read()
    before = cached_pages(path)
    with GGUFFile(path) as file:
        for name in file.tensors:
            file.release(name)
        assert cached_pages(path) == before
        for name in file.tensors:
            file.release(name, forget=True)
        assert cached_pages(path) < before / 2  # beside the header and what tensors share with it
        assert file.data("token_embd.weight").any()  # still there to be read
        path.unlink()
        file.release("token_embd.weight", forget=True)


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_packed_is_forgotten_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: bool
):
    released: dict[str, bool] = {}
    monkeypatch.setattr(
        GGUFFile, "release", lambda _file, name, *, forget: released.update({name: forget}), raising=True
    )
    backend: Any = RecordingBackend()
    with GGUFFile(TinyFile(MODELS["llama"]).write(tmp_path / "tiny.gguf")) as file:
        load_weights(file, configure(file), backend, forget=forget)
        wanted = {name for name in file.tensors if name.endswith(".weight")}
    assert released.keys() == wanted
    assert set(released.values()) == {forget}
