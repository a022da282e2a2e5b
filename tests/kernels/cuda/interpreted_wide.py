"""
The Triton kernels of `benchmarks/gpu_wide.py` under Triton's interpreter. Run in a process of its own, as
`interpreted.py`; see test_wide.py.

Prints a line of JSON: of each case how many numbers are not the ones wanted, or how far off they are.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import torch

from gpu_weights import random_rows
from wide_kernels import pieces, unpack
from wide_ways import pieces_kernel, rows_of, unpack_kernel
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.linear import linear
from worker_orcd.kernels.cuda.variants import Tile, Variant
from worker_orcd.kernels.cuda.weights import PackedMatrix, pack, upload
from worker_orcd.quant import BY_NAME

NONE = torch.zeros(64, dtype=torch.int32)


def weight_of(name: str, n: int, k: int, step: int = 0) -> tuple[PackedMatrix, torch.Tensor]:
    """A random matrix, and its weights in float64."""
    fmt = BY_NAME[name]
    rows = random_rows(fmt, n, k, n + k)
    shape, packed = pack(Matrix(name, fmt, n, k, rows), step)
    return upload(shape, n, torch.from_numpy(packed)), torch.from_numpy(fmt.dequantize_rows(rows)).double()


def operands(weight: PackedMatrix, *, tiled: bool) -> torch.Tensor:
    tiles, k = -(-weight.n // 64), weight.shape.k
    out = torch.full((tiles * 64, k), torch.nan, dtype=torch.float16)
    unpack[tiles, k // weight.shape.step](
        weight.words, weight.high, weight.headers, weight.shifts, out, weight.n,
        **dict(unpack_kernel(weight.shape, tiled=tiled, portable=True).constants),
    )  # fmt: skip
    return out


def unpacked(name: str, step: int = 0) -> dict[str, float]:
    """Row by row and in tiles the same numbers, those of float64 but for rounding, and of a slab its rows."""
    n, k = 136, 512
    weight, exact = weight_of(name, n, k, step)
    rows = operands(weight, tiled=False)
    tiles = operands(weight, tiled=True).view(3, k // 64, 64, 64).transpose(1, 2).reshape(192, k)
    slab = operands(rows_of(weight, 64, 136), tiled=False)
    error = float((rows[:n].double() - exact).norm() / exact.norm())
    differing = int((rows[:n] != tiles[:n]).sum()) + int((rows[64:n] != slab[:72]).sum())
    beyond = int((~torch.isnan(rows[n:])).sum())  # nothing is written where there is no row
    return {"error": error, "differing": differing + beyond}


def products(chunks: int, count: int) -> dict[str, float]:
    """Q4_K's steps piece by piece beside whole: the same bits. The interpreter's sums have the same order."""
    n, k, tokens = 136, 1024, 19
    weight, exact = weight_of("Q4_K", n, k)
    weight = dataclasses.replace(weight, shape=dataclasses.replace(weight.shape, chunks=chunks))
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(2)).half()
    tile = Tile(rows=128, tokens=16, warps=4, stages=2)
    whole, cut = torch.full((2, tokens, n), torch.nan)
    linear[2, 2, 1](
        weight.words, weight.high, weight.headers, weight.shifts, x, whole, whole, NONE, whole, whole, n,
        tokens, n, whole, NONE, NONE, whole, 0,
        **dict(Variant(shape=weight.shape, tile=tile, portable=True).kernel().constants),
    )  # fmt: skip
    constants = pieces_kernel(weight.shape, tile, count, torch.float32, portable=True).constants
    pieces[2, 2](weight.words, weight.headers, x, cut, n, tokens, n, **dict(constants))
    wanted = x.double() @ exact.T
    return {
        "error": float((cut.double() - wanted).norm() / wanted.norm()),
        "differing": int((cut.view(torch.int32) != whole.view(torch.int32)).sum()),
    }


if __name__ == "__main__":
    np.seterr(all="ignore")
    formats = ("Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0")
    found = {name: unpacked(name) for name in formats}
    found |= {f"{name} by half": unpacked(name, 128) for name in ("Q4_K", "Q5_K")}
    found |= {
        f"{count} pieces, {chunks} chunks": products(chunks, count) for count in (2, 4) for chunks in (1, 2)
    }
    print(json.dumps(found))
