"""Products of one token whose weights go to registers: which they are, and what the compiler makes of them.

Their bits are compared with `linear`'s on a GPU: `gpu_linear.py --only same`, `gpu_model.py --only tiny`.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from recorded_launches import Recorder, packed

from gpu_codegen import Codegen, assembled, inspect_all
from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda import streaming
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.streaming import STREAMED, can_stream, stream_tile, tile_for
from worker_orcd.kernels.cuda.variants import (
    FORMATS,
    Epilogue,
    Store,
    Variant,
    choose_tile,
    compile_variant,
    shape_of,
)

REGISTERS = 65536  # of a multiprocessor
QWEN = Store(num_heads=14, num_kv_heads=2, cache_block=16, rotated=True)
PHI3 = Store(num_heads=32, num_kv_heads=32, cache_block=16, rotated=True, fp8=True)

# -- which products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "k", "rows", "warps", "ahead"),
    [
        ("Q8_0", 1152, 896, 16, 1, 4),  # Qwen2.5-0.5B
        ("Q5_0", 896, 896, 16, 1, 7),
        ("Q5_0", 9728, 896, 64, 4, 2),
        ("Q4_K", 896, 4864, 16, 32, 1),  # 19 chunks
        ("Q6_K", 896, 4864, 16, 32, 2),
        ("Q4_K", 9216, 3072, 16, 2, 2),  # Phi-3-mini
        ("Q4_K", 3072, 3072, 16, 8, 1),
        ("Q4_K", 3072, 8192, 16, 8, 1),
        ("Q6_K", 3072, 8192, 16, 8, 2),
    ],
)
def test_a_program_has_all_chunks_of_its_rows(
    name: str, n: int, k: int, rows: int, warps: int, ahead: int
) -> None:
    shape = shape_of(name, n, k)
    tile = stream_tile(shape, n)
    assert tile is not None
    assert (tile.rows, tile.warps, tile.ahead, tile.split) == (rows, warps, ahead, False)
    assert tile.warps * 16 >= tile.rows * shape.chunks
    assert tile.ahead <= shape.steps_of_chunk


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("Q4_K", 16384, 3072),  # much to read: shared memory hides latency as well
        ("Q8_0", 151936, 896),
        ("Q6_K", 32064, 3072),
        ("Q8_0", 2880, 4096),  # slower, measured
        ("Q4_0", 896, 864),  # columns that fill no step
        *[(name, 896, 1024) for name in FORMATS if name not in STREAMED],
    ],
)
def test_other_products_go_through_shared_memory(name: str, n: int, k: int) -> None:
    shape = shape_of(name, n, k)
    assert stream_tile(shape, n) is None
    assert tile_for(shape, n, 1) == choose_tile(shape, n, 1)


def test_a_header_for_two_steps_is_only_q6_k_s() -> None:
    assert stream_tile(shape_of("Q4_K", 896, 4864, 128), 896) is None
    assert stream_tile(shape_of("Q6_K", 896, 4864, 128), 896) is not None


def test_more_tokens_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "can_stream", lambda capability: capability == 90)
    shape = shape_of("Q5_0", 896, 896)
    assert tile_for(shape, 896, 1, 90).ahead > 0
    for tokens, capability in ((2, 90), (64, 90), (1, 80), (1, 120)):
        assert tile_for(shape, 896, tokens, capability) == choose_tile(shape, 896, tokens, capability)


def test_what_goes_to_registers_was_checked_on_one_kind_of_gpu() -> None:
    assert [can_stream(capability) for capability in (80, 89, 100, 120)] == [False] * 4
    try:
        assert can_stream(90) == version("triton").startswith("3.6.")
    except PackageNotFoundError:
        assert not can_stream(90)


# -- launches ----------------------------------------------------------------------------------------------


def test_one_token_launches_a_program_for_its_rows_and_none_for_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "can_stream", lambda _: True)
    recorder = Recorder()
    products = Products(recorder.kernels())
    weight = packed("Q4_K", 200, 2048)
    products.reserve(weight)
    x, out = torch.zeros(2, 2048, dtype=torch.float16), torch.zeros(2, 200)
    products.linear(x[:1], weight, out[:1], residual=out[:1])
    products.linear(x, weight, out, residual=out)
    one, two = recorder.made
    assert (one.kernel.module, one.kernel.gluon, two.kernel.module) == ("linear_stream", True, "linear")
    assert weight.shape.chunks > 1
    [(grid, _)] = one.calls
    assert grid == (13, 1, 1)  # 200 rows, 16 each
    names = one.arguments()
    assert (names["w"], names["s"]) == (weight.words.data_ptr(), weight.headers.data_ptr())
    assert (names["x"], names["y"], names["residual"]) == (x.data_ptr(), out.data_ptr(), out.data_ptr())
    constants = dict(one.kernel.constants)
    assert (constants["CHUNKS"], constants["RESIDUAL"]) == (weight.shape.chunks, True)


# -- what the compiler makes of them -----------------------------------------------------------------------


def variant(name: str, n: int, k: int, overlap: int = 2, **epilogue: Any) -> Variant:
    shape = shape_of(name, n, k)
    tile = stream_tile(shape, n)
    assert tile is not None
    return Variant(shape=shape, tile=tile, epilogue=Epilogue(**epilogue), overlap=overlap)


CHOSEN = (
    variant("Q8_0", 1152, 896, head=64, store=QWEN, bias=True, out="fp16"),
    variant("Q5_0", 896, 896, residual=True),
    variant("Q5_0", 9728, 896, paired=True, glu=Glu.SWIGLU, out="fp16"),
    variant("Q4_K", 896, 4864, residual=True),
    variant("Q6_K", 896, 4864, residual=True),
    variant("Q4_K", 9216, 3072, head=96, store=PHI3, out="fp16"),
    variant("Q6_K", 3072, 8192, residual=True, bias=True),
    variant("Q5_K", 3072, 3072, overlap=0),
    variant("Q4_0", 576, 576, paired=True),
)


@pytest.fixture(scope="module")
def compiled() -> list[Codegen]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return inspect_all([(one, 90) for one in CHOSEN], 2)


@pytest.mark.slow
def test_no_kernel_has_a_fault_and_programs_fit_a_multiprocessor(compiled: list[Codegen]) -> None:
    assert [str(one) for one in compiled if one.faults()] == []
    for one in compiled:
        tile, shape = one.variant.tile, one.variant.shape
        assert one.registers * tile.warps * 32 <= REGISTERS, str(one)
        assert one.matrix == "mma"
        # Activations and, of several chunks, a sum of each: no weights.
        chunks = tile.warps * 16 // tile.rows
        columns = 1 << (shape.steps_of_chunk * shape.step - 1).bit_length()
        assert one.shared <= max(2 * columns * chunks, 2048) + 4 * chunks * tile.rows


@pytest.mark.slow
def test_weights_are_asked_for_before_the_wait_and_nothing_is_written() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    made = variant("Q5_0", 896, 896, residual=True)
    _, sass = assembled(compile_variant(made, 90), 90)
    before, _, after = sass.partition("ACQBULK")
    # Of a step two words, a high word and two of the header, twice as much as is loaded at once.
    assert len(re.findall(r"\bLDG\.E", before)) >= 5 * made.tile.ahead
    assert "LDGSTS" not in before and "LDGSTS" in after  # activations
    assert "PREEXIT" in after and "STG" not in before
    assert len(re.findall(r"\bHMMA", after)) == made.shape.k // 16
