"""
One product under Triton's interpreter, compared with float64. Run in a process of its own, which
`TRITON_INTERPRET=1` must be set for before Triton is imported; see test_interpreter.py.

Prints a line of JSON: how far off each case is, and whether every counter is zero again.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import torch

from gpu_attention_steps import to_fp8
from gpu_weights import random_rows
from worker_orcd.kernels.backend import Glu, Matrix
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.linear import linear
from worker_orcd.kernels.cuda.variants import Epilogue, Shape, Store, Tile, Variant
from worker_orcd.kernels.cuda.weights import Uploader, alternate, pack, upload
from worker_orcd.quant import BY_NAME


def product(
    name: str, n: int, k: int, tokens: int, chunks: int, tile: Tile, epilogue: Epilogue, step: int = 0
) -> dict[str, object]:
    fmt = BY_NAME[name]
    rows = random_rows(fmt, n, k, n + k)
    shape, packed = pack(Matrix(name, fmt, n, k, rows), step)
    shape = Shape(format=name, k=k, step=shape.step, chunks=chunks)
    variant = Variant(shape=shape, tile=tile, epilogue=epilogue, portable=True)
    weight = upload(shape, n, torch.from_numpy(packed))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator).to(weight.operand)
    bias, residual = torch.randn(n, generator=generator), torch.randn(tokens, n, generator=generator)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[epilogue.out]
    y = torch.full((tokens, n // 2 if epilogue.glu else n), torch.nan, dtype=dtype)
    alternating = torch.arange(n)
    if epilogue.paired:
        alternating = alternate(alternating)
        weight = Uploader(torch.device("cpu")).matrix([Matrix(name, fmt, n, k, rows)], paired=True)
    partials, counters = torch.full((chunks * tokens * n,), torch.nan), torch.zeros(64, dtype=torch.int32)
    grid = -(-n // tile.rows), -(-tokens // tile.tokens), chunks if tile.split else 1
    linear[grid](
        weight.words, weight.high, weight.headers, weight.shifts, x, y, partials, counters, bias[alternating],
        residual, n, tokens, y.stride(0), y, counters, counters, y, 0, **variant.constants(),
    )  # fmt: skip
    exact = torch.from_numpy(fmt.dequantize_rows(rows).astype(np.float64))
    wanted = x.double() @ exact.T + (bias if epilogue.bias else 0)
    if epilogue.residual:
        wanted = wanted + residual
    if epilogue.glu:
        wanted = ReferenceBackend().glu(epilogue.glu, *wanted.chunk(2, dim=1))
    error = float((y.double() - wanted).norm() / wanted.norm())
    return {"error": error, "counters": int(counters.abs().sum())}


def cases(name: str) -> list[dict[str, object]]:
    k = 768 if BY_NAME[name].block_size == 256 else 192
    small, wide = Tile(rows=64, tokens=16, warps=4, stages=2), Tile(rows=128, tokens=16, warps=4, stages=2)
    split = Tile(rows=128, tokens=16, warps=4, stages=2, split=True)
    return [
        product(name, 64, 512, 3, 1, small, Epilogue(bias=True)),
        product(name, 72, k, 17, 3, split, Epilogue()),
        product(name, 130, k, 2, 3, wide, Epilogue()),
    ]


def more_cases() -> list[dict[str, object]]:
    split = Tile(rows=64, tokens=16, warps=4, stages=2, split=True)
    whole, wide = (Tile(rows=rows, tokens=16, warps=4, stages=2) for rows in (64, 128))
    return [
        product("Q4_0", 64, 256, 3, 2, split, Epilogue(paired=True, glu=Glu.SWIGLU, bias=True)),
        product("Q8_0", 144, 128, 17, 1, wide, Epilogue(paired=True, glu=Glu.GEGLU, out="fp16")),
        product("MXFP4", 80, 96, 2, 1, whole, Epilogue(paired=True, glu=Glu.CLAMPED_SWIGLU, bias=True)),
        product("Q4_0", 144, 256, 3, 2, split, Epilogue(paired=True, bias=True, residual=True)),
        product("Q4_0", 80, 256, 18, 1, whole, Epilogue(residual=True)),
        product("Q8_0", 64, 32, 2, 1, whole, Epilogue()),  # columns that are no whole step
        product("MXFP4", 64, 96, 2, 1, whole, Epilogue()),
        product("F16", 64, 100, 2, 1, whole, Epilogue()),
        # Steps of half a block, two of which share a header; a chunk begins within a block.
        *(product(name, 72, 768, 2, 2, split, Epilogue(), 128) for name in ("Q4_K", "Q5_K", "Q6_K")),
    ]


def heads_case(
    name: str, tile: Tile, chunks: int, *, rotated: bool, bias: bool, fp8: bool = False
) -> dict[str, object]:
    """q, k and v at the end of their product, and of the product alone, turned and stored here."""
    fmt, n, k, tokens, block = BY_NAME[name], 5 * 32, 256, 19, 16
    matrix = Matrix(name, fmt, n, k, random_rows(fmt, n, k, 5))
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(n, generator=generator)
    (part,) = Uploader(CPU).weight([matrix], [values.numpy()] if bias else (), head_dim=32).parts
    weight = part.weight
    weight = dataclasses.replace(weight, shape=dataclasses.replace(weight.shape, chunks=chunks))
    x = torch.randn(tokens, k, generator=generator).to(weight.operand)
    positions = torch.randint(0, 40, (tokens,), generator=generator).int()
    slots = torch.randperm(3 * block, generator=generator)[:tokens].int()
    table = torch.randn(40, 2, 16, generator=generator)
    store = Store(num_heads=3, num_kv_heads=1, cache_block=block, rotated=rotated, fp8=fp8)
    cache = torch.zeros(2, 3, 1, block, 32, dtype=torch.uint8 if fp8 else torch.float16)
    partials, counters = torch.full((chunks * tokens * n,), torch.nan), torch.zeros(64, dtype=torch.int32)
    grid = -(-n // tile.rows), -(-tokens // tile.tokens), chunks if tile.split else 1
    outputs = []
    for one, y in ((None, torch.empty(tokens, n)), (store, torch.empty(tokens, 96, dtype=torch.float16))):
        epilogue = Epilogue(bias=bias, head=32, store=one)
        variant = Variant(shape=weight.shape, tile=tile, epilogue=epilogue, portable=True)
        linear[grid](
            weight.words, weight.high, weight.headers, weight.shifts, x, y, partials, counters,
            part.bias if bias else y, y, n, tokens, y.stride(0), cache, positions, slots, table,
            cache.stride(0), **dict(variant.kernel().constants),
        )  # fmt: skip
        outputs.append(y)
    plain, q = outputs
    exact = x.double() @ torch.from_numpy(fmt.dequantize_rows(matrix.data).astype(np.float64)).T
    error = float((plain - exact - (values if bias else 0)).norm() / exact.norm())
    heads = plain.view(tokens, 5, 32)
    cos, sin = table[positions.long()].unsqueeze(2).unbind(1)
    low, high = heads[:, :4, :16], heads[:, :4, 16:]
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2) if rotated else heads[:, :4]
    wanted = torch.zeros_like(cache).view(2, 3, block, 32)
    there = slots.long() // block, slots.long() % block
    keys_values = torch.stack((turned[:, 3], heads[:, 4]))
    stored = to_fp8(keys_values).view(torch.uint8) if fp8 else keys_values.half()
    wanted[0][there], wanted[1][there] = stored
    differ = int((q.view(tokens, 3, 32) != turned[:, :3].half()).sum()) + int(
        (cache.view_as(wanted) != wanted).sum()
    )
    return {"error": error + differ, "counters": int(counters.abs().sum())}


def ends_and_beginnings() -> list[dict[str, object]]:
    whole, split = (Tile(rows=64, tokens=16, warps=4, stages=2, split=split) for split in (False, True))
    wide = Tile(rows=128, tokens=32, warps=4, stages=2)
    return [
        heads_case("Q8_0", whole, 1, rotated=True, bias=True),
        heads_case("Q4_K", whole, 1, rotated=False, bias=False),
        heads_case("Q5_0", split, 2, rotated=True, bias=True),
        heads_case("Q8_0", wide, 2, rotated=True, bias=False),
        heads_case("Q8_0", whole, 1, rotated=True, bias=True, fp8=True),
    ]


CPU = torch.device("cpu")

if __name__ == "__main__":
    found = {name: cases(name) for name in sys.argv[1:]} | {
        "more": more_cases(),
        "ends": ends_and_beginnings(),
    }
    print(json.dumps(found))
