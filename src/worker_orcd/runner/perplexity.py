"""How well a model predicts a text: log-probabilities of its tokens, and their perplexity.

As llama.cpp measures it, so that figures can be compared: the text's tokens are cut into windows of equal
length, each is computed from an empty cache, and in each the tokens of the second half are scored, which have
at least half a window before them. A model that starts texts with BOS has it in place of each window's
first token. What is left over at the end is not used. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.scoring import score_chunks

_ROWS = 16  # of logits that are in memory as float64 at a time
MIN_CONTEXT = 4  # the shortest window with a scored token


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Over `num_tokens` scored tokens; errors are standard errors, as if tokens were independent."""

    num_tokens: int
    mean_nll: float  # negative log-likelihood of a token, in nats
    mean_nll_error: float
    value: float  # exp(mean_nll)
    error: float


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, vocab_size) -> (n, vocab_size)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_logprobs(logits: NDArray[np.float32], targets: SequenceABC[int]) -> NDArray[np.float64]:
    """The log-probability of each target: (n, vocab_size) -> (n,)."""
    found = np.empty(len(logits), np.float64)
    ids = np.asarray(targets, np.int64)
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        rows = log_softmax(logits[part])
        found[part] = rows[np.arange(len(rows)), ids[part]]
    return found


def windows(
    token_ids: SequenceABC[int], context: int, bos_id: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """(window, first): `context` tokens each; scored are those after position `first`.

    `bos_id`: what each begins with instead of its first token. Raises ValueError for too short a context.
    """
    if context < MIN_CONTEXT:
        raise ValueError(f"a window of {context} tokens has none to score; needs {MIN_CONTEXT}")
    for start in range(0, len(token_ids) - context + 1, context):
        window = list(token_ids[start : start + context])
        if bos_id is not None:
            window[0] = bos_id
        yield window, context // 2


def window_logits(runner: ModelRunner, window: SequenceABC[int], first: int) -> Iterator[NDArray[np.float32]]:
    """Row by row what predicts the tokens after `first`: (len(window) - 1 - first, vocab_size) in parts."""
    yield from score_chunks(runner, window[:-1], first=first)


def score_text(
    runner: ModelRunner, token_ids: SequenceABC[int], context: int, bos_id: int | None = None
) -> Iterator[NDArray[np.float64]]:
    """The log-probabilities of the scored tokens, a window at a time: (context - context // 2 - 1,).

    Overwrites the runner's KV cache: not while an engine uses the runner. Raises ContextLengthExceeded.
    """
    for window, first in windows(token_ids, context, bos_id):
        found: list[NDArray[np.float64]] = []
        position = first + 1
        for logits in window_logits(runner, window, first):
            found.append(token_logprobs(logits, window[position : position + len(logits)]))
            position += len(logits)
        yield np.concatenate(found)


def perplexity(logprobs: NDArray[np.float64]) -> Perplexity:
    """Of scored tokens, (n,). Raises ValueError for none."""
    count = len(logprobs)
    if not count:
        raise ValueError("no token was scored")
    mean = -float(np.mean(logprobs))
    error = float(np.std(logprobs, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(num_tokens=count, mean_nll=mean, mean_nll_error=error, value=value, error=value * error)
