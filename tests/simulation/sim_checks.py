"""What must be so after every event, whatever went wrong: blocks, ranks, deadlines, last outputs, bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceABC
from typing import TYPE_CHECKING

from engine_fakes import first_visible
from sim_device import code_of
from sim_plan import LONGEST

from worker_orcd.engine.messages import Cancel, Command, Output, Submit
from worker_orcd.errors import DeviceError, OutOfMemory
from worker_orcd.sequence import FinishReason, Row, Sequence, Step

if TYPE_CHECKING:
    from sim_world import World

CANCEL_SECONDS = 0.1  # within which a job whose client is gone must be out of the engine, beside a step
MAX_FAILING = 3  # steps in a row, with which the engine gives up
MAX_WAIT = 6 * LONGEST  # steps until the best of all that live has ended


def rank(sequence: Sequence) -> tuple[int, int]:
    return (sequence.priority, sequence.arrival)


class Checks:
    """Looks at the engine between its moves. Raises AssertionError where a promise is broken."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._running: set[int] = set()  # as the step before was launched
        self._submitted: set[int] = set()
        self._cancelled: set[int] = set()  # ids whose Cancel the engine has taken
        self._ended: set[int] = set()  # ids that have had their last output
        # Of a step that failed: id -> code, and whether nothing can end the sequence before that does.
        self._must_fail: dict[int, tuple[str, bool]] = {}
        self._broken: tuple[Step, Exception] | None = None  # it could not be launched, and waits for its turn
        self.must_collapse = False  # the engine must end for good
        self.must_exit_with_1 = False  # and nobody had told the worker to end before
        self._may_fail: dict[int, set[str]] = {}  # seed -> codes that its caller may be told
        self._num_dropping = 0  # steps behind one that failed: their results are worth nothing
        self._best: int | None = None
        self._best_steps = 0  # launched since it is the best of all
        self._num_failing = 0  # steps in a row, but those that ran out of memory

    # -- the engine's moves --------------------------------------------------------------------------------

    def taken(self, command: Command) -> None:
        match command:
            case Submit():
                assert command.id not in self._submitted, "an id is used twice"
                self._submitted.add(command.id)
            case Cancel(id):
                assert id in self._submitted, "cancelled before it was submitted"
                assert id not in self._cancelled, "cancelled twice"
                self._cancelled.add(id)

    def launched(self, step: Step) -> None:
        """The scheduler has made a step and the engine hands it over."""
        world, scheduler = self._world, self._world.scheduler
        self._num_dropping = 0
        assert not self.must_collapse, "it goes on with a device that is lost"
        if world.closing_at is not None:
            late = world.loop.now - world.closing_at - world.plan.grace - 3 * world.runner.longest_step
            assert late < CANCEL_SECONDS + 200 * world.plan.callback_seconds, (
                "it goes on after the grace period"
            )
        live = {s.id for s in scheduler.running + scheduler.waiting}
        assert not live & self._must_fail.keys(), "sequences of a failed step go on"
        assert 0 < step.num_tokens <= world.plan.budget
        assert len(scheduler.running) <= world.plan.max_seqs
        assert len({row.sequence.id for row in step.rows}) == len(step.rows), "a sequence has two rows"
        for row in step.rows:
            self._check_row(row)
        for sequence in scheduler.running + scheduler.waiting:
            deadline = sequence.deadline
            assert deadline is None or deadline > world.loop.now, "a deadline was missed"
        admitted = [s for s in scheduler.running if s.id not in self._running]
        for sequence in admitted:
            for waiting in scheduler.waiting:
                assert rank(sequence) < rank(waiting), "somebody was overtaken"
        in_step = {row.sequence for row in step.rows}
        idle = [s for s in scheduler.running if s not in in_step and s.num_unscheduled_tokens]
        assert not idle or step.num_tokens == world.plan.budget, "somebody stays behind, and there is room"
        if any(s.num_unscheduled_tokens == 1 for s in idle):
            assert all(row.num_tokens == 1 for row in step.rows), "a decode waits for a prompt"
        self._running = {s.id for s in scheduler.running}
        self._check_progress()

    def _check_row(self, row: Row) -> None:
        world, sequence = self._world, row.sequence
        assert sequence.id not in self._cancelled, "cycles on a cancelled job"
        assert sequence.id not in self._ended, "cycles on a job that is over"
        assert row.end + max(1, row.num_draws) <= sequence.num_prompt_tokens + sequence.max_tokens
        gone_at = world.gone.get(sequence.sampling.seed)
        assert (
            gone_at is None or world.loop.now - gone_at <= CANCEL_SECONDS + 3 * world.runner.longest_step
        ), "cycles for a client that is gone"
        size = world.plan.block_size
        first, last = row.start // size, (row.start + row.num_computed - 1) // size
        for pool, table in zip(world.pools, sequence.block_tables, strict=True):
            for block_id in table[first : last + 1]:
                assert pool.ref_count(block_id) == 1, "a write to a shared block"

    def _check_progress(self) -> None:
        """Whoever is the best of all that live must end soon."""
        best = min(self._world.scheduler.running + self._world.scheduler.waiting, key=rank, default=None)
        if best is None or best.id != self._best:
            self._best, self._best_steps = None if best is None else best.id, 0
        self._best_steps += 1
        assert self._best_steps <= MAX_WAIT, "the best of all starves"

    def fails(self, step: Step, fault: Exception) -> None:
        """The step went wrong; whether anybody is told depends on the step before it."""
        for row in step.rows:
            self._may_fail.setdefault(row.sequence.sampling.seed, set()).add(code_of(fault))
        self._world.faults.append(fault)

    def not_launched(self, step: Step, fault: Exception) -> None:
        """The step could not be launched: it fails after those under way."""
        self.fails(step, fault)
        if self._world.runner.under_way:
            self._broken = (step, fault)
        else:
            self._ends_badly(step, fault, at_once=False)

    def ended(self, step: Step, fault: Exception | None) -> None:
        """The engine is about to be told of a step, good or bad."""
        if fault is not None:
            self.fails(step, fault)
        if self._num_dropping:
            self._num_dropping -= 1
            self._count(fault, in_a_row=False)
        elif fault is not None:
            self._num_dropping = len(self._world.runner.under_way)
            self._ends_badly(step, fault, at_once=True)
            if self._broken is not None:
                self._count(self._broken[1], in_a_row=False)
                self._broken = None
        else:
            self._num_failing = 0
            if self._broken is not None and not self._world.runner.under_way:
                broken, self._broken = self._broken, None
                self._ends_badly(*broken, at_once=False)

    def _ends_badly(self, step: Step, fault: Exception, *, at_once: bool) -> None:
        """Not `at_once`: its sequences may end in another way before its turn comes."""
        self._count(fault, in_a_row=True)
        for row in step.rows:
            if row.sequence.finish_reason is None:
                self._must_fail[row.sequence.id] = (code_of(fault), at_once)

    def _count(self, fault: Exception | None, *, in_a_row: bool) -> None:
        """See whether the engine must end for good. A step that is dropped is in no row of failing ones."""
        self._num_failing += in_a_row and not isinstance(fault, OutOfMemory)
        if isinstance(fault, DeviceError) or self._num_failing >= MAX_FAILING:
            self.must_collapse = True
            self.must_exit_with_1 |= not self._world.is_ending

    def row_fails(self, row: Row, code: str) -> None:
        self._may_fail.setdefault(row.sequence.sampling.seed, set()).add(code)

    def may_fail_with(self, seed: int) -> set[str]:
        return self._may_fail.get(seed, set())

    def published(self, outputs: SequenceABC[Output]) -> None:
        for output in outputs:
            assert output.id in self._submitted, "news of nobody"
            assert output.id not in self._ended, "an output after the last one"
            assert output.tokens or output.finish_reason is not None, "an output that says nothing"
            if output.finish_reason is None:
                continue
            self._ended.add(output.id)
            code, at_once = self._must_fail.pop(output.id, (output.error_code, True))
            assert not at_once or output.error_code == code, "a sequence of a failed step ends otherwise"
            is_error = output.finish_reason is FinishReason.ERROR
            assert is_error == (output.error is not None) == (output.error_code is not None)

    # -- between moves -------------------------------------------------------------------------------------

    def look(self) -> None:
        """After every event."""
        self._check_blocks()
        scheduler, client = self._world.scheduler, self._world.client
        for queue in (scheduler.running, scheduler.waiting):
            ranks = [rank(s) for s in queue]
            assert ranks == sorted(ranks), "a queue is out of order"
        assert 0 <= client.num_admitted <= client.max_queue, "more jobs than the queue takes"
        assert client.num_admitted == sum(a.num_sequences for a in client._jobs.values()), "a place is lost"
        assert len(client._streams) <= client.num_admitted, "more streams than places"

    def _check_blocks(self) -> None:
        """Reference counts are right, free + held = total, and who waits holds nothing."""
        world, scheduler = self._world, self._world.scheduler
        assert not any(s.block_tables for s in scheduler.waiting), "who waits holds blocks"
        in_flight = {row.sequence for step, _plan in scheduler._in_flight for row in step.rows}
        assert all(s.block_tables for s in in_flight), "blocks are freed while a step writes to them"
        holders = dict.fromkeys(scheduler.running)
        holders |= dict.fromkeys(s for s in in_flight if s.finish_reason is not None)
        for group, pool in enumerate(world.pools):
            held = Counter(b for s in holders for b in s.block_tables[group] if b != 0)
            assert len(held) + pool.num_free == pool.num_usable, "blocks are lost"
            for block_id, count in held.items():
                assert pool.ref_count(block_id) == count, "a reference count is wrong"
            window = world.plan.groups[group][0]
            for s in scheduler.running:
                visible = s.block_tables[group][
                    first_visible(s.num_computed_tokens, window) // world.plan.block_size :
                ]
                assert all(visible) and len(set(visible)) == len(visible), "blocks are missing"

    def over(self) -> None:
        """The engine's thread has ended."""
        scheduler = self._world.scheduler
        assert not scheduler.running and not scheduler.waiting and not scheduler._in_flight
        assert self._submitted == self._ended, "sequences have had no last output"
        assert not self._must_fail, "sequences of a failed step have had no last output"
        for pool in self._world.pools:
            assert pool.num_free == pool.num_usable, "blocks are lost"
            assert not any(pool.ref_count(b) for b in range(pool.num_blocks))
