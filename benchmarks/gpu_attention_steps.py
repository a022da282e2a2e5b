"""Steps to try attention with: rows at random places of a paged cache, parts of them, and what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.attend import Attention
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE, LARGEST_FP8


def bucket(tokens: int) -> int:
    """What a step is padded to: more than its queries."""
    found = 16
    while found <= tokens:
        found *= 4
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """Queries of some rows, and the cache that they see."""

    params: AttentionParams
    rows: list[tuple[int, int]]  # of each: tokens before its first query, queries
    tables: list[list[int]]  # of each: its blocks
    q: torch.Tensor  # (queries of all rows, num_heads * head_dim)
    cache: LayerCache  # float16, or float8 as `to_fp8` makes it
    sinks: torch.Tensor  # (num_heads,)

    @property
    def block_size(self) -> int:
        return self.cache.tensor.shape[3]

    @property
    def limits(self) -> Limits:
        """With room for two rows more."""
        return Limits(
            max_tokens=bucket(len(self.q)), max_rows=len(self.rows) + 2,
            max_blocks_per_row=max(map(len, self.tables)), block_size=self.block_size,
        )  # fmt: skip

    def inputs(self, limits: Limits) -> BatchInputs:
        device = self.q.device
        rows = limits.max_rows
        tables = torch.zeros(1, rows, limits.max_blocks_per_row, dtype=torch.int32)
        starts, contexts = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        for row, ((before, count), table) in enumerate(zip(self.rows, self.tables, strict=True)):
            tables[0, row, : len(table)] = torch.tensor(table)
            if self.params.window is not None:  # what no query sees any more is the null block
                tables[0, row, : max(0, before - self.params.window + 1) // self.block_size] = 0
            starts[row + 1 :] = starts[row] + count
            contexts[row] = before + count
        nothing = torch.zeros(0, dtype=torch.int32)
        return BatchInputs(
            token_ids=nothing, positions=nothing, slots=nothing, logit_tokens=nothing,
            query_start=starts.to(device), context_lens=contexts.to(device), block_tables=tables.to(device),
        )  # fmt: skip

    def part(self, chosen: Sequence[tuple[int, int, int]]) -> Step:
        """The step of some rows, of each: which one, its first query, how many."""
        starts = self.starts()
        queries = [self.q[starts[row] + first :][:count] for row, first, count in chosen]
        return Step(
            params=self.params,
            rows=[(self.rows[row][0] + first, count) for row, first, count in chosen],
            tables=[self.tables[row] for row, _, _ in chosen],
            q=torch.cat(queries),
            cache=self.cache,
            sinks=self.sinks,
        )

    def starts(self) -> list[int]:
        """Of each row: its first query. One more: how many there are."""
        found = [0]
        for _, count in self.rows:
            found.append(found[-1] + count)
        return found

    def run(self, attention: Attention, limits: Limits, *, sinks: bool) -> torch.Tensor:
        """Plans, and the layer. Padding is NaN, and so is what nothing is written to."""
        inputs, tokens = self.inputs(limits), bucket(len(self.q))
        q = torch.full((tokens, self.q.shape[1]), torch.nan, dtype=self.q.dtype, device=self.q.device)
        q[: len(self.q)] = self.q
        for plan in attention.plans(inputs, tokens):
            plan()
        out = torch.full(q.shape, torch.nan, device=q.device)
        return attention.run(q, self.cache, inputs, out, self.params, self.sinks if sinks else None)


def to_fp8(keys_values: torch.Tensor) -> torch.Tensor:
    """(2, …) as it is stored in a float8 cache."""
    scaled = torch.stack((keys_values[0] * KEY_SCALE, keys_values[1]))
    return scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8)


def wide(cache: torch.Tensor, blocks: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Blocks of a cache, float64: what its numbers stand for."""
    if cache.dtype != FP8:
        return cache[:, blocks].double()
    found = cache.view(torch.uint8)[:, blocks].view(FP8).double()
    found[0] /= KEY_SCALE
    return found


def random_step(
    params: AttentionParams,
    rows: list[tuple[int, int]],
    device: torch.device,
    *,
    block_size: int = 16,
    fp8: bool = False,
) -> Step:
    """`rows`: how many tokens each row has in the cache already, and how many queries.

    The null block and what is behind a row's last token are NaN: nothing of them may be computed with.
    """
    generator = torch.Generator(device).manual_seed(len(rows) + params.head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    blocks = [-(-(before + count) // block_size) for before, count in rows]
    order = (1 + torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1))).tolist()
    tables: list[list[int]] = []
    for count in blocks:
        tables.append(order[:count])
        order = order[count:]
    q = random(sum(count for _, count in rows), params.num_heads * params.head_dim).half()
    keys_values = random(2, 1 + sum(blocks), params.num_kv_heads, block_size, params.head_dim)
    keys_values[:, 0] = torch.nan
    for (before, count), table in zip(rows, tables, strict=True):
        if (used := (before + count) % block_size) != 0:
            keys_values[:, table[-1], :, used:] = torch.nan
    return Step(
        params=params,
        rows=rows,
        tables=tables,
        q=q,
        cache=LayerCache(to_fp8(keys_values) if fp8 else keys_values.half()),
        sinks=random(params.num_heads),
    )


def exact(step: Step, *, sinks: bool) -> torch.Tensor:
    """(queries, num_heads * head_dim) float64."""
    params, starts = step.params, step.starts()
    out: list[torch.Tensor] = []
    for row, (before, count) in enumerate(step.rows):
        if count == 0:
            continue
        blocks = torch.tensor(step.tables[row], device=step.q.device)
        k, v = (side.transpose(1, 2).flatten(0, 1) for side in wide(step.cache.tensor, blocks))
        k, v = k[: before + count], v[: before + count]
        q = step.q[starts[row] : starts[row + 1]].double()
        heads = q.view(count, params.num_kv_heads, -1, params.head_dim)
        scores = torch.einsum("qhgd,khd->hgqk", heads, k) * params.scale
        key = torch.arange(before + count, device=step.q.device)
        position = before + torch.arange(count, device=step.q.device)[:, None]
        seen = key <= position
        if params.window is not None:
            seen &= key > position - params.window
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks:
            own = step.sinks.double().view(params.num_kv_heads, -1, 1, 1)
            scores = torch.cat((scores, own.expand(*scores.shape[:3], 1)), dim=3)
        weights = scores.softmax(dim=3)[..., : before + count]
        out.append(torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1))
    return torch.cat(out)


def head_params(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionParams:
    return AttentionParams(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, window=window
    )
