"""The vocabulary that the engine and the runner share. Standard library only."""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

MAX_LOGPROBS = 20  # of the most likely tokens that a request may ask for


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn from the logits.

    Applied in this order: repetition, presence and frequency penalties; logit bias; temperature; top-k;
    top-p; min-p; draw. `temperature` 0 is the argmax of the penalised logits, lowest id on ties.
    The draw at a position uses Philox(seed, position), so it depends on nothing but the request.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in HF and vLLM
    presence_penalty: float = 0.0  # over the output only, as OpenAI defines it
    frequency_penalty: float = 0.0  # over the output only
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # uint64
    logprobs: int | None = None  # None: none; 0: of the sampled token; n: and of the n most likely

    @property
    def penalises(self) -> bool:
        """Whether the next draw depends on the tokens before it, not on their number alone."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class FinishReason(enum.Enum):
    STOP = "stop"  # a token of `stop_token_ids` was sampled; it is the last of the output
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, eq=False, kw_only=True, weakref_slot=True)
class Sequence:
    """One token sequence being computed. Owned by the scheduler; the runner only reads it."""

    id: int
    token_ids: list[int]  # prompt, then output
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    min_tokens: int = 0  # stop tokens cannot be sampled before this many outputs
    priority: int = 0  # lower runs first
    deadline: float | None = None  # by the engine's clock
    cache_salt: bytes = b""  # prefix-cache blocks are shared only between equal salts
    arrival: int = 0  # the scheduler's count of submits: who came first
    submitted_at: float = 0.0  # likewise
    queue_seconds: float = 0.0  # from the submit to the first step that computed it
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0  # tokens whose K and V are in the cache
    num_scheduled_tokens: int = 0  # and those that steps under way compute
    num_steps_under_way: int = 0  # that have a row of it
    num_draws_under_way: int = 0  # tokens that those steps draw: they are not in `token_ids` yet
    draw_index: int = 0  # of its row among those that draw, in the step that draws the latest of them
    num_cached_tokens: int = 0  # of those, found in the prefix cache when first admitted
    num_preemptions: int = 0
    # While it runs one for each cache group, 0 for a block behind the window; while it waits none.
    block_tables: list[list[int]] = field(default_factory=list[list[int]])
    block_hashes: list[bytes] = field(default_factory=list[bytes])
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """How many tokens the next step could compute.

        A token that is being drawn counts, though nobody knows it yet, unless it is the last of the sequence.
        """
        num_draws = self.num_draws_under_way
        if num_draws and self.num_undrawn_tokens <= 0:
            return 0
        return len(self.token_ids) + num_draws - self.num_scheduled_tokens

    @property
    def num_undrawn_tokens(self) -> int:
        """How many tokens it may get that no step draws yet."""
        return self.max_tokens - self.num_output_tokens - self.num_draws_under_way

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be one of `stop_token_ids`; the sampler masks those where it may not."""
        return self.may_stop_at(len(self.token_ids))

    def may_stop_at(self, position: int) -> bool:
        """The same of the token at a position behind the prompt."""
        return position - self.num_prompt_tokens >= self.min_tokens


class Row(NamedTuple):
    """One sequence's share of a step: compute `num_tokens` tokens from `start` on, and draw from the last.

    A row of one token may draw several, one after the other: each but the last is computed, and the next is
    drawn from it, before the host hears of any.
    """

    sequence: Sequence
    num_tokens: int
    start: int  # tokens before it: computed, or about to be by the step before
    num_draws: int  # 0 where it does not reach the end of what is known
    # Its only token is not known yet: the step before, which is under way, draws it last, and this is the
    # place of its row among those of that step that draw.
    previous_draw: int | None = None

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Row:
        """The next tokens of a sequence that no step under way has."""
        num_draws = int(num_tokens == sequence.num_uncomputed_tokens)
        return cls(sequence, num_tokens, sequence.num_computed_tokens, num_draws)

    @property
    def samples(self) -> bool:
        return self.num_draws > 0

    @property
    def end(self) -> int:
        """The position of the first token that is drawn, if one is."""
        return self.start + self.num_tokens

    @property
    def num_computed(self) -> int:
        """Tokens computed by it: those that it was given, and those drawn but the last."""
        return self.num_tokens + max(0, self.num_draws - 1)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes. Prefill, a chunk of it and decode differ only in numbers."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """In its first round."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_rounds(self) -> int:
        """Forward passes: one more than tokens that a row draws and computes."""
        return max([1, *(row.num_draws for row in self.rows)])


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: float | None = None  # of the raw distribution: before penalties, bias and temperature
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first, raw


@dataclass(frozen=True, slots=True)
class RowFailure:
    """One row of a step went wrong and its neighbours did not: its sequence alone ends with an error."""

    code: str  # a `WorkerError.code`
    message: str  # for the caller: no paths, addresses or tracebacks


RowResult = SampledToken | RowFailure | None


class PendingStep(Protocol):
    def wait(self) -> SequenceABC[RowResult]:
        """An entry for each draw, row after row, and None for a row that does not draw. Raises EngineError.

        Behind a RowFailure the other entries of its row mean nothing.

        A step whose wait raised is over: the device no longer writes to its blocks.
        """
        ...


class Runner(Protocol):
    """The device side as the engine sees it. Implemented by runner.ModelRunner and by test fakes."""

    @property
    def max_steps(self) -> int:
        """How many steps may be under way: 1, or 2 if the device goes on to the next by itself."""
        ...

    @property
    def max_draws(self) -> int:
        """How many tokens a row may draw in one step."""
        ...

    def launch(self, step: Step) -> PendingStep:
        """Start a step, behind those under way. Raises EngineError, and then this step is over.

        Must not wait for the device: the engine publishes the previous step's tokens before it calls `wait`.
        A device without a queue of its own computes in `wait`. Steps are waited for in order.
        """
        ...
