"""
A step's inputs: pinned host memory that the runner fills, and its twin on the device, for one copy a step.

A step is padded to its bucket: padding tokens are token 0 at position 0 and go to the null block; the rows
that are not there have no tokens and no context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_orcd.kernels.backend import BatchInputs, Counts, Limits


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes that kernels are launched with: at least as many as a step has."""

    tokens: int
    logits: int


class Staging:
    """Both sides of the inputs, and the copy."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self._limits = limits
        sizes = _sizes(limits)
        total = sum(sizes.values())
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self.host = _views(self._host, limits)
        self.device = _views(self._device, limits)
        self._tables = total - sizes["block_tables"]  # where they begin
        self._table_rows = limits.max_blocks_per_row

    def copy(self, counts: Counts, bucket: Bucket) -> None:
        """Pad, and queue the copies on the current stream. The host's side must stay until they are done."""
        host, limits = self.host, self._limits
        host.token_ids[counts.num_tokens : bucket.tokens] = 0
        host.positions[counts.num_tokens : bucket.tokens] = 0
        host.slots[:, counts.num_tokens : bucket.tokens] = 0
        host.query_start[counts.num_rows + 1 :] = counts.num_tokens
        host.context_lens[counts.num_rows :] = 0
        host.logit_tokens[counts.num_logits :] = 0
        self._device[: self._tables].copy_(self._host[: self._tables], non_blocking=True)
        used = counts.num_rows * self._table_rows
        for group in range(limits.num_groups):
            start = self._tables + group * limits.max_rows * self._table_rows
            self._device[start : start + used].copy_(self._host[start : start + used], non_blocking=True)


def _sizes(limits: Limits) -> dict[str, int]:
    """In order; each starts at a multiple of 16 bytes."""
    sizes = {
        "token_ids": limits.max_tokens,
        "positions": limits.max_tokens,
        "query_start": limits.max_rows + 1,
        "context_lens": limits.max_rows,
        "logit_tokens": limits.max_rows,
        "slots": limits.num_groups * limits.max_tokens,
        "block_tables": limits.num_groups * limits.max_rows * limits.max_blocks_per_row,
    }
    return {name: -(-size // 4) * 4 if name != "block_tables" else size for name, size in sizes.items()}


def _views(slab: torch.Tensor, limits: Limits) -> BatchInputs:
    parts: dict[str, torch.Tensor] = {}
    start = 0
    for name, size in _sizes(limits).items():
        parts[name] = slab[start : start + size]
        start += size
    groups = limits.num_groups
    slots = parts["slots"][: groups * limits.max_tokens]
    return BatchInputs(
        token_ids=parts["token_ids"][: limits.max_tokens],
        positions=parts["positions"][: limits.max_tokens],
        slots=slots.view(groups, limits.max_tokens),
        query_start=parts["query_start"][: limits.max_rows + 1],
        context_lens=parts["context_lens"][: limits.max_rows],
        block_tables=parts["block_tables"].view(groups, limits.max_rows, limits.max_blocks_per_row),
        logit_tokens=parts["logit_tokens"][: limits.max_rows],
    )
