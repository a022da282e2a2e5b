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

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.draw import Draw, bias_outside, no_numbers, none_left
from worker_orcd.kernels.entries import SEEN
from worker_orcd.runner.philox import uniform
from worker_orcd.sequence import RowFailure, SampledToken, SamplingParams

Logits = NDArray[np.float32]  # (vocab_size,)
TokenIds = NDArray[np.int64]

_BIN_BITS = 12  # top-p: similar values share a bin
_RUN = 512  # weights in a run of `invert`


class Sampler:
    """Draws tokens, one row at a time. Owns scratch memory of a few rows; used by one thread."""

    def __init__(self, vocab_size: int) -> None:
        # Fresh arrays of this size are fresh pages each time, which costs more than the arithmetic.
        self._row = np.empty(vocab_size, np.float32)
        self._weights = np.empty(vocab_size, np.float64)
        self._normalised = np.empty(vocab_size, np.float32)
        self._ranks = np.empty(vocab_size, np.int32)
        self._bins = np.empty(vocab_size, np.int64)

    def sample(self, logits: Logits, draw: Draw) -> SampledToken | RowFailure:
        """The next token of one sequence. `logits` is (vocab_size,), contiguous, and is not written to.

        Raises Internal where a penalty asks for a token that is not known.
        """
        if draw.num_uncounted:
            raise Internal(f"penalties ask for {draw.num_uncounted} tokens that are not known")
        if any(not 0 <= token_id < len(logits) for token_id, _bias in draw.params.logit_bias):
            return bias_outside(len(logits))
        with np.errstate(all="ignore"):  # infinities and NaN are looked for below
            return self._sample(logits, draw)

    def _sample(self, logits: Logits, draw: Draw) -> SampledToken | RowFailure:
        params = draw.params
        row = self.adjusted(logits, draw)
        token_id = int(row.argmax())  # the first NaN where there is one; the lowest id on ties
        highest = float(row[token_id])
        if not math.isfinite(highest):
            return _failure(logits)
        if params.temperature > 0.0:
            ids, weights = self.kept(row, highest, params)
            index = invert(weights, uniform(params.seed, draw.position))
            token_id = index if ids is None else int(ids[index])
        if params.logprobs is None:
            return SampledToken(token_id)
        return self._with_logprobs(logits, token_id, params.logprobs)

    def adjusted(self, logits: Logits, draw: Draw) -> Logits:
        """Penalties, then logit bias, then excluded tokens: scratch where anything changes, else `logits`.

        Repetition (Keskar et al. 2019, as in transformers) divides positive logits and multiplies negative
        ones of tokens in prompt or output; presence and frequency (OpenAI) subtract for tokens of the output.
        """
        params = draw.params
        if draw.entries is None and not draw.excluded:
            return logits
        row = self._row
        row[:] = logits
        if draw.entries is not None and params.penalises:
            records = draw.entries.records
            seen = records[(records["flags"] & SEEN) != 0]
            ids, values = seen["id"], row[seen["id"]]
            penalty = np.float32(params.repetition_penalty)
            row[ids] = np.where(values > 0, values / penalty, values * penalty)
            used = seen[seen["count"] > 0]
            row[used["id"]] -= np.float32(params.presence_penalty)
            row[used["id"]] -= np.float32(params.frequency_penalty) * used["count"].astype(np.float32)
        for token_id, bias in params.logit_bias:
            row[token_id] += np.float32(bias)
        row[[token_id for token_id in draw.excluded if 0 <= token_id < len(row)]] = -np.inf
        return row

    def kept(
        self, row: Logits, highest: float, params: SamplingParams
    ) -> tuple[TokenIds | None, NDArray[np.float64]]:
        """What top-k, top-p and min-p leave: token ids, rising (None: all), and their weights (scratch)."""
        ids = _top_k(row, params.top_k) if 0 < params.top_k < len(row) else None
        values = row if ids is None else row[ids]
        weights = self._exponentials(values, highest, params.temperature)
        chosen: NDArray[np.bool_] | None = None
        if params.top_p < 1.0:
            chosen = self._top_p(values, weights, params.top_p)
        if params.min_p > 0.0:
            heavy = weights >= params.min_p  # the heaviest weighs 1
            chosen = heavy if chosen is None else chosen & heavy
        if chosen is None:
            return ids, weights
        indices = np.flatnonzero(chosen)
        return (indices if ids is None else ids[indices]), weights[indices]

    def _exponentials(self, values: Logits, highest: float, temperature: float) -> NDArray[np.float64]:
        """exp((value - highest) / temperature), in scratch."""
        weights = self._weights[: len(values)]
        np.subtract(values, highest, out=weights, dtype=np.float64)
        np.divide(weights, temperature, out=weights)
        return np.exp(weights, out=weights)

    def _top_p(self, values: Logits, weights: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
        """Which belong to the shortest run, by falling value and rising index, that weighs `top_p` of all.

        Weights are added up in bins of similar values; only the bin in which the run ends is sorted.
        """
        bins = self._similar(values)
        cumulative = np.cumsum(np.bincount(bins, weights, minlength=1 << _BIN_BITS))
        target = top_p * float(cumulative[-1])
        last = max(int(np.searchsorted(cumulative, target)), int(bins.min()))
        before = float(cumulative[last - 1]) if last else 0.0
        members = np.flatnonzero(bins == last)
        members = members[falling(values[members])]
        count = int(np.searchsorted(before + np.cumsum(weights[members]), target)) + 1
        chosen = bins < last
        chosen[members[:count]] = True
        return chosen

    def _similar(self, values: Logits) -> NDArray[np.int64]:
        """A bin for each value, the lower the higher: sign, exponent and three bits of the fraction."""
        n = len(values)
        np.add(values, np.float32(0), out=self._normalised[:n])  # makes one zero of two
        bits = self._normalised[:n].view(np.int32)
        ranks = np.right_shift(bits, 31, out=self._ranks[:n])  # -1 where negative
        np.bitwise_xor(bits, ~ranks & 0x7FFFFFFF, out=ranks)
        self._bins[:n] = ranks.view(np.uint32) >> np.uint32(32 - _BIN_BITS)
        return self._bins[:n]

    def _with_logprobs(self, logits: Logits, token_id: int, count: int) -> SampledToken | RowFailure:
        highest = float(logits[logits.argmax()])
        if not math.isfinite(highest):
            return _failure(logits)
        normaliser = highest + math.log(float(np.sum(self._exponentials(logits, highest, 1.0))))
        ids = _top_k(logits, min(count, len(logits))) if count else np.arange(0)
        ids = ids[falling(logits[ids])]
        return SampledToken(
            token_id=token_id,
            logprob=float(logits[token_id]) - normaliser,
            top_logprobs=tuple((int(index), float(logits[index]) - normaliser) for index in ids),
        )


def _top_k(row: Logits, k: int) -> TokenIds:
    """The ids of the k highest logits, rising; of equal logits the lower ids."""
    threshold = np.partition(row, len(row) - k)[len(row) - k]
    ids = np.flatnonzero(row >= threshold)
    if (surplus := len(ids) - k) > 0:
        ties = np.flatnonzero(row[ids] == threshold)
        ids = np.delete(ids, ties[len(ties) - surplus :])
    return ids


def falling(values: Logits) -> TokenIds:
    """The indices that sort `values` falling, equal ones by rising index. No NaN."""
    bits = (values + np.float32(0)).view(np.int32)  # adding 0 makes one zero of two
    ranks = (bits ^ (~(bits >> 31) & 0x7FFFFFFF)).view(np.uint32)  # the lower, the higher the value
    keys = ranks.astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    return (np.sort(keys) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def invert(weights: NDArray[np.float64], fraction: float) -> int:
    """The first index whose cumulative weight exceeds `fraction` (in [0, 1)) of the total.

    In two levels: first among the sums of runs of `_RUN` weights, then within a run. What rounding pushes
    beyond an end stays at the last index before it that weighs anything.
    """
    runs = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _RUN)))
    target = fraction * float(runs[-1])
    run = _first_above(runs, target)
    before = float(runs[run - 1]) if run else 0.0
    return run * _RUN + _first_above(before + np.cumsum(weights[run * _RUN : (run + 1) * _RUN]), target)


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    index = int(np.searchsorted(cumulative, target, side="right"))
    return min(index, int(np.searchsorted(cumulative, float(cumulative[-1]))))


def _failure(logits: Logits) -> RowFailure:
    """Why no token can be drawn: the model's fault, or the request's that left none."""
    return none_left() if np.isfinite(logits.max()) else no_numbers()
