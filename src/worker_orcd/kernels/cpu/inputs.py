"""What both CPU backends do alike: the input buffers of a step, their valid part, and joined biases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Counts, Limits, Matrix


def allocate_cpu_inputs(limits: Limits) -> BatchInputs:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return BatchInputs(
        token_ids=zeros(limits.max_tokens),
        positions=zeros(limits.max_tokens),
        slots=zeros(limits.num_groups, limits.max_tokens),
        query_start=zeros(limits.max_rows + 1),
        context_lens=zeros(limits.max_rows),
        block_tables=zeros(limits.num_groups, limits.max_rows, limits.max_blocks_per_row),
        logit_tokens=zeros(limits.max_rows),
    )


def valid_inputs(inputs: BatchInputs, counts: Counts) -> BatchInputs:
    """Views of the entries that a step uses."""
    tokens, rows = counts.num_tokens, counts.num_rows
    return BatchInputs(
        token_ids=inputs.token_ids[:tokens],
        positions=inputs.positions[:tokens],
        slots=inputs.slots[:, :tokens],
        query_start=inputs.query_start[: rows + 1],
        context_lens=inputs.context_lens[:rows],
        block_tables=inputs.block_tables[:, :rows],
        logit_tokens=inputs.logit_tokens[: counts.num_logits],
    )


def check_counts(counts: Counts, limits: Limits) -> None:
    """Raises Internal when a step is empty or larger than the buffers it came in."""
    for found, allowed, what in (
        (counts.num_tokens, limits.max_tokens, "tokens"),
        (counts.num_rows, limits.max_rows, "rows"),
        (counts.num_logits, limits.max_rows, "logits"),
    ):
        if not 0 <= found <= allowed:
            raise Internal(f"a step of {found} {what} does not fit buffers for {allowed}")
    if counts.num_tokens == 0 or counts.num_rows == 0:
        raise Internal("a step needs at least one token and one row")


def join_bias(parts: Sequence[Matrix], bias: Sequence[NDArray[np.float32] | None]) -> torch.Tensor | None:
    """The biases of all parts as one (sum of n,) vector, zero where a part has none; None when none has."""
    if all(values is None for values in bias):
        return None
    if len(bias) != len(parts):
        raise Internal(f"{len(bias)} biases for {len(parts)} matrices")
    joined = [
        np.zeros(part.n, dtype=np.float32) if values is None else np.asarray(values, dtype=np.float32)
        for part, values in zip(parts, bias, strict=True)
    ]
    return torch.as_tensor(np.concatenate(joined))
