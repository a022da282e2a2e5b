"""
Decides what each step computes. Pure: the same calls give the same steps, and time is passed in.

Who goes first. Sequences are ranked by (priority, arrival). A step has one token budget, spent in this order:

1. Sequences that need one token (they decode), best rank first. They go before everything else, so a running
   decode waits for one step, never for a prompt.
2. Admitted sequences that need more (a prompt, or a resume after preemption), best rank first. One that can
   be finished in this step is. One that cannot takes half of what is left if others are behind it, so that a
   short prompt need not wait for a long one, nor a long one for an endless row of short ones.
3. Waiting sequences, best rank first, while seats (`max_num_seqs`) and blocks last.
4. What nobody took goes to the unfinished rows of 2 and 3.

Blocks come from one pool for each cache group (`block_tables`), and what follows holds for each. A sequence
is admitted when there are blocks for all its known tokens, or, in a windowed group, for as many as a token
sees; so only decoding asks for more, and prompts longer than a window, chunk by chunk. Unless it is alone, it
leaves one spare block for each running sequence, or it would soon be preempted again. A chunk is cut to the
blocks that are free. Where there is none for a single token, the running sequence of worst rank is preempted:
its blocks are freed, it waits at its old rank and is computed again (often found again in the prefix cache).
A waiting sequence may preempt running ones of a strictly higher priority number for blocks, but not for a
seat.

Nothing starves within a priority. Nobody is admitted past a better rank. The running sequence of best rank is
never preempted for another, and it alone always fits into the pools, because `submit` refuses what does not.
The decodes before it in the budget are finitely many and each ends after `max_tokens`; then it gets at least
half of the budget, or as much of it as it has blocks for, and at least a token. So it finishes, the next
becomes the best, and by induction all do. Between priorities the order is strict: a lower class waits for as
long as a better one keeps the worker full.

In flight. Between `schedule` and `update` (or `fail`) the device may write to the blocks of the step's rows.
A sequence that ends in between is reported at once, and its blocks are freed when the last step under way
that has it is over. Blocks are published to the prefix cache only by `update`, so nobody can hit a block that
is not computed yet.

Ahead. A second step may be scheduled while one is under way, and is updated after it. It goes on where the
first will end: a sequence that the first draws a token for has a row of that token, whose id nobody knows
yet. The number of tokens is known, so nobody gets a row beyond `max_tokens`; whoever turns out to have ended
in the first step has a row in the second for nothing, and its result is ignored. The device knows what it has
drawn, and counts those tokens where penalties ask for them. Where somebody would have to be preempted,
`schedule` gives None, and a step when the first is over: a running sequence lacks a block for its next token;
one that waits may preempt. So everybody who runs has the blocks that it needs, the ranks decide as above, and
nothing starves.

Rounds. In a step of decodes alone each row may draw several tokens, as many as the caller allows, where there
are blocks for them, which tokens may be drawn does not change meanwhile, and nobody who waits could get the
seat of one who reaches `max_tokens` meanwhile. What a row draws behind a stop token is thrown away.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Sequence as SequenceABC

from worker_orcd.config import EngineConfig
from worker_orcd.engine.block_tables import BlockTables, CacheGroup, Prefix
from worker_orcd.engine.blocks import hash_block, hash_salt
from worker_orcd.engine.messages import EngineSnapshot, Output, StepStats, Submit
from worker_orcd.engine.step_plan import StepPlan, max_draws_of, start
from worker_orcd.errors import ContextLengthExceeded, Internal, InvalidParameter
from worker_orcd.sequence import FinishReason, Row, RowFailure, RowResult, SampledToken, Sequence, Step

MAX_STEPS = 2  # under way
_MAX_TOKEN_ID = 2**31 - 1
_LOST = RowFailure(Internal.code, "the runner lost track of a sequence")


def _rank(sequence: Sequence) -> tuple[int, int]:
    return (sequence.priority, sequence.arrival)


class Scheduler:
    """Owns every live sequence and the block tables; on the engine's thread.

    Invariants: `waiting` and `running` are sorted by rank; a running sequence holds blocks for every computed
    token that later ones see, a waiting one holds none and is in no step under way; each sequence gets
    exactly one output with a finish reason, its last.
    """

    def __init__(self, config: EngineConfig, groups: SequenceABC[CacheGroup]) -> None:
        """`groups`: in the order of the model's `cache_groups`."""
        self._config = config
        self._tables = BlockTables(groups, config.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._sequences: dict[int, Sequence] = {}
        self._deadlines: list[
            tuple[float, int, int]
        ] = []  # a heap of (deadline, arrival, id); some have ended
        self._num_arrivals = 0
        self._in_flight: deque[tuple[Step, StepPlan]] = deque()  # the oldest first
        self._updated = StepPlan(0)  # of the step that was updated, or failed, last
        capacity = self._tables.max_len
        self.max_len = min(config.max_model_len or capacity, capacity)

    # -- commands ------------------------------------------------------------------------------------------

    def submit(self, command: Submit, now: float) -> list[Output]:
        """Queue a sequence. One that can never run is refused by an ERROR output.

        Raises Internal if the id is in use: that is the client's fault, and the other sequence goes on.
        """
        if command.id in self._sequences:
            raise Internal(f"sequence id {command.id} is in use")
        if (refusal := self._refuse(command)) is not None:
            return [refusal]
        sequence = Sequence(
            id=command.id,
            token_ids=list(command.prompt_token_ids),
            max_tokens=command.max_tokens,
            stop_token_ids=command.stop_token_ids,
            sampling=command.sampling,
            min_tokens=command.min_tokens,
            priority=command.priority,
            deadline=command.deadline,
            cache_salt=command.cache_salt,
            arrival=self._num_arrivals,
            submitted_at=now,
        )
        self._num_arrivals += 1
        self._sequences[sequence.id] = sequence
        insort(self.waiting, sequence, key=_rank)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence.id))
        self._extend_hashes(sequence, len(sequence.token_ids))
        return []

    def cancel(self, sequence_id: int) -> list[Output]:
        """End a sequence, whatever it is doing. Unknown and finished ids are ignored."""
        if (sequence := self._sequences.get(sequence_id)) is None:
            return []
        return [self._finish(sequence, FinishReason.CANCELLED)]

    def expire(self, now: float) -> list[Output]:
        """End the sequences whose deadline has come."""
        outputs: list[Output] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _deadline, arrival, sequence_id = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and sequence.arrival == arrival:
                outputs.append(self._finish(sequence, FinishReason.DEADLINE))
        return outputs

    def end_all(
        self, reason: FinishReason, code: str | None = None, error: str | None = None
    ) -> list[Output]:
        """End every live sequence for one reason, best rank first."""
        return [
            self._finish(sequence, reason, code=code, error=error) for sequence in self.running + self.waiting
        ]

    @property
    def is_idle(self) -> bool:
        return not self._sequences

    # -- steps ---------------------------------------------------------------------------------------------

    def schedule(self, now: float, max_draws: int = 1) -> Step | None:
        """The next step. None if there is nothing to compute, or not before the step under way is over.

        A row draws at most `max_draws` tokens. At most `MAX_STEPS` may be under way.
        """
        assert len(self._in_flight) < MAX_STEPS, "too many steps under way: the first is not over"
        plan = StepPlan(self._config.max_num_batched_tokens, ahead=bool(self._in_flight))
        if plan.ahead and not self._may_go_ahead():
            return None
        self._plan_decodes(plan)
        self._plan_prompts(plan)
        self._admit_waiting(plan, now)
        self._spend_rest(plan)
        if not plan.rows:
            return None
        step = start(plan, self._num_rounds(plan, max_draws))
        self._in_flight.append((step, plan))
        return step

    def update(self, step: Step, results: SequenceABC[RowResult]) -> list[Output]:
        """Take in the oldest step under way, computed, with results as `PendingStep.wait` gives them: advance
        its sequences and end those that are done.
        """
        plan = self._updated = self._end_step(step)
        outputs: list[Output] = []
        end = 0
        for row in step.rows:
            begin, end = end, end + (row.num_draws or 1)
            if row.sequence.finish_reason is None:
                outputs += self._advance(row, results[begin:end], plan)
        return outputs

    def fail(self, step: Step, code: str, error: str) -> list[Output]:
        """The oldest step under way went wrong as a whole: its sequences end, and nothing that it computed is
        published. A step behind it must fail too, or be dropped.
        """
        self._updated = self._end_step(step)
        return [
            self._finish(row.sequence, FinishReason.ERROR, code=code, error=error)
            for row in step.rows
            if row.sequence.finish_reason is None
        ]

    def drop(self, step: Step) -> None:
        """The step was launched behind one that failed: its sequences that go on compute it again."""
        self._end_step(step)
        for row in step.rows:
            row.sequence.num_scheduled_tokens = row.sequence.num_computed_tokens

    def stats(self, seconds: float) -> StepStats:
        """Of the step that was updated, or failed, last; it took that long."""
        plan = self._updated
        return StepStats(
            seconds=seconds,
            ahead=plan.ahead,
            num_rows=len(plan.rows),
            num_rounds=plan.num_rounds,
            num_tokens=plan.num_tokens,
            num_prompt_tokens=plan.num_prompt_tokens,
            num_sampled=plan.num_sampled,
            num_preempted=plan.num_preempted,
            prefix_query_tokens=plan.prefix_query_tokens,
            prefix_hit_tokens=plan.prefix_hit_tokens,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_groups=self._tables.counts(),
        )

    def snapshot(self, *, failed: bool = False) -> EngineSnapshot:
        return EngineSnapshot(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_groups=self._tables.counts(),
            failed=failed,
        )

    # -- planning ------------------------------------------------------------------------------------------

    def _may_go_ahead(self) -> bool:
        """Whether a step can be planned behind the one under way; then nobody is preempted for it."""
        growing = [s for s in self.running if s.num_unscheduled_tokens > 0]
        has_seat = 0 < len(self.running) < self._config.max_num_seqs
        if has_seat and self.waiting and self.waiting[0].priority < self.running[-1].priority:
            return False
        return self._tables.extend_all(dict.fromkeys(growing, 1))

    def _plan_decodes(self, plan: StepPlan) -> None:
        for sequence in [s for s in self.running if s.num_unscheduled_tokens == 1]:
            if plan.budget == 0:
                break
            if self._grow(sequence, plan):
                plan.add(sequence, 1)

    def _plan_prompts(self, plan: StepPlan) -> None:
        prompts = [s for s in self.running if s not in plan.rows and s.num_unscheduled_tokens > 1]
        others_wait = bool(self.waiting) and len(self.running) < self._config.max_num_seqs
        for i, sequence in enumerate(prompts):
            if plan.budget == 0:
                break
            if self._grow(sequence, plan):
                self._add_chunk(sequence, plan, others_behind=others_wait or i + 1 < len(prompts))

    def _admit_waiting(self, plan: StepPlan, now: float) -> None:
        while self.waiting and plan.budget > 0 and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._allocate(sequence, plan):
                break
            del self.waiting[0]
            insort(self.running, sequence, key=_rank)
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
                sequence.queue_seconds = now - sequence.submitted_at
                plan.prefix_query_tokens += (
                    len(sequence.token_ids) if self._config.enable_prefix_caching else 0
                )
                plan.prefix_hit_tokens += sequence.num_cached_tokens
            others_wait = bool(self.waiting) and len(self.running) < self._config.max_num_seqs
            self._add_chunk(sequence, plan, others_behind=others_wait)

    def _add_chunk(self, sequence: Sequence, plan: StepPlan, *, others_behind: bool) -> None:
        """Its share of the budget, or as much of that as there are blocks for; it holds one for a token."""
        share = plan.share(sequence.num_unscheduled_tokens, others_behind=others_behind)
        num_tokens = min(share, self._tables.reach(sequence))
        self._tables.extend(sequence, num_tokens)
        plan.add(sequence, num_tokens)

    def _spend_rest(self, plan: StepPlan) -> None:
        for sequence, num_tokens in plan.rows.items():
            if plan.budget == 0:
                break
            wanted = min(sequence.num_unscheduled_tokens, num_tokens + plan.budget)
            if wanted > num_tokens:
                wanted = min(wanted, self._tables.reach(sequence))
                self._tables.extend(sequence, wanted)
                plan.enlarge(sequence, wanted)

    def _num_rounds(self, plan: StepPlan, most: int) -> int:
        """How many tokens each row can draw; those that end before draw fewer. Holds the blocks for them."""
        if most == 1 or plan.budget == 0 or any(s.num_unscheduled_tokens != 1 for s in plan.rows):
            return 1  # a prompt goes on in the next step, or somebody had to stay behind
        most = min(most, *map(max_draws_of, plan.rows))
        if self.waiting:
            most = max(1, min(most, *(s.num_undrawn_tokens for s in self.running)))
        wanted = {s: min(most, s.num_undrawn_tokens) for s in plan.rows}
        return most if self._tables.extend_all(wanted, spare=len(self.running)) else 1

    def _allocate(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a waiting sequence the blocks of its tokens, cached ones where there are any."""
        # At least one token must be computed, to have logits to sample from.
        reusable = (len(sequence.token_ids) - 1) // self._config.block_size
        prefix = self._tables.find(sequence.block_hashes[:reusable])
        while not self._tables.has_room(prefix, len(sequence.token_ids), len(self.running)):
            if not self._may_preempt_for(sequence, prefix):
                return False
            self._preempt(self.running[-1], plan)
        self._tables.admit(sequence, prefix)
        return True

    def _may_preempt_for(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether preempting all of worse priority would make room; some in vain would be waste."""
        victims = [s for s in self.running if s.priority > sequence.priority]
        kept = len(self.running) - len(victims)
        return bool(victims) and self._tables.has_room(prefix, len(sequence.token_ids), kept, victims)

    def _grow(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Make sure that there is a slot for the next token. False if the sequence itself had to give way."""
        if not sequence.block_tables:  # preempted for one of better rank a moment ago
            return False
        while not self._tables.extend(sequence, 1):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        assert not plan.ahead, "a sequence is preempted while a step is under way"
        self.running.remove(sequence)
        plan.remove(sequence)
        self._tables.release(sequence)
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0
        sequence.num_preemptions += 1
        insort(self.waiting, sequence, key=_rank)

    # -- results -------------------------------------------------------------------------------------------

    def _end_step(self, step: Step) -> StepPlan:
        oldest, plan = self._in_flight.popleft()
        assert step is oldest, "not the oldest step under way"
        for row in step.rows:
            sequence = row.sequence
            sequence.num_steps_under_way -= 1
            sequence.num_draws_under_way -= row.num_draws
            if sequence.finish_reason is not None and sequence.num_steps_under_way == 0:
                self._tables.release(sequence)
        return plan

    def _advance(self, row: Row, results: SequenceABC[RowResult], plan: StepPlan) -> list[Output]:
        sequence, tokens, failure, stopped = row.sequence, list[SampledToken](), None, False
        if sequence.num_output_tokens == 0:
            plan.num_prompt_tokens += row.num_tokens
        for result in results:
            if isinstance(result, SampledToken) and row.samples:
                tokens.append(result)
                stopped = result.token_id in sequence.stop_token_ids and sequence.may_stop
                sequence.token_ids.append(result.token_id)
                if stopped:
                    break
            elif result is not None or row.samples:
                failure = result if isinstance(result, RowFailure) else _LOST
                break
        plan.num_sampled += len(tokens)
        if failure is not None:
            outputs = [self._news(sequence, tokens)] if tokens else []
            error = self._finish(sequence, FinishReason.ERROR, code=failure.code, error=failure.message)
            return [*outputs, error]
        num_computed = row.end + max(0, len(tokens) - 1)
        self._publish_blocks(sequence, num_computed)
        sequence.num_computed_tokens = num_computed
        self._tables.release_behind(sequence)
        if stopped or sequence.num_output_tokens >= sequence.max_tokens:
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            return [self._finish(sequence, reason, tuple(tokens))]
        return [self._news(sequence, tokens)] if tokens else []

    @staticmethod
    def _news(sequence: Sequence, tokens: list[SampledToken]) -> Output:
        cached, queued = sequence.num_cached_tokens, sequence.queue_seconds
        return Output(sequence.id, tuple(tokens), cached, queue_seconds=queued)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        tokens: tuple[SampledToken, ...] = (),
        *,
        code: str | None = None,
        error: str | None = None,
    ) -> Output:
        """The only place where a sequence ends, and the only maker of last outputs."""
        assert sequence.finish_reason is None, "a sequence ends once"
        sequence.finish_reason = reason
        del self._sequences[sequence.id]
        (self.running if sequence.block_tables else self.waiting).remove(sequence)
        if sequence.num_steps_under_way == 0:  # else the last of them releases the blocks
            self._tables.release(sequence)
        return Output(
            sequence.id,
            tokens,
            sequence.num_cached_tokens,
            reason,
            error_code=code,
            error=error,
            queue_seconds=sequence.queue_seconds,
        )

    # -- small things --------------------------------------------------------------------------------------

    def _refuse(self, command: Submit) -> Output | None:
        num_prompt = len(command.prompt_token_ids)
        if num_prompt == 0 or command.max_tokens < 1:
            code, error = (
                InvalidParameter.code,
                "a prompt of at least one token and max_tokens ≥ 1 are needed",
            )
        elif min(command.prompt_token_ids) < 0 or max(command.prompt_token_ids) > _MAX_TOKEN_ID:
            code, error = InvalidParameter.code, "a prompt token id is negative or far outside any vocabulary"
        elif num_prompt + command.max_tokens > self.max_len:
            code = ContextLengthExceeded.code
            error = (
                f"{num_prompt} prompt tokens and max_tokens {command.max_tokens} exceed "
                f"the context length of {self.max_len}"
            )
        else:
            return None
        return Output(command.id, finish_reason=FinishReason.ERROR, error_code=code, error=error)

    def _extend_hashes(self, sequence: Sequence, num_tokens: int) -> None:
        """Hash the full blocks among the first `num_tokens` tokens, each once in a sequence's life."""
        if not self._config.enable_prefix_caching:
            return
        size, hashes = self._config.block_size, sequence.block_hashes
        for i in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if i else hash_salt(sequence.cache_salt)
            hashes.append(hash_block(parent, sequence.token_ids[i * size : (i + 1) * size]))

    def _publish_blocks(self, sequence: Sequence, num_computed: int) -> None:
        """Let others find the blocks that this step has filled."""
        size = self._config.block_size
        first, end = sequence.num_computed_tokens // size, num_computed // size
        if first == end or not self._config.enable_prefix_caching:
            return
        self._extend_hashes(sequence, num_computed)
        self._tables.publish(sequence, first, end)
