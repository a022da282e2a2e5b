"""Logits of a given text at every position (teacher forcing), for perplexity and for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import ContextLengthExceeded
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step


def score(runner: ModelRunner, token_ids: SequenceABC[int], chunk: int | None = None) -> NDArray[np.float32]:
    """(len(token_ids), vocab_size): row i has the logits of token i + 1. `chunk`: tokens in a step.

    Overwrites the runner's KV cache from its first block on: not while an engine uses the runner.
    """
    parts = list(score_chunks(runner, token_ids, chunk))
    return np.concatenate(parts) if parts else np.empty((0, runner.vocab_size), np.float32)


def score_chunks(
    runner: ModelRunner, token_ids: SequenceABC[int], chunk: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """The same, a step at a time: (at most `chunk`, vocab_size), for texts whose logits fill the memory."""
    limits = runner.limits
    longest = min(limits.max_blocks_per_row * limits.block_size, runner.plan.max_model_len)
    if len(token_ids) > longest:
        raise ContextLengthExceeded(f"{len(token_ids)} tokens; at most {longest} fit")
    size = min(chunk or limits.max_tokens, limits.max_tokens, limits.max_rows)
    sequence = Sequence(
        id=0, token_ids=list(token_ids), max_tokens=0, stop_token_ids=frozenset(), sampling=SamplingParams()
    )
    sequence.block_ids = list(range(1, 1 + -(-len(token_ids) // limits.block_size)))
    while sequence.num_uncomputed_tokens:
        row = Row(sequence, min(size, sequence.num_uncomputed_tokens))
        yield runner.logits(Step((row,)))
        sequence.num_computed_tokens += row.num_tokens
