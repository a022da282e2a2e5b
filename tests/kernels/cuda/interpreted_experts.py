"""
Products with experts under Triton's interpreter, launched as on a GPU and compared with float64. Run in a
process of its own, which `TRITON_INTERPRET=1` must be set for before Triton is imported; see test_experts.py.

Prints a line of JSON: how far off each product is, a program a pair and sorted, and what is not in order.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

import torch

from gpu_weights import random_rows
from worker_orcd.kernels.backend import Glu, Matrix
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.expert_products import ExpertProducts, Order
from worker_orcd.kernels.cuda.expert_weights import pack_experts
from worker_orcd.kernels.cuda.variants import Tile
from worker_orcd.kernels.cuda.weights import Uploader
from worker_orcd.quant import BY_NAME


class Interpreted(Kernels):
    """Runs the plain twin of a kernel, program by program."""

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        function = getattr(
            importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}"), kernel.function
        )
        constants = dict(kernel.constants)
        if "PORTABLE" in constants:
            constants["PORTABLE"] = True
        function[grid](*arguments, **constants)


def sorted_wrongly(order: Order, experts: torch.Tensor, num_experts: int) -> int:
    """How many entries, or tiles, are not where they belong."""
    flat = experts.reshape(-1)
    wrong = int((order.entries[: len(flat)] != torch.argsort(flat, stable=True)).sum())
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    wanted, first = [], 0
    for expert, count in enumerate(counts):
        for start in range(0, count, order.width):
            wanted.append([expert, first + start, min(order.width, count - start)])
        first += count
    tiles = order.tiles[: 4 * order.num_tiles].view(-1, 4)[:, :3].tolist()
    return wrong + ([tile for tile in tiles if tile[2]] != wanted)


def sorting(pairs: int, num_experts: int, width: int) -> int:
    products = ExpertProducts(Interpreted(torch.device("cpu"), 90))
    experts = torch.randint(0, num_experts, (pairs, 1), dtype=torch.int32, generator=torch.manual_seed(pairs))
    experts[pairs // 2 :] = int(experts[0])  # one expert has many
    products._entries = torch.full((pairs,), -1, dtype=torch.int32)
    products._tiles = torch.full((4 * (pairs // 16 + num_experts),), -1, dtype=torch.int32)
    order = products.sort(experts, num_experts, width)
    assert order is not None
    return sorted_wrongly(order, experts, num_experts)


def product(
    name: str, num_experts: int, n: int, k: int, tokens: int, slots: int, *, parts: int = 1,
    glu: Glu | None = None, shared: bool = True, chunks: int = 1, bias: bool = False, rows: int = 64,
    width: int = 16, step: int = 16,
) -> dict[str, float]:  # fmt: skip
    fmt, generator = BY_NAME[name], torch.Generator().manual_seed(tokens)
    data = [random_rows(fmt, num_experts * n, k, index) for index in range(parts)]
    biases = [torch.randn(num_experts, n, generator=generator) for _ in data] if bias else []
    (weight,) = pack_experts(
        [Matrix(name, fmt, n, k, one) for one in data],
        num_experts,
        [values.numpy() for values in biases],
        Uploader(torch.device("cpu")),
    )
    shape = replace(weight.shape, chunks=chunks)
    weight = replace(weight, matrix=replace(weight.matrix, shape=shape))
    experts = torch.randint(0, num_experts, (tokens, slots), dtype=torch.int32, generator=generator)
    columns = k if shared else slots * k
    x = torch.randn(tokens, columns + 16, generator=generator).to(weight.operand)[:, :columns]

    sums = []  # of each part, (tokens, slots, n)
    for index, one in enumerate(data):
        exact = torch.from_numpy(fmt.dequantize_rows(one)).double().view(num_experts, n, k)[experts.long()]
        of_slots = x.double().view(tokens, -1, k).expand(tokens, slots, k)
        sums.append(torch.einsum("tsk,tsnk->tsn", of_slots, exact))
        sums[-1] += biases[index].double()[experts.long()] if bias else 0
    wanted = torch.stack([one.view(tokens, -1) for one in sums], dim=1).view(tokens, -1)
    if glu is not None:
        wanted = ReferenceBackend().glu(glu, *(one.view(tokens, -1) for one in sums))

    products = ExpertProducts(Interpreted(torch.device("cpu"), 90))
    products.reserve(weight, tokens, slots)
    found: dict[str, float] = {}
    split = Tile(rows=rows, tokens=16, warps=4, stages=2, split=chunks > 1)
    whole = Tile(rows=rows, tokens=step, warps=4, stages=2)
    for way, order, tile in (
        ("pairs", None, split),
        ("sorted", products.sort(experts, num_experts, width), whole),
    ):
        out = torch.full((tokens, wanted.shape[1] + 16), torch.nan)
        y = out[:, : wanted.shape[1]]
        products.linear(x, weight, experts, y, order=order, glu=glu, tile=tile)
        found[way] = float((y.double() - wanted).norm() / wanted.norm())
        found[way] += 0.0 if bool(out[:, wanted.shape[1] :].isnan().all()) else 1.0
    return found | {"counters": float(products._counters.abs().sum())}


def more_products() -> list[dict[str, float]]:
    return [
        product("MXFP4", 4, 40, 192, 2, 2, parts=2, glu=Glu.CLAMPED_SWIGLU, bias=True, chunks=3),
        product("Q8_0", 3, 72, 128, 3, 2, parts=2, glu=Glu.SWIGLU, rows=128),
        product("Q4_0", 3, 32, 128, 3, 2, parts=2, glu=Glu.GEGLU, shared=False),
        product("Q4_0", 2, 40, 128, 2, 2, parts=2, bias=True, shared=False),
        product("F16", 2, 20, 100, 20, 1, width=32, bias=True),
    ]


if __name__ == "__main__":
    results: dict[str, object] = {
        name: [product(name, 3, 72, 512, 1, 2, shared=False, chunks=2, bias=True)] for name in sys.argv[1:]
    }
    results["more"] = more_products()
    results["sort"] = [
        sorting(pairs, num_experts, width)
        for pairs, num_experts, width in ((1, 4, 16), (100, 3, 16), (300, 20, 32), (9000, 3, 128))
    ]
    print(json.dumps(results))
