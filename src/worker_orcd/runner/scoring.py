"""Logits of a given text at every position (teacher forcing), for perplexity and for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import ContextLengthExceeded
from worker_orcd.runner.cache_plan import GroupPlan
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step


def score(runner: ModelRunner, token_ids: SequenceABC[int], chunk: int | None = None) -> NDArray[np.float32]:
    """(len(token_ids), vocab_size): row i has the logits of token i + 1. `chunk`: tokens in a step.

    Overwrites the runner's KV cache from its first block on: not while an engine uses the runner.
    """
    parts = list(score_chunks(runner, token_ids, chunk))
    return np.concatenate(parts) if parts else np.empty((0, runner.vocab_size), np.float32)


def score_chunks(
    runner: ModelRunner, token_ids: SequenceABC[int], chunk: int | None = None, *, first: int = 0
) -> Iterator[NDArray[np.float32]]:
    """The same, a step at a time: (at most `chunk`, vocab_size), for texts whose logits fill the memory.

    The logits begin with those of row `first`; what stands before it is computed without any.
    """
    limits = runner.limits
    longest = min(limits.max_blocks_per_row * limits.block_size, runner.plan.max_model_len)
    if len(token_ids) > longest:
        raise ContextLengthExceeded(f"{len(token_ids)} tokens; at most {longest} fit")
    num_blocks = -(-len(token_ids) // limits.block_size)
    fitting = min(_largest_step(group, num_blocks, limits.block_size) for group in runner.plan.kv_groups)
    size = min(chunk or limits.max_tokens, limits.max_tokens, limits.max_rows, fitting)
    sequence = Sequence(
        id=0, token_ids=list(token_ids), max_tokens=0, stop_token_ids=frozenset(), sampling=SamplingParams()
    )
    # A windowed group may have fewer blocks than the text: they are used in turn.
    sequence.block_tables = [
        [1 + index % (group.num_blocks - 1) for index in range(num_blocks)] for group in runner.plan.kv_groups
    ]
    while (left := min(first, len(token_ids) - 1) - sequence.num_computed_tokens) > 0:
        row = Row.of(sequence, min(chunk or limits.max_tokens, limits.max_tokens, fitting, left))
        runner.launch(Step((row,))).wait()
        sequence.num_computed_tokens += row.num_tokens
    while sequence.num_uncomputed_tokens:
        row = Row.of(sequence, min(size, sequence.num_uncomputed_tokens))
        yield runner.logits(Step((row,)))
        sequence.num_computed_tokens += row.num_tokens


def _largest_step(group: GroupPlan, num_blocks: int, block_size: int) -> int:
    """How many tokens a step may compute so that what the first of them sees is not overwritten."""
    usable = group.num_blocks - 1
    if group.window is None or num_blocks <= usable:
        return num_blocks * block_size
    return (usable - 1) * block_size - group.window + 2
