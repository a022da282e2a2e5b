"""The operations with operands of models' sizes: for comparing bits, for timing, for looking at code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_weights import packed_tiles
from worker_orcd.kernels.backend import AttentionParams, Glu, RopeParams
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.operations import Operations, rope_table
from worker_orcd.kernels.cuda.variants import shape_of
from worker_orcd.kernels.cuda.weights import PackedMatrix, upload

POOL = 1024  # tokens
POSITIONS = 8192


def rope_of(dim: int, device: torch.device) -> torch.Tensor:
    inv_freq = tuple(10000.0 ** -(2 * i / dim) for i in range(dim // 2))
    return rope_table(RopeParams(rotary_dim=dim, inv_freq=inv_freq), POSITIONS, device)


def table_of(name: str, n: int, k: int, device: torch.device) -> PackedMatrix:
    return upload(shape_of(name, n, k), n, torch.from_numpy(packed_tiles(name, n, k)).to(device))


def attention_of(heads: int, kv_heads: int, dim: int) -> AttentionParams:
    return AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=1.0)


# -- rows of a pool, for comparing bits --------------------------------------------------------------------

Run = Callable[[Operations, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """An operation on rows `indices` (tokens,) of a pool; gives its outputs, (tokens, …) each."""

    name: str
    run: Run


def rowwise(device: torch.device) -> Iterator[Rows]:
    """Each operation, on a pool of POOL tokens."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(*shape, generator=generator, device=device)

    for width, runs in ((2880, 1), (896, 1), (50, 2), (128, 8), (16384, 1)):
        yield from norm_rows(random, width, runs)
    yield from rope_rows(random, (32, 8, 128), True)
    yield from rope_rows(random, (32, 32, 96), False)
    yield from rope_rows(random, (32, 32, 96), False, FP8)
    both = random(POOL, 2 * 2880)
    for kind in Glu:
        yield Rows(name=kind.value, run=glu_rows(kind, both))
    w, x, bias = random(32, 2880), random(POOL, 2880), random(32)

    def product(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        return [ops.linear_f32(x[indices], w, bias, torch.empty(len(indices), 32, device=device))]

    yield Rows(name="linear_f32", run=product)
    logits, slots, weights = random(POOL, 128), random(POOL, 4 * 2048), random(POOL, 4)

    def route(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        experts = torch.zeros(len(indices), 8, dtype=torch.int32, device=device)
        chosen = torch.zeros(len(indices), 8, device=device)
        ops.route(logits[indices], experts, chosen)
        return [experts, chosen]

    yield Rows(name="route", run=route)

    def combine(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        out = torch.empty(len(indices), 2048, device=device)
        return [ops.combine(slots[indices], weights[indices], out, x[indices, :2048].clone())]

    yield Rows(name="combine", run=combine)
    table = table_of("Q4_K", POOL, 1024, device)

    def embed(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        return [ops.embed(indices.int(), table, torch.empty(len(indices), 1024, device=device))]

    yield Rows(name="embed", run=embed)


def norm_rows(random: Callable[..., torch.Tensor], width: int, runs: int) -> Iterator[Rows]:
    x, gain, bias = random(POOL, width * runs), random(width), random(width)

    def run(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        given = x[indices]
        full, half, total = torch.empty_like(given), torch.empty_like(given).half(), torch.empty_like(given)
        layer = torch.empty_like(given).half()
        return [
            ops.rms_norm(given, gain, 1e-5, full),
            ops.add_rms_norm(given, given, gain, 1e-5, total, half),
            ops.layer_norm(given, gain, bias, 1e-5, layer),
        ]

    yield Rows(name=f"norms {width}", run=run)


def nowhere(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A cache that nothing was written to, full of NaN."""
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def stored_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(2, tokens, num_kv_heads * head_dim)"""
    bytes_or_numbers = cache.view(torch.uint8) if cache.dtype == FP8 else cache
    found = bytes_or_numbers.transpose(2, 3).flatten(1, 2)[:, slots.long()].flatten(2)
    return found.view(cache.dtype)


def rope_rows(
    random: Callable[..., torch.Tensor],
    sizes: tuple[int, int, int],
    normed: bool,
    dtype: torch.dtype = torch.float16,
) -> Iterator[Rows]:
    heads, kv_heads, dim = sizes
    qkv, gain = random(POOL, (heads + 2 * kv_heads) * dim), random(dim)
    table, params = rope_of(dim, qkv.device), attention_of(*sizes)
    positions = torch.arange(POOL, dtype=torch.int32, device=qkv.device) * 7
    gains = (gain, gain, 1e-6) if normed else (None, None, 0.0)

    def run(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        tokens = len(indices)
        cache = nowhere((2, tokens // 16 + 2, kv_heads, 16, dim), dtype, qkv.device)
        q_out = torch.empty(tokens, heads * dim, dtype=torch.float16, device=qkv.device)
        slots = torch.arange(tokens, dtype=torch.int32, device=qkv.device) + 16
        given, at = qkv[indices], positions[indices]
        ops.rope_store(given, at, slots, params, cache, q_out, gains=gains, rope=table)
        return [q_out, *stored_at(cache, slots)]

    yield Rows(name=f"rope_store {dim}{', fp8' if dtype == FP8 else ''}", run=run)


def glu_rows(kind: Glu, both: torch.Tensor) -> Run:
    def run(ops: Operations, indices: torch.Tensor) -> list[torch.Tensor]:
        given, n = both[indices], both.shape[1] // 2
        out = torch.empty(len(indices), n, dtype=torch.float16, device=both.device)
        return [ops.glu(kind, given[:, :n], given[:, n:], out)]

    return run


# -- for timing --------------------------------------------------------------------------------------------

Buffers = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation of some tokens: what to give it, afresh each time, and bytes read and written."""

    name: str
    num_bytes: int
    buffers: Callable[[], Buffers]
    run: Callable[[Operations, Buffers], object]


Maker = Callable[[int], Case]  # by number of tokens


def timed_cases(device: torch.device) -> list[Maker]:
    """Operands as Phi-3-mini, Qwen3 30B A3B and GPT-OSS 20B have them."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    heads = [
        timed_heads(make, sizes, normed) for sizes, normed in (((32, 32, 96), False), ((32, 4, 128), True))
    ]
    return [*timed_rows(make), *heads, *timed_experts(make)]


def timed_rows(make: Callable[..., torch.Tensor]) -> list[Maker]:
    gain, f16 = make(3072), torch.float16
    table = table_of("Q4_K", 32064, 3072, gain.device)

    def rms_norm(t: int) -> Case:
        return Case(
            name="rms_norm 3072 to float16",
            num_bytes=t * 3072 * 6,
            buffers=lambda: {"x": make(t, 3072), "out": make(t, 3072, dtype=f16)},
            run=lambda ops, b: ops.rms_norm(b["x"], gain, 1e-5, b["out"]),
        )

    def add_rms_norm(t: int) -> Case:
        return Case(
            name="add_rms_norm 3072 to float16",
            num_bytes=t * 3072 * 14,
            buffers=lambda: {"x": make(t, 3072), "y": make(t, 3072), "out": make(t, 3072, dtype=f16)},
            run=lambda ops, b: ops.add_rms_norm(b["x"], b["y"], gain, 1e-5, b["x"], b["out"]),
        )

    def glu(t: int) -> Case:
        return Case(
            name="swiglu 8192 to float16",
            num_bytes=t * 8192 * 10,
            buffers=lambda: {"both": make(t, 16384), "out": make(t, 8192, dtype=f16)},
            run=lambda ops, b: ops.glu(Glu.SWIGLU, b["both"][:, :8192], b["both"][:, 8192:], b["out"]),
        )

    def add(t: int) -> Case:
        return Case(
            name="add 3072",
            num_bytes=t * 3072 * 12,
            buffers=lambda: {"x": make(t, 3072), "y": make(t, 3072), "out": make(t, 3072)},
            run=lambda ops, b: ops.add(b["x"], b["y"], b["out"]),
        )

    def embed(t: int) -> Case:
        return Case(
            name="embed Q4_K 32064x3072",
            num_bytes=int(t * 3072 * (4 + 4.5 / 8)),
            buffers=lambda: {
                "ids": torch.randint(0, 32064, (t,), dtype=torch.int32, device=gain.device),
                "out": make(t, 3072),
            },
            run=lambda ops, b: ops.embed(b["ids"], table, b["out"]),
        )

    return [rms_norm, add_rms_norm, glu, add, embed]


def timed_heads(make: Callable[..., torch.Tensor], sizes: tuple[int, int, int], normed: bool) -> Maker:
    heads, kv_heads, dim = sizes
    columns, gain = (heads + 2 * kv_heads) * dim, make(dim)
    gains = (gain, gain, 1e-6) if normed else (None, None, 0.0)
    table, params, device = rope_of(dim, gain.device), attention_of(*sizes), gain.device

    def buffers(t: int) -> Buffers:
        return {
            "qkv": make(t, columns),
            "at": torch.arange(t, dtype=torch.int32, device=device),
            "slots": torch.randperm(t, device=device).int() + 16,
            "cache": torch.zeros(2, t // 16 + 2, kv_heads, 16, dim, dtype=torch.float16, device=device),
            "q": make(t, heads * dim, dtype=torch.float16),
        }

    def run(ops: Operations, b: Buffers) -> object:
        return ops.rope_store(
            b["qkv"], b["at"], b["slots"], params, b["cache"], b["q"], gains=gains, rope=table
        )

    return lambda t: Case(
        name=f"rope_store {heads}/{kv_heads} of {dim}{', norms' if normed else ''}",
        num_bytes=t * (columns * 6 + dim * 4),
        buffers=lambda: buffers(t),
        run=run,
    )


def timed_experts(make: Callable[..., torch.Tensor]) -> list[Maker]:
    w, bias = make(32, 2880), make(32)

    def linear_f32(t: int) -> Case:
        return Case(
            name="linear_f32 32x2880",
            num_bytes=t * (2880 + 32) * 4 + 32 * 2880 * 4,
            buffers=lambda: {"x": make(t, 2880), "out": make(t, 32)},
            run=lambda ops, b: ops.linear_f32(b["x"], w, bias, b["out"]),
        )

    def route(t: int) -> Case:
        return Case(
            name="route 8 of 128",
            num_bytes=t * (128 + 16) * 4,
            buffers=lambda: {
                "logits": make(t, 128),
                "experts": torch.zeros(t, 8, dtype=torch.int32, device=w.device),
                "weights": make(t, 8),
            },
            run=lambda ops, b: ops.route(b["logits"], b["experts"], b["weights"]),
        )

    def combine(t: int) -> Case:
        return Case(
            name="combine 4 of 2880, residual",
            num_bytes=t * 2880 * 4 * 6,
            buffers=lambda: {"x": make(t, 4 * 2880), "weights": make(t, 4), "residual": make(t, 2880)},
            run=lambda ops, b: ops.combine(b["x"], b["weights"], b["residual"], b["residual"]),
        )

    return [linear_f32, route, combine]
