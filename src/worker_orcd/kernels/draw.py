"""What the next token of a sequence is drawn with, and why none can be: the same on every device."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from worker_orcd.errors import Internal, InvalidParameter, OutOfMemory
from worker_orcd.kernels.entries import Entries
from worker_orcd.sequence import MAX_LOGPROBS, Row, RowFailure, SamplingParams, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What the next token of a sequence is drawn with. The sequence may change meanwhile; its entries change
    when its next draw is made.
    """

    params: SamplingParams
    position: int  # of the new token in its sequence
    excluded: frozenset[int]  # cannot be drawn: stop tokens before `min_tokens` outputs
    entries: Entries | None = None  # where there are penalties or biases
    count: int = 1  # tokens to draw, at this position and those behind it
    # With penalties: how many tokens before it are in no entry, since the step before draws them and nobody
    # knows them yet; and the place of its row among those of that step that draw.
    num_unknown: int = 0
    previous: int = 0

    @property
    def num_uncounted(self) -> int:
        """Tokens that penalties of the last one to draw count and that are in no entry yet."""
        entries = self.entries
        return 0 if entries is None or not entries.counts_tokens else self.num_unknown + self.count - 1


class Draws:
    """Makes draws. A sequence's entries are kept for as long as it is."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._entries: WeakKeyDictionary[Sequence, Entries] = WeakKeyDictionary()

    def of(self, row: Row) -> Draw:
        """Of a row that samples. Raises Internal where tokens before it are neither known nor being drawn."""
        sequence, params = row.sequence, row.sequence.sampling
        excluded = frozenset[int]() if sequence.may_stop_at(row.end) else sequence.stop_token_ids
        if not params.penalises and not params.logit_bias:
            return Draw(params=params, position=row.end, excluded=excluded, count=row.num_draws)
        num_unknown = max(0, row.end - len(sequence.token_ids)) if params.penalises else 0
        if num_unknown and row.previous_draw is None:
            raise Internal(f"penalties ask for {num_unknown} tokens that no step draws")
        return Draw(
            params=params,
            position=row.end,
            excluded=excluded,
            entries=self._entries_of(sequence),
            count=row.num_draws,
            num_unknown=num_unknown,
            previous=row.previous_draw or 0,
        )

    def _entries_of(self, sequence: Sequence) -> Entries:
        entries = self._entries.get(sequence)
        if entries is None:
            entries = Entries(sequence.sampling, sequence.num_prompt_tokens, self._vocab_size)
            self._entries[sequence] = entries
        entries.take_in(sequence.token_ids)
        return entries


def bias_outside(vocab_size: int) -> RowFailure:
    return RowFailure(InvalidParameter.code, f"logit_bias names a token outside 0 … {vocab_size - 1}")


def too_many_logprobs(count: int) -> RowFailure:
    return RowFailure(InvalidParameter.code, f"logprobs is {count}; it can be at most {MAX_LOGPROBS}")


def none_left() -> RowFailure:
    """The request's fault."""
    return RowFailure(
        InvalidParameter.code, "logit_bias and penalties leave no token with a finite logit to choose from"
    )


def no_room() -> RowFailure:
    """Nobody's fault: the penalties of all rows together name more tokens than the device has room for."""
    return RowFailure(
        OutOfMemory.code, "the device has no room for the penalties of so many long requests at the same time"
    )


def no_numbers() -> RowFailure:
    """The model's fault."""
    return RowFailure(Internal.code, "the model computed logits that are not finite numbers")
