"""
Attention on a GPU, compared with float64: mixed rows, split rows, windows, sinks, every kind of head.

    python benchmarks/gpu_attention.py

Prints a line a case: how far off it is, whether every counter is zero again, and whether what is no query of
a row was left alone. Exits with 1 if a case is wrong. `gpu_model.py` compares bits.
"""

from __future__ import annotations

import sys

import torch

from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.attend import Attention
from worker_orcd.kernels.cuda.compiler import Kernels

BLOCK_SIZE = 16


def exact(
    q: torch.Tensor, cache: torch.Tensor, table: list[int], start: int, params: AttentionParams,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """(tokens, num_heads * head_dim) float64 of one row whose first query is at `start`."""
    blocks = torch.tensor(table, device="cuda")
    k, v = (side[blocks].transpose(1, 2).flatten(0, 1).double() for side in cache)
    out = []
    for index, one in enumerate(q):
        position = start + index
        first = 0 if params.window is None else max(0, position - params.window + 1)
        heads = one.double().view(params.num_kv_heads, -1, params.head_dim)
        scores = torch.einsum("hgd,khd->hgk", heads, k[first : position + 1]) * params.scale
        if sinks is not None:
            scores = torch.cat((scores, sinks.double().view(params.num_kv_heads, -1, 1)), dim=2)
        weights = scores.softmax(dim=2)[..., : position + 1 - first]
        out.append(torch.einsum("hgk,khd->hgd", weights, v[first : position + 1]).flatten())
    return torch.stack(out)


def case(params: AttentionParams, rows: list[tuple[int, int]], *, sinks: bool = False) -> dict[str, float]:
    """`rows`: how many tokens each row has in the cache already, and how many queries."""
    generator = torch.Generator("cuda").manual_seed(len(rows) + params.head_dim)
    tokens = sum(count for _, count in rows)
    blocks = [-(-(before + count) // BLOCK_SIZE) for before, count in rows]
    limits = Limits(
        max_tokens=tokens + 3, max_rows=len(rows) + 2, max_blocks_per_row=max(blocks), block_size=BLOCK_SIZE
    )
    shape = 2, 1 + sum(blocks), params.num_kv_heads, BLOCK_SIZE, params.head_dim
    cache = torch.randn(shape, generator=generator, device="cuda").half()
    tables = torch.zeros(1, limits.max_rows, limits.max_blocks_per_row, dtype=torch.int32)
    order = (1 + torch.randperm(sum(blocks))).tolist()
    own: list[list[int]] = []
    for row, count in enumerate(blocks):
        own.append(order[:count])
        order = order[count:]
        tables[0, row, :count] = torch.tensor(own[-1])
    starts, contexts = [0], []
    for before, count in rows:
        starts.append(starts[-1] + count)
        contexts.append(before + count)
    starts += [tokens] * 2
    nothing = torch.zeros(0, dtype=torch.int32)
    inputs = BatchInputs(
        token_ids=nothing, positions=nothing, slots=nothing, logit_tokens=nothing,
        query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor([*contexts, 0, 0], dtype=torch.int32, device="cuda"),
        block_tables=tables.cuda(),
    )  # fmt: skip
    layer = LayerCache(cache)
    own_sinks = torch.randn(params.num_heads, generator=generator, device="cuda") if sinks else None
    q = torch.randn(tokens + 3, params.num_heads * params.head_dim, generator=generator, device="cuda").half()
    out = torch.full(q.shape, torch.nan, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    run = Attention(Kernels(torch.device("cuda"), 10 * major + minor), limits)
    run.reserve(params)
    for plan in run.plans(inputs, len(q)):
        plan()
    run.run(q, layer, inputs, out, params, own_sinks)
    wanted = torch.cat(
        [
            exact(q[first : first + count], cache, own[row], before, params, own_sinks)
            for row, ((before, count), first) in enumerate(zip(rows, starts, strict=False))
        ]
    )
    error = float((out[:tokens].double() - wanted).norm() / wanted.norm())
    untouched = bool(out[tokens:].isnan().all())
    return {"error": error, "counters": int(run._counters.abs().sum()), "untouched": untouched}


def params(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionParams:
    return AttentionParams(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, window=window
    )


MIXED = [(0, 70), (200, 1), (5, 3), (0, 1), (300, 9)]
CASES = {
    "mixed rows": lambda: case(params(6, 2, 16), MIXED),
    "one long row": lambda: case(params(2, 1, 32), [(5000, 1)]),
    "a very long row": lambda: case(params(8, 2, 64), [(60000, 1)]),
    "a long prompt": lambda: case(params(14, 2, 64), [(0, 1500)]),
    "a chunk of a prompt": lambda: case(params(32, 8, 128), [(700, 300), (20, 1)]),
    "two pieces of a head": lambda: case(params(32, 32, 96), [(150, 2), (0, 400), (900, 1)]),
    "wide heads": lambda: case(params(4, 1, 256), [(100, 1), (0, 300)]),
    "heads of 80": lambda: case(params(4, 4, 80), [(100, 1), (0, 30)]),
    "window and sinks": lambda: case(params(64, 8, 64, 128), MIXED, sinks=True),
    "a long window": lambda: case(params(2, 1, 16, 400), [(900, 1), (0, 600)]),
    "more units than programs": lambda: case(params(64, 8, 64), [(0, 256)]),
    "many rows": lambda: case(params(14, 2, 64), [(index * 7, 1) for index in range(200)]),
}

if __name__ == "__main__":
    wrong = 0
    for name, run in CASES.items():
        found = run()
        ok = 0 < found["error"] < 1e-3 and not found["counters"] and bool(found["untouched"])
        wrong += not ok
        print(f"{name:24} {found} {'' if ok else '<-- WRONG'}", flush=True)
    print(f"{wrong} of {len(CASES)} wrong")
    sys.exit(bool(wrong))
