"""
The operations under Triton's interpreter, compared with float64 and with the reference backend. (Not those
that round to bfloat16: the interpreter does that unlike a GPU.) Run in a process of its own, which
`TRITON_INTERPRET=1` must be set for before Triton is imported; see test_operations.py.

Prints a line of JSON: for each operation how far off its cases are, relative to the largest value.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import numpy as np
import torch

from gpu_weights import random_rows
from worker_orcd.kernels.backend import AttentionParams, Glu, Matrix, RopeParams
from worker_orcd.kernels.cpu.reference import ReferenceBackend, ReferenceRouting
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE, LARGEST_FP8
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.operations import Operations, rope_table
from worker_orcd.kernels.cuda.weights import pack, upload
from worker_orcd.quant import BY_NAME

CPU = torch.device("cpu")


class Interpreter(Kernels):
    """Runs what would be launched."""

    def __init__(self) -> None:
        super().__init__(CPU, 90)

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        module = importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
        given = [
            one.view(torch.uint8) if isinstance(one, torch.Tensor) and one.dtype == FP8 else one
            for one in arguments
        ]
        getattr(module, kernel.function)[grid](*given, **dict(kernel.constants))


OPERATIONS, REFERENCE = Operations(Interpreter()), ReferenceBackend()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sliced(*shape: int, pad: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that are part of wider ones, filled with NaN (integers: -1)."""
    fill = torch.nan if dtype.is_floating_point else -1
    return torch.full((shape[0], shape[1] + pad), fill, dtype=dtype)[:, : shape[1]]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value; 0 if all are equal, whatever they are."""
    if found.shape == wanted.shape and torch.equal(found.nan_to_num(7), wanted.to(found.dtype).nan_to_num(7)):
        return 0.0
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# -- rows --------------------------------------------------------------------------------------------------


def embed(name: str) -> list[float]:
    """Bit for bit, so 0: small and large scales, and rows of a last tile that is not full."""
    fmt, found = BY_NAME[name], []
    for n, k, step, scale in ((70, 768, 0, 1.0), (64, 256, 0, 1.7), (130, 512, 128, 1.0)):
        if step and fmt.block_size == 1:
            step = 0
        rows = random_rows(fmt, n, k, n)
        if name == "MXFP4":
            rows[:, 0] = np.arange(n) % 129  # subnormal numbers too
        shape, packed = pack(Matrix(name, fmt, n, k, rows), step)
        weight = upload(shape, n, torch.from_numpy(packed))
        indices = torch.tensor([0, n - 1, 5, 5, n // 2], dtype=torch.int32)
        out = sliced(5, k)
        OPERATIONS.embed(indices, weight, out, scale)
        again, drawn = sliced(5, k), indices.flip(0).contiguous()
        half_known = torch.where(torch.arange(5) % 2 == 0, indices, torch.arange(-5, 0)).int()
        found.append(off(OPERATIONS.embed(half_known, weight, again, scale, drawn=drawn), out))
        wanted = torch.from_numpy(fmt.dequantize_rows(rows[indices.numpy()])) * scale
        found.append(off(out, wanted))
    return found


def take() -> list[float]:
    x, indices = random(9, 70), torch.tensor([8, 0, 0, 3], dtype=torch.int32)
    return [off(OPERATIONS.take(x, indices, sliced(4, 70)), x[indices.long()])]


# -- norms -------------------------------------------------------------------------------------------------


def norms() -> list[float]:
    found = []
    for width, runs in ((64, 3), (96, 1), (2880, 1), (9000, 1), (50, 2), (1, 1)):
        x, gain, bias = random(3, width * runs, scale=4), random(width, seed=1), random(width, seed=2)
        y, total = random(3, width * runs, seed=3), sliced(3, width * runs)
        out, again = sliced(3, width * runs), sliced(3, width * runs)
        OPERATIONS.rms_norm(x, gain, 1e-5, out)
        found.append(off(out, REFERENCE.rms_norm(x.double(), gain.double(), 1e-5)))
        OPERATIONS.add_rms_norm(x, y, gain, 1e-5, total, out)
        OPERATIONS.rms_norm(total, gain, 1e-5, again)
        found += [off(total, x + y), off(out, again)]
        runs_of_x, wide = x.double().view(-1, width), gain.double()
        wanted = torch.nn.functional.layer_norm(runs_of_x, (width,), wide, bias.double(), 1e-5)
        found.append(off(OPERATIONS.layer_norm(x, gain, bias, 1e-5, out), wanted.view(3, -1)))
    return found


# -- attention's inputs ------------------------------------------------------------------------------------


def rope_store() -> list[float]:
    """Against the reference: its norm, rotation and rounding."""
    found = []
    for heads, kv_heads, dim, rotary, normed, dtype in (
        (4, 2, 64, 64, (True, True), torch.float16),
        (3, 1, 96, 96, (False, False), torch.float16),
        (5, 5, 80, 32, (False, True), torch.float16),
        (2, 2, 64, 0, (False, False), torch.float32),
        (2, 1, 10, 4, (True, False), torch.float16),
    ):
        params = AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=1.0)
        qkv = random(3, (heads + 2 * kv_heads) * dim)
        q, k, v = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        gains = [random(dim, seed=7) if wanted else None for wanted in normed]
        positions = torch.tensor([0, 17, 4095], dtype=torch.int32)
        slots = torch.tensor([16, 79, 33], dtype=torch.int32)
        cache = torch.full((2, 6, kv_heads, 16, dim), torch.nan, dtype=dtype)
        q_out, table = sliced(3, heads * dim, dtype=torch.float16), None
        q, k = (
            x if g is None else REFERENCE.rms_norm(x, g, 1e-6) for x, g in zip((q, k), gains, strict=True)
        )
        if rotary:
            inv_freq = tuple(10000.0 ** -(2 * i / rotary) for i in range(rotary // 2))
            rope = RopeParams(rotary_dim=rotary, inv_freq=inv_freq, attention_factor=1.25)
            table = rope_table(rope, 4096, CPU)
            REFERENCE._angles.clear()
            q, k = (REFERENCE.rope(x, positions, rope, dim) for x in (q, k))
        OPERATIONS.rope_store(
            qkv, positions, slots, params, cache, q_out, gains=(gains[0], gains[1], 1e-6), rope=table
        )
        stored = cache.transpose(2, 3).flatten(1, 2)[:, slots.long()].flatten(2)  # (2, tokens, columns)
        found += [off(q_out, q), off(stored[0], k), off(stored[1], v)]
        found.append(abs(int(cache.isnan().sum()) - cache.numel() + stored.numel()))  # nothing else written
    return found


def rope_store_fp8() -> list[float]:
    """Bit for bit: every byte, halfway between, large, small, negative zero, and NaN; no keys are rotated."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(FP8).float()[(codes & 0x7F) != 0x7F].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    some = torch.tensor([-0.0, 1e-9, 464.0, 464.1, 1e30, torch.inf, -torch.inf, torch.nan])
    values = torch.cat((numbers, middle, middle * (1 - 1e-6), middle * (1 + 1e-6), some, random(1, 492)[0]))
    params = AttentionParams(num_heads=2, num_kv_heads=2, head_dim=16, scale=1.0)
    v = values[: len(values) // 32 * 32].view(-1, 32)
    tokens = len(v)
    q = random(tokens, 32)
    cache = torch.full((2, tokens // 16 + 2, 2, 16, 16), 0x55, dtype=torch.uint8).view(FP8)
    slots = torch.arange(tokens, dtype=torch.int32) + 16
    q_out = sliced(tokens, 32, dtype=torch.float16)
    qkv = torch.cat((q, v / KEY_SCALE, v), dim=1)
    OPERATIONS.rope_store(qkv, slots, slots, params, cache, q_out)
    stored = cache.view(torch.uint8).transpose(2, 3).flatten(1, 2)[:, slots.long()].flatten(2)
    wanted = v.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8).view(torch.uint8)
    nan = v.isnan()
    wrong = [((one != wanted) & ~nan).sum() + (one[nan] & 0x7F != 0x7F).sum() for one in stored]
    untouched = (cache.view(torch.uint8) == 0x55).sum() - (stored == 0x55).sum()
    return [*map(float, wrong), off(q_out, q), float(untouched - cache.numel() + stored.numel())]


# -- single elements ---------------------------------------------------------------------------------------


def single() -> list[float]:
    found = []
    for tokens, n in ((3, 70), (2, 1500)):
        both = random(tokens, 2 * n, scale=6)
        gate, up = both[:, :n], both[:, n:]
        for kind in Glu:
            found.append(
                off(OPERATIONS.glu(kind, gate, up, sliced(tokens, n)), REFERENCE.glu(kind, gate, up))
            )
        found += [
            off(OPERATIONS.gelu(up, sliced(tokens, n)), REFERENCE.gelu(up)),
            off(OPERATIONS.add(gate, up, sliced(tokens, n)), gate + up),
            off(OPERATIONS.scale(up, 0.3, sliced(tokens, n)), up * 0.3),
            off(OPERATIONS.cast(up, sliced(tokens, n, dtype=torch.float16)), up.half()),
        ]
    return found


def saturated() -> list[float]:
    x = torch.tensor([[1e9, -1e9, 65519.0, torch.inf, -torch.inf, torch.nan, 2.0, -7e4]])
    wanted = torch.tensor([[65504, -65504, 65504, 65504, -65504, torch.nan, 2, -65504]]).half()
    out = sliced(1, 8, dtype=torch.float16)
    return [off(OPERATIONS.cast(x, out), wanted), off(OPERATIONS.scale(x, 1.0, out), wanted)]


def in_place() -> list[float]:
    x, y, gain = random(2, 96), random(2, 96, seed=1), random(96)
    total, normed = x + y, OPERATIONS.rms_norm(x + y, gain, 1e-5, sliced(2, 96, pad=32))
    OPERATIONS.add_rms_norm(x, y, gain, 1e-5, x, y)
    return [off(x, total), off(y, normed), off(OPERATIONS.add(x, x, x), total + total)]


# -- experts -----------------------------------------------------------------------------------------------


def linear_f32() -> list[float]:
    found = []
    for tokens, n, k in ((3, 32, 256), (1, 5, 90), (2, 130, 320)):
        x, w, bias = random(tokens, k), random(n, k, seed=1), random(n, seed=2)
        wanted = x.double() @ w.double().T
        found.append(off(OPERATIONS.linear_f32(x, w, None, sliced(tokens, n)), wanted))
        found.append(off(OPERATIONS.linear_f32(x, w, bias, sliced(tokens, n)), wanted + bias))
    return found


def route() -> list[float]:
    found = []
    for tokens, n, top_k in ((5, 32, 4), (4, 130, 8), (3, 256, 16), (2, 6, 3), (2, 4, 1)):
        logits = random(tokens, n, scale=3)
        logits[0, : n // 2] = logits[0, n // 2 :][: n // 2]  # equal ones
        logits[1] = torch.tensor([0.0, -0.0]).repeat(n // 2)
        experts = sliced(tokens, top_k, dtype=torch.int32)
        weights = sliced(tokens, top_k)
        OPERATIONS.route(logits, experts, weights)
        wanted = REFERENCE.route(logits, top_k)
        found += [off(weights, wanted.weights), float((experts != wanted.experts).sum())]
    return found


def combine() -> list[float]:
    """Bit for bit as the reference."""
    x, weights, residual = random(3, 4 * 70), random(3, 4), random(3, 70)
    wanted = REFERENCE.combine(x, ReferenceRouting(torch.zeros(3, 4), weights))
    return [
        off(OPERATIONS.combine(x, weights, sliced(3, 70)), wanted),
        off(OPERATIONS.combine(x, weights, sliced(3, 70), residual), residual + wanted),
    ]


CASES: list[Callable[[], list[float]]] = [
    take, norms, rope_store, rope_store_fp8, single, saturated, in_place, linear_f32, route, combine,
]  # fmt: skip

if __name__ == "__main__":
    print(
        json.dumps(
            {f"embed {name}": embed(name) for name in BY_NAME} | {case.__name__: case() for case in CASES}
        )
    )
