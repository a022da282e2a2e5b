"""Attention without a GPU: right under Triton's interpreter, no spills, one order of sums, and its launches.

That a GPU's bits do not depend on tiles and cuts is for benchmarks/gpu_attention.py to show.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
import under_interpreter

from gpu_codegen import assembled
from gpu_hazards import overwritten
from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.attend import (
    CAPACITY,
    FEW_TOKENS,
    Attention,
    Cut,
    attend_kernel,
    choose_tile,
    num_splits,
    pieces,
)
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE, NATIVE_FP8
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels, compile_kernel

CPU = torch.device("cpu")
SPILLED = {(80, 256, False): 8, (90, 128, True): 12, (90, 256, True): 4}  # bytes; columns, whether fp8
LIMITS = Limits(max_tokens=300, max_rows=8, max_blocks_per_row=20, block_size=16)


def params(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionParams:
    return AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.1, window=window)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What `interpreted_attention.py` prints."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return under_interpreter.run("interpreted_attention.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("mixed", 10), ("whole", 5), ("nothing left", 4), ("pieces", 3), ("wide", 3), ("window", 13),
        ("long window", 6), ("many heads", 2), ("fp8", 5), ("fp8 window", 2), ("fp8 parts", 3),
        ("fp8 split", 4),
    ],
)  # fmt: skip
def test_attention_equals_float64(interpreted: dict[str, Any], name: str, units: int) -> None:
    found = interpreted[name]
    assert 0 < found["error"] < 3e-4
    assert found["units"] == units
    assert found["counters"] == found["touched"] == 0
    assert (found["empty"] > 0) == (name == "nothing left")


@pytest.mark.slow
def test_a_split_row_has_the_bits_of_a_whole_one(interpreted: dict[str, Any]) -> None:
    assert interpreted["differ"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shape", "tokens", "cache"),
    [
        *((*one, torch.float16) for one in (
            (90, (32, 32, 96), 1), (90, (32, 32, 96), 512), (90, (14, 2, 64), 1),
            (90, (64, 8, 64, 128), 512), (90, (64, 8, 64, 128), 1), (90, (4, 1, 256), 1),
            (80, (14, 2, 64), 1), (80, (4, 1, 256), 1), (89, (32, 8, 128), 1),
        )),
        *((*one, FP8) for one in (
            (90, (32, 32, 96), 1), (90, (32, 32, 96), 512), (90, (4, 4, 80), 1), (90, (32, 8, 128), 512),
            (90, (4, 1, 256), 1), (80, (14, 2, 64), 1), (80, (32, 32, 96), 1), (89, (32, 8, 128), 1),
        )),
    ],
)  # fmt: skip
def test_the_compiler_spills_nothing(
    capability: int, shape: tuple[int, ...], tokens: int, cache: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    tile = choose_tile(shape[2], tokens, capability, cache)
    windowed = len(shape) > 3
    cut = Cut(params(*shape), tile.rows, padded=cache == FP8)
    half = torch.float16
    native = capability >= NATIVE_FP8
    kernel = attend_kernel(cut, tile, 16, (half, cache, half), sinks=windowed, native=native)
    compiled = compile_kernel(kernel, capability)
    ptx: str = compiled.asm["ptx"]
    if capability == 90:
        assert "wgmma" in ptx and "mma.sync" not in ptx  # one order of sums, whatever the tile
    assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (cache == FP8 and native)
    if cut.padded:  # whole rows of 16 bytes are copied, and columns that are none are not
        assert not re.search(r"cp\.async\.ca\S* .*0x4", ptx) and "cp.async.cg" in ptx
    log, sass = assembled(compiled, capability)
    assert overwritten(sass) == []
    most = SPILLED.get((capability, sum(cut.keys), cache == FP8), 0)
    assert all(int(size) <= most for size in re.findall(r"(\d+) bytes spill", log))
    assert "warning" not in log


class Recorder(Kernels):
    def __init__(self) -> None:
        super().__init__(CPU, 90)
        self.launches: list[tuple[Kernel, tuple[int, int, int], tuple[Any, ...]]] = []

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], *arguments: Any) -> None:
        assert len(arguments) == len(kernel.arguments)
        self.launches.append((kernel, grid, arguments))


def inputs() -> BatchInputs:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return BatchInputs(
        token_ids=zeros(300), positions=zeros(300), slots=zeros(1, 300), query_start=zeros(9),
        context_lens=zeros(8), block_tables=zeros(1, 8, 20), logit_tokens=zeros(8),
    )  # fmt: skip


def test_layers_of_a_kind_share_a_plan_and_all_share_scratch_memory() -> None:
    kernels = Recorder()
    attention = Attention(kernels, LIMITS)
    full, window, same = params(8, 2, 64), params(8, 2, 64, 128), params(8, 2, 64)
    for one in (full, window, same):
        attention.reserve(one)
    scratch = attention.scratch_bytes
    attention.reserve(full)
    assert attention.scratch_bytes == scratch > CAPACITY * 8 * 64 * 4
    for plan in attention.plans(inputs(), 8):
        plan()
    windows = [dict(kernel.constants)["WINDOW"] for kernel, _, _ in kernels.launches]
    assert sorted(windows) == [0, 128]
    assert all(grid == (8, 1, 1) for _, grid, _ in kernels.launches)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (256, 64), (257, 128)])
def test_a_launch_depends_on_the_bucket_alone(tokens: int, rows: int) -> None:
    kernels = Recorder()
    attention = Attention(kernels, LIMITS)
    kind = params(8, 2, 64)
    attention.reserve(kind)
    cache = LayerCache(torch.zeros(2, 4, 2, 16, 64, dtype=torch.float16))
    q, out = torch.zeros(tokens, 512, dtype=torch.float16), torch.zeros(tokens, 512)
    attention.run(q, cache, inputs(), out, kind, None)
    [(kernel, grid, arguments)] = kernels.launches
    constants = dict(kernel.constants)
    assert (constants["ROWS"], constants["HEADS"], constants["D0"], constants["D1"]) == (rows, 8, 64, 0)
    assert grid == (min(132 * 128 // rows, 6 * tokens), 1, 1) and constants["SINKS"] is False
    named = dict(zip([name for name, _ in kernel.arguments], arguments, strict=True))
    assert named["values"] == 4 * 2 * 16 * 64 and named["block_stride"] == 2 * 16 * 64
    with pytest.raises(ValueError, match=r"queries of torch\.float32"):
        attention.run(q.float(), cache, inputs(), out, kind, None)


def test_scores_of_fp8_keys_are_divided_by_what_the_keys_were_multiplied_by() -> None:
    kernels = Recorder()
    attention = Attention(kernels, LIMITS, cache=FP8)
    kind = params(8, 2, 64)
    attention.reserve(kind)
    cache = LayerCache(torch.zeros(2, 4, 2, 16, 64, dtype=torch.uint8).view(FP8))
    q, out = torch.zeros(1, 512, dtype=torch.float16), torch.zeros(1, 512)
    attention.run(q, cache, inputs(), out, kind, None)
    [(kernel, _, arguments)] = kernels.launches
    named = dict(zip([name for name, _ in kernel.arguments], arguments, strict=True))
    assert named["scale"] == kind.scale / KEY_SCALE
    assert dict(kernel.arguments)["cache"] == "*u8" and dict(kernel.constants)["NATIVE"]
    with pytest.raises(ValueError, match=r"queries of torch\.float32"):
        attention.run(q.float(), cache, inputs(), out, kind, None)
    with pytest.raises(ValueError, match=r"keys of torch\.float16, not torch\.float8_e4m3fn"):
        attention.run(q, LayerCache(cache.tensor.view(torch.uint8).half()), inputs(), out, kind, None)


@pytest.mark.parametrize(
    ("head_dim", "width", "parts"), [(80, 128, 1), (96, 128, 1), (64, 64, 1), (192, 256, 2)]
)
def test_heads_of_fp8_are_one_piece(head_dim: int, width: int, parts: int) -> None:
    by: dict[torch.dtype, dict[str, Any]] = {}
    kind = params(4, 2, head_dim)
    for dtype in (torch.float16, FP8):
        kernels = Recorder()
        attention = Attention(kernels, LIMITS, cache=dtype)
        attention.reserve(kind)
        cache = torch.zeros(2, 4, 2, 16, head_dim, dtype=torch.uint8)
        q = torch.zeros(1, 4 * head_dim, dtype=torch.float16)
        stored = cache.view(FP8) if dtype == FP8 else cache.half()
        attention.run(q, LayerCache(stored), inputs(), torch.zeros_like(q), kind, None)
        by[dtype] = dict(kernels.launches[0][0].constants)
        assert (by[dtype]["D"], by[dtype]["V"]) == (head_dim, head_dim // parts)
        assert by[dtype]["VALUE_PARTS"] == parts
        assert attention.scratch_bytes > CAPACITY * 4 * parts * (by[dtype]["V0"] + by[dtype]["V1"]) * 4
    half, fp8 = by[torch.float16], by[FP8]
    assert half["D0"] + half["D1"] == head_dim and half["V0"] + half["V1"] == head_dim // parts
    assert (fp8["D0"], fp8["D1"], fp8["V0"], fp8["V1"]) == (width, 0, width // parts, 0)


def test_rows_of_a_tile_follow_from_the_head_and_the_step() -> None:
    for capability in (80, 86, 89, 90, 120):
        for head_dim in (16, 64, 80, 96, 128, 256):
            few, many = (choose_tile(head_dim, tokens, capability) for tokens in (FEW_TOKENS, FEW_TOKENS + 1))
            assert few.rows >= 64 and many.rows >= few.rows
            width = sum(pieces(head_dim, padded=True))  # as many columns as fp8 is computed with
            assert choose_tile(head_dim, 1, capability, FP8) == choose_tile(width, 1, capability, FP8)
            assert {few.warps, many.warps} <= {4, 8}
            if capability < 90:  # there the order of sums could depend on the tile
                assert few == many


def test_tiles_and_costs_are_for_the_caller_to_say() -> None:
    kernels = Recorder()
    tile = choose_tile(64, 300)
    attention = Attention(kernels, LIMITS, choose=lambda *_: tile, start=1.0, splitting=1e9)
    attention.reserve(params(8, 2, 64))
    [plan] = attention.plans(inputs(), 4)
    plan()
    [(kernel, _, arguments)] = kernels.launches
    constants = dict(kernel.constants)
    assert (constants["QUERIES"], constants["START"], constants["SPLITTING"]) == (32, 1.0, 1e9)
    assert arguments[-1] == tile.programs * kernels.multiprocessors


def test_splits_are_those_of_the_kernel() -> None:
    def start(split: int) -> int:
        near, far = max(split * 128, split * 256 - 1024), max(split * 512 - 6144, split * 1024 - 28672)
        return max(near, far, split * 2048 - 122880)

    starts = [start(split) for split in range(200)]
    for context in (0, 1, 128, 129, 1024, 1025, 4096, 6144, 12289, 65_536, 131_072):
        assert num_splits(context) == max(1, sum(first < context for first in starts))


@pytest.mark.parametrize(("tokens", "programs"), [(1, 6), (3, 18), (200, 264)])
def test_a_layer_of_few_tokens_has_no_more_programs_than_work(tokens: int, programs: int) -> None:
    kernels = Recorder()
    attention = Attention(kernels, LIMITS)  # 320 tokens a row: 3 splits
    kind = params(8, 2, 64)
    attention.reserve(kind)
    q = torch.zeros(tokens, 512, dtype=torch.float16)
    cache = LayerCache(torch.zeros(2, 4, 2, 16, 64, dtype=torch.float16))
    attention.run(q, cache, inputs(), q.clone(), kind, None)
    [(_, grid, _)] = kernels.launches
    assert grid == (programs, 1, 1)


def test_a_scale_must_be_positive() -> None:
    attention = Attention(Recorder(), LIMITS)
    kind = AttentionParams(num_heads=1, num_kv_heads=1, head_dim=16, scale=-1.0)
    cache = LayerCache(torch.zeros(2, 4, 1, 16, 16, dtype=torch.float16))
    q = torch.zeros(1, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"multiplied by -1\.0"):
        attention.run(q, cache, inputs(), q.clone(), kind, None)


def test_heads_are_cut_into_what_tensor_cores_take() -> None:
    heads = (16, 64, 80, 96, 128, 256)
    assert [pieces(columns, padded=False) for columns in heads] == [
        (16, 0), (64, 0), (64, 16), (64, 32), (128, 0), (256, 0),
    ]  # fmt: skip
    assert [pieces(columns, padded=True) for columns in heads] == [
        (16, 0), (64, 0), (128, 0), (128, 0), (128, 0), (256, 0),
    ]  # fmt: skip
    for columns, padded in product((8, 72, 100, 112), (False, True)):
        with pytest.raises(ValueError, match="powers of two"):
            pieces(columns, padded=padded)
    assert Cut(params(9, 3, 64), 64).queries == 21
    assert Cut(params(64, 8, 64), 128).lanes == 8
    wide = Cut(params(4, 1, 256), 64)
    assert (wide.value_parts, wide.values, wide.lanes) == (2, (128, 0), 2)
    many = Cut(params(200, 1, 64), 64)
    assert (many.head_tiles, many.queries) == (4, 1)
