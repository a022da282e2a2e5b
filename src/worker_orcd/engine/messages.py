"""What crosses the seam between the server and the engine. Plain data: it could cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker_orcd.sequence import FinishReason, SampledToken, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Compute this prompt. `id` is the client's and must not be in use."""

    id: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    min_tokens: int = 0
    priority: int = 0  # lower runs first
    deadline: float | None = None  # by the engine's clock
    cache_salt: bytes = b""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget this sequence and free its blocks. Unknown and finished ids are ignored."""

    id: int


Command = Submit | Cancel


@dataclass(frozen=True, slots=True)
class Output:
    """News of one sequence. Exactly one output of a sequence has a `finish_reason`; it is the last.

    A cancelled sequence gets its last output too (CANCELLED), a sequence whose deadline passed gets DEADLINE
    with no tokens, and one lost to a fault gets ERROR with `error_code` and `error` set.
    """

    id: int
    tokens: tuple[SampledToken, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error_code: str | None = None  # a `WorkerError.code`
    error: str | None = None  # for the caller: no paths, addresses or tracebacks
    queue_seconds: float = 0.0  # from Submit to the first step that computed the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBlocks:
    """The KV blocks of one cache group: the layers that see everything, or those of one sliding window."""

    window: int | None  # tokens
    free: int  # held by no sequence
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one step did, for metrics. Counters are of this step, gauges are as it ended."""

    seconds: float  # since it was begun, or since the step before it was over if that was later
    num_rows: int
    num_tokens: int  # of all rounds
    num_prompt_tokens: int  # of num_tokens, those before a sequence's first output
    num_sampled: int
    num_preempted: int
    prefix_query_tokens: int  # prompt tokens looked up in the prefix cache by sequences admitted in this step
    prefix_hit_tokens: int
    num_running: int
    num_waiting: int
    kv_groups: tuple[GroupBlocks, ...]
    ahead: bool = False  # launched while the step before was under way
    num_rounds: int = 1  # forward passes: tokens that a row may have drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """The engine's counts as the last step left them: what other threads may look at."""

    num_running: int = 0
    num_waiting: int = 0
    kv_groups: tuple[GroupBlocks, ...] = ()
    failed: bool = False  # a fault ended the engine: every later submit gets an ERROR output

    @property
    def kv_blocks_free(self) -> int:
        return sum(group.free for group in self.kv_groups)

    @property
    def kv_blocks_total(self) -> int:
        return sum(group.total for group in self.kv_groups)


class StepObserver(Protocol):
    """Told of every step, on the engine thread. Must not block or raise."""

    def on_step(self, stats: StepStats) -> None: ...


class NullObserver:
    def on_step(self, stats: StepStats) -> None: ...
