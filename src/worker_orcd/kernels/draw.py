"""What the next token of a sequence is drawn with, and why none can be: the same on every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal, InvalidParameter
from worker_orcd.sequence import MAX_LOGPROBS, Row, RowFailure, SamplingParams

TokenIds = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What the next token of a sequence is drawn with: a copy, so that the sequence may change meanwhile."""

    params: SamplingParams
    position: int  # of the new token in its sequence
    excluded: frozenset[int]  # cannot be drawn: stop tokens before `min_tokens` outputs
    token_ids: TokenIds | None  # prompt and output; None where no penalty asks for them
    num_prompt_tokens: int
    count: int = 1  # tokens to draw, at this position and those behind it

    @classmethod
    def of(cls, row: Row) -> Draw:
        """Of a row that samples. Raises Internal where a penalty asks for a token that is not known yet."""
        sequence, params = row.sequence, row.sequence.sampling
        if params.penalises and (row.previous_draw is not None or row.num_draws > 1):
            raise Internal("a row with penalties was launched before its last token was known")
        return cls(
            params=params,
            position=row.end,
            excluded=frozenset() if sequence.may_stop_at(row.end) else sequence.stop_token_ids,
            token_ids=np.array(sequence.token_ids, dtype=np.int64) if params.penalises else None,
            num_prompt_tokens=sequence.num_prompt_tokens,
            count=row.num_draws,
        )


def bias_outside(vocab_size: int) -> RowFailure:
    return RowFailure(InvalidParameter.code, f"logit_bias names a token outside 0 … {vocab_size - 1}")


def too_many_logprobs(count: int) -> RowFailure:
    return RowFailure(InvalidParameter.code, f"logprobs is {count}; it can be at most {MAX_LOGPROBS}")


def none_left() -> RowFailure:
    """The request's fault."""
    return RowFailure(
        InvalidParameter.code, "logit_bias and penalties leave no token with a finite logit to choose from"
    )


def no_numbers() -> RowFailure:
    """The model's fault."""
    return RowFailure(Internal.code, "the model computed logits that are not finite numbers")
