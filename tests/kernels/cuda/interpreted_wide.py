"""
`unpack` under Triton's interpreter. Run in a process of its own, as `interpreted.py`; see test_wide.py.

Prints a line of JSON: of each case how far numbers are off, and how many are not the ones wanted.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from gpu_weights import random_rows
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.unpack import unpack
from worker_orcd.kernels.cuda.weights import PackedMatrix, pack, upload
from worker_orcd.kernels.cuda.wide import tiles_of, unpack_kernel
from worker_orcd.quant import BY_NAME

N, K = 136, 512  # of three tiles the last is no whole one


def operands(weight: PackedMatrix) -> torch.Tensor:
    """Row by row, with those that fill the last tile."""
    tiles, steps = -(-weight.n // 64), K // 64
    out = torch.full((tiles * 64 * K,), torch.nan, dtype=weight.operand)
    constants = dict(unpack_kernel(weight.shape, portable=True).constants)
    unpack[tiles, K // weight.shape.step](
        weight.words, weight.high, weight.headers, weight.shifts, out, **constants
    )
    return out.view(tiles, steps, 64, 64).transpose(1, 2).reshape(tiles * 64, K).double()


def unpacked(name: str, step: int = 0) -> dict[str, float]:
    """Those of float64 but for rounding; nothing where there is no row; and of some tiles their own."""
    fmt = BY_NAME[name]
    rows = random_rows(fmt, N, K, 7)
    shape, data = pack(Matrix(name, fmt, N, K, rows), step)
    weight = upload(shape, N, torch.from_numpy(data))
    exact = torch.from_numpy(fmt.dequantize_rows(rows)).double()
    found = operands(weight)
    some = operands(tiles_of(weight, 1, 3))
    differing = int((some != found[64:]).sum()) + int((found[N:] != 0).sum())
    return {"error": float((found[:N] - exact).norm() / exact.norm()), "differing": differing}


if __name__ == "__main__":
    np.seterr(all="ignore")
    cases = (case.split("/") for case in sys.argv[1:])
    print(json.dumps({"/".join(case): unpacked(case[0], *map(int, case[1:])) for case in cases}))
