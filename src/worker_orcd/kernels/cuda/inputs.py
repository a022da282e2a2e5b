"""
A step's inputs: host memory that the runner fills, and its twin on the device, for one copy a step.

In between is pinned memory, which the device copies from when it comes to the step. There are two sides of
it, used in turn, so that one step may be under way while the next is made: what the runner fills is free
again as soon as it is copied to a side. On the device one is enough: all of a step precedes all of the next.

A step is padded to its bucket: padding tokens are token 0 at position 0 and go to the null block; the rows
that are not there have no tokens and no context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_orcd.kernels.backend import BatchInputs, Counts, Limits


class HostSide:
    """Bytes that the device copies from when it comes to it, or to. Pinned if there is a GPU; zeroed."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None

    def queued(self) -> None:
        """All copies of it are on the current stream."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until the copies that were queued are done."""
        if self._copied is not None:
            self._copied.synchronize()


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes that kernels are launched with: at least as many as a step has."""

    tokens: int
    logits: int


class Staging:
    """The inputs on the host and on the device, and the copy."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self._limits = limits
        sizes = _sizes(limits)
        total = sum(sizes.values())
        self._host = torch.zeros(total, dtype=torch.int32)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._sides = [HostSide(4 * total, device) for _ in range(2)]
        self.host = _views(self._host, limits)
        self.device = _views(self._device, limits)
        self._tables = total - sizes["block_tables"]  # where they begin

    def copy(self, counts: Counts, bucket: Bucket) -> None:
        """Pad, and queue the copies on the current stream. What was filled may be filled again then."""
        host, limits = self.host, self._limits
        host.token_ids[counts.num_tokens : bucket.tokens] = 0
        host.positions[counts.num_tokens : bucket.tokens] = 0
        host.slots[:, counts.num_tokens : bucket.tokens] = 0
        host.query_start[counts.num_rows + 1 :] = counts.num_tokens
        host.context_lens[counts.num_rows :] = 0
        host.logit_tokens[counts.num_logits :] = 0
        side = self._sides[0]
        self._sides.reverse()
        side.wait()
        pinned = side.buffer.view(torch.int32)
        pinned[: self._tables] = self._host[: self._tables]
        self._device[: self._tables].copy_(pinned[: self._tables], non_blocking=True)
        rows, most = counts.num_rows, limits.max_blocks_per_row
        longest = int(host.context_lens[:rows].max()) if rows else 0
        longest += counts.num_rounds - 1
        blocks = min(-(-longest // limits.block_size), most)  # of a row; those behind them nobody reads
        staged = pinned[self._tables :].view(host.block_tables.shape)
        staged[:, :rows, :blocks] = host.block_tables[:, :rows, :blocks]
        for group in range(limits.num_groups):
            self.device.block_tables[group, :rows].copy_(staged[group, :rows], non_blocking=True)
        side.queued()


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
