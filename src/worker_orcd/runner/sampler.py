"""
Draws a token from one row of logits. Only numpy on one contiguous row, so a batch cannot change a draw.

* Penalties and bias change a copy of the row, in float32; everything after is float64.
* A token's weight is exp((logit - highest) / temperature).
* top-k keeps the k highest logits, of equal ones the lower ids: never more than k.
* top-p keeps the shortest run of tokens, in falling order of logit and then rising id, whose weight is at
  least `top_p` of the weight that top-k left; always one at least, so `top_p` 0 is the argmax.
* min-p keeps what weighs at least `min_p` times the heaviest.
* The draw inverts the cumulative weight of the kept tokens *in the order of their ids* at
  `philox.uniform(seed, position)`. A token of weight zero is never drawn.
* Log probabilities are the log softmax of the untouched row.

Nothing is sorted beyond what can be kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal, InvalidParameter
from worker_orcd.runner.philox import uniform
from worker_orcd.sequence import RowFailure, SampledToken, SamplingParams, Sequence

Logits = NDArray[np.float32]  # (vocab_size,)
TokenIds = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What the next token of a sequence is drawn with: a copy, so that the sequence may change meanwhile."""

    params: SamplingParams
    position: int  # of the new token in its sequence
    excluded: frozenset[int]  # cannot be drawn: stop tokens before `min_tokens` outputs
    token_ids: TokenIds | None  # prompt and output; None where no penalty asks for them
    num_prompt_tokens: int

    @classmethod
    def of(cls, sequence: Sequence) -> Draw:
        params = sequence.sampling
        penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        return cls(
            params=params,
            position=len(sequence.token_ids),
            excluded=frozenset() if sequence.may_stop else sequence.stop_token_ids,
            token_ids=np.array(sequence.token_ids, dtype=np.int64) if penalised else None,
            num_prompt_tokens=sequence.num_prompt_tokens,
        )


def sample(logits: Logits, draw: Draw) -> SampledToken | RowFailure:
    """The next token of one sequence. `logits` is contiguous and is not written to."""
    params = draw.params
    if any(not 0 <= token_id < len(logits) for token_id, _bias in params.logit_bias):
        return RowFailure(InvalidParameter.code, f"logit_bias names a token outside 0 … {len(logits) - 1}")
    row = adjusted(logits, draw)
    best = int(row.argmax())  # the first NaN where there is one; the lowest id on ties
    highest = float(row[best])
    if not math.isfinite(highest):
        return _failure(logits)
    token_id = best
    if params.temperature > 0.0:
        ids, weights = kept(row, highest, params)
        token_id = int(ids[_invert(weights, uniform(params.seed, draw.position))])
    if params.logprobs is None:
        return SampledToken(token_id)
    return _with_logprobs(logits, token_id, params.logprobs)


def adjusted(logits: Logits, draw: Draw) -> Logits:
    """Penalties, then logit bias, then excluded tokens: a copy where anything changes, else `logits` itself.

    Repetition (Keskar et al. 2019, as in transformers) divides positive logits and multiplies negative ones
    of tokens in prompt or output; presence and frequency (OpenAI) subtract for tokens of the output.
    """
    params = draw.params
    if draw.token_ids is None and not params.logit_bias and not draw.excluded:
        return logits
    row = logits.copy()
    if draw.token_ids is not None:
        seen = np.unique(draw.token_ids)
        values = row[seen]
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
        used, counts = np.unique(draw.token_ids[draw.num_prompt_tokens :], return_counts=True)
        row[used] -= np.float32(params.presence_penalty)
        row[used] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    for token_id, bias in params.logit_bias:
        row[token_id] += np.float32(bias)
    row[[token_id for token_id in draw.excluded if token_id < len(row)]] = -np.inf
    return row


def kept(row: Logits, highest: float, params: SamplingParams) -> tuple[TokenIds, NDArray[np.float64]]:
    """What top-k, top-p and min-p leave: token ids, rising, and their weights."""
    ids = _top_k(row, params.top_k) if 0 < params.top_k < len(row) else None
    values = (row if ids is None else row[ids]).astype(np.float64)
    weights = np.exp((values - highest) / params.temperature)
    if ids is None:
        ids = np.arange(len(row))
    if params.top_p < 1.0:
        chosen = _top_p(row[ids], weights, params.top_p)
        ids, weights = ids[chosen], weights[chosen]
    if params.min_p > 0.0:
        chosen = np.flatnonzero(weights >= params.min_p)  # the heaviest weighs 1
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def _top_k(row: Logits, k: int) -> TokenIds:
    """The ids of the k highest logits, rising; of equal logits the lower ids."""
    threshold = np.partition(row, len(row) - k)[len(row) - k]
    ids = np.flatnonzero(row >= threshold)
    if (surplus := len(ids) - k) > 0:
        ties = np.flatnonzero(row[ids] == threshold)
        ids = np.delete(ids, ties[len(ties) - surplus :])
    return ids


def _top_p(values: Logits, weights: NDArray[np.float64], top_p: float) -> TokenIds:
    """Indices, rising, of the shortest run by falling value and rising index that weighs `top_p` of all."""
    total = float(weights.sum())
    # Tokens lighter than this weigh less than (1 - top_p) of all together, so the run ends before them.
    candidates = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights) * (1.0 - 1e-9))
    order = candidates[falling(values[candidates])]
    cumulative = np.cumsum(weights[order])
    count = int(np.searchsorted(cumulative, top_p * total)) + 1
    return np.sort(order[:count])


def falling(values: Logits) -> TokenIds:
    """The indices that sort `values` falling, equal ones by rising index. No NaN."""
    bits = (values + np.float32(0)).view(np.uint32)  # adding 0 makes one zero of two
    negative = bits >> 31 != 0
    keys = np.where(negative, bits, bits ^ np.uint32(0x7FFFFFFF)).astype(np.uint64)  # the higher, the lower
    keys = np.sort(keys << np.uint64(32) | np.arange(len(values), dtype=np.uint64))  # unique keys: any sort
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _invert(weights: NDArray[np.float64], fraction: float) -> int:
    """The first index whose cumulative weight exceeds `fraction` of the total."""
    cumulative = np.cumsum(weights)
    total = float(cumulative[-1])
    index = int(np.searchsorted(cumulative, fraction * total, side="right"))
    # fraction < 1, but its product with the total may round up to the total.
    return min(index, int(np.searchsorted(cumulative, total)))


def _with_logprobs(logits: Logits, token_id: int, count: int) -> SampledToken | RowFailure:
    values = logits.astype(np.float64)
    highest = float(values[values.argmax()])
    if not math.isfinite(highest):
        return _failure(logits)
    normaliser = highest + math.log(float(np.sum(np.exp(values - highest))))
    count = min(count, len(logits))
    ids = _top_k(logits, count) if count else np.arange(0)
    ids = ids[falling(logits[ids])]
    return SampledToken(
        token_id=token_id,
        logprob=float(values[token_id] - normaliser),
        top_logprobs=tuple((int(index), float(values[index] - normaliser)) for index in ids),
    )


def _failure(logits: Logits) -> RowFailure:
    """Why no token can be drawn: the model's fault, or the request's that left none."""
    if np.isfinite(logits.max()):
        return RowFailure(
            InvalidParameter.code,
            "logit_bias and penalties leave no token with a finite logit to choose from",
        )
    return RowFailure(Internal.code, "the model computed logits that are not finite numbers")
