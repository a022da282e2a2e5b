"""
A small world in which a scheduler lives from tick to tick, watched at every move.

`play` runs a scenario (arrivals, cancellations, deadlines, faults, sizes) on any scheduler code, the real
one or a mutant, and raises AssertionError where a promise is broken. Time is the tick's number.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from engine_fakes import STOP, FakeDevice, Pending, alone, first_visible
from hypothesis import strategies as st

from worker_orcd.config import EngineConfig
from worker_orcd.engine.messages import Output, Submit
from worker_orcd.sequence import FinishReason, Row, RowFailure, SamplingParams, Sequence, Step

MAX_TICKS = 1500
MAX_ALLOCATIONS = 1000  # in one step of at most a dozen sequences


@dataclass(frozen=True)
class Code:
    """The modules under test."""

    scheduler: ModuleType
    tables: ModuleType
    blocks: ModuleType

    def groups(self, *sizes: tuple[int | None, int]) -> list[Any]:
        """Cache groups of these windows and numbers of blocks."""
        return [self.tables.CacheGroup(self.blocks.BlockPool(n), window) for window, n in sizes]


@dataclass(frozen=True)
class Arrival:
    tick: int
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    priority: int = 0
    salt: bytes = b""
    seed: int = 0
    penalises: bool = False
    deadline: int | None = None  # ticks after the arrival
    cancel: int | None = None  # ticks after the arrival
    cancel_in_flight: bool = False  # while the device computes, not between steps
    fails_at: int | None = None  # the tick at which the device reports a failure of the row


@dataclass(frozen=True)
class Scenario:
    arrivals: list[Arrival]
    num_blocks: int = 16  # of the layers that see everything; 0: there are none
    windowed: tuple[tuple[int, int], ...] = ()  # (window, blocks) of the others
    block_size: int = 4
    budget: int = 16
    max_seqs: int = 4
    caching: bool = True
    max_steps: int = 1  # under way
    max_draws: int = 1  # of a row in a step
    failing_ticks: frozenset[int] = frozenset()  # at which a step that ends fails as a whole

    @property
    def groups(self) -> list[tuple[int | None, int]]:
        return [(None, self.num_blocks)] * (self.num_blocks > 0) + list(self.windowed)

    def held_at_most(self, window: int) -> int:
        """Blocks between steps: what the next token sees, and one for that token."""
        return -(-(window - 1) // self.block_size) + 1


PREFIXES = st.sampled_from([[], [7] * 9, [7] * 12, [7] * 4 + [8] * 8, [6] * 4 + [8] * 8, list(range(20))])
PROMPTS = st.builds(lambda p, t: p + t, PREFIXES, st.lists(st.integers(0, 5), min_size=1, max_size=12))
ARRIVALS = st.builds(
    Arrival,
    tick=st.integers(0, 20) | st.integers(0, 3),
    prompt=PROMPTS,
    max_tokens=st.integers(1, 12),
    min_tokens=st.sampled_from([0, 0, 0, 3]),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    salt=st.sampled_from([b"", b"", b"", b"other"]),
    seed=st.integers(0, 2),
    penalises=st.booleans(),
    deadline=st.sampled_from([None] * 20 + [0, 2, 5, 9, 15, 25]),
    cancel=st.sampled_from([None] * 20 + [0, 1, 2, 5, 9, 15, 25]),
    cancel_in_flight=st.booleans(),
    fails_at=st.sampled_from([None] * 30 + [0, 1, 3, 6, 10]),
)

GROWING = st.builds(  # most of what they hold they ask for while they run, and they meet
    Arrival,
    tick=st.integers(0, 3),
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    max_tokens=st.integers(8, 30),
    min_tokens=st.just(30),
    priority=st.sampled_from([0, 0, 0, 1]),
    seed=st.integers(0, 2),
)


@st.composite
def window_groups(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """A window, and as few blocks as one sequence needs, or some more."""
    window = draw(st.sampled_from([1, 2, 3, 5, 8, 9, 13, 20, 60]))
    least = min(-(-(window - 1) // size) + 1, -(-44 // size))
    return window, 1 + least + draw(st.sampled_from([0, 0, 1, 2, 3, 5, 10, 20]))


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    size = draw(st.sampled_from([1, 2, 4, 4, 5]))
    num_blocks = draw(st.integers(45, 50) | st.integers(45, 90)) // size + 2  # the longest has 44 tokens
    windowed = draw(st.just([]) | st.lists(window_groups(size), min_size=1, max_size=2))
    return Scenario(
        arrivals=draw(
            st.lists(ARRIVALS, min_size=1, max_size=10) | st.lists(ARRIVALS | GROWING, min_size=3, max_size=8)
        ),
        num_blocks=draw(st.sampled_from([num_blocks, num_blocks, 0])) if windowed else num_blocks,
        windowed=tuple(windowed),
        block_size=size,
        budget=draw(st.integers(1, 24)),
        max_seqs=draw(st.integers(1, 6)),
        caching=draw(st.booleans() | st.just(True)),
        max_steps=draw(st.sampled_from([1, 2, 2])),
        max_draws=draw(st.sampled_from([1, 1, 2, 3, 8])),
        failing_ticks=draw(st.sampled_from([frozenset[int]()] * 3 + [frozenset({1}), frozenset({2, 3, 9})])),
    )


@dataclass
class Story:
    """What came out for one arrival."""

    arrival: Arrival
    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    final: Output | None = None
    first_tick: int | None = None  # of the first step that computed it


class World:
    def __init__(self, code: Code, scenario: Scenario) -> None:
        self.scenario = scenario
        config = EngineConfig(
            max_num_seqs=scenario.max_seqs,
            max_num_batched_tokens=scenario.budget,
            block_size=scenario.block_size,
            enable_prefix_caching=scenario.caching,
        )
        groups = code.groups(*scenario.groups)
        self.pools = [group.pool for group in groups]
        self.scheduler = code.scheduler.Scheduler(config, groups)
        self.device = FakeDevice(scenario.groups, scenario.block_size)
        self.num_allocations = 0  # in this step
        for pool in self.pools:
            pool.allocate = partial(self.count_and_allocate, pool.allocate)
        self.stories: dict[int, Story] = {}
        self.tick = 0
        self.launched: deque[tuple[Step, Pending]] = deque()  # the oldest first
        self.num_ahead = 0  # steps that were launched while one was under way
        self.dropped: set[int] = set()  # sequences that hold blocks for what they compute again

    @property
    def pool(self) -> Any:
        """Of the first group."""
        return self.pools[0]

    @property
    def in_flight(self) -> list[Row]:
        return [row for step, _pending in self.launched for row in step.rows]

    @property
    def lost(self) -> int:
        """Blocks that are not free."""
        return sum(pool.num_usable - pool.num_free for pool in self.pools)

    def count_and_allocate(self, allocate: Callable[[int], list[int]], count: int) -> list[int]:
        self.num_allocations += 1
        assert self.num_allocations < MAX_ALLOCATIONS, "sequences preempt each other for ever"
        return allocate(count)

    def submit(self, arrival: Arrival) -> Story:
        sequence_id = len(self.stories)
        command = Submit(
            id=sequence_id,
            prompt_token_ids=tuple(arrival.prompt),
            max_tokens=arrival.max_tokens,
            stop_token_ids=STOP,
            sampling=SamplingParams(seed=arrival.seed, presence_penalty=1.0 if arrival.penalises else 0.0),
            min_tokens=arrival.min_tokens,
            priority=arrival.priority,
            deadline=None if arrival.deadline is None else arrival.tick + arrival.deadline,
            cache_salt=arrival.salt,
        )
        assert self.scheduler.submit(command, self.tick) == [], "everything here fits"
        sequence = next(s for s in self.scheduler.waiting if s.id == sequence_id)
        story = self.stories[sequence_id] = Story(arrival, sequence)
        return story

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            story = self.stories[output.id]
            assert story.final is None, "an output after the last one"
            story.tokens += [token.token_id for token in output.tokens]
            assert output.tokens or output.finish_reason is not None, "an output that says nothing"
            if output.finish_reason is not None:
                story.final = output
            if story.first_tick is not None:
                assert output.queue_seconds == story.first_tick - story.arrival.tick
        self.check()

    def cancel(self, *, in_flight: bool) -> None:
        for sequence_id, story in list(self.stories.items()):
            arrival = story.arrival
            if arrival.cancel is not None and arrival.cancel_in_flight == in_flight:
                if arrival.tick + arrival.cancel == self.tick:
                    was_live = story.final is None
                    self.take(self.scheduler.cancel(sequence_id))
                    assert story.final is not None, "cancelling takes effect at once"
                    assert not was_live or story.final.finish_reason is FinishReason.CANCELLED
                elif arrival.tick + arrival.cancel < self.tick:
                    assert self.scheduler.cancel(sequence_id) == [], "cancelling twice does nothing"

    def step(self) -> dict[int, int]:
        """One turn of the engine: how many tokens the step that ended had computed, by sequence id."""
        while len(self.launched) < self.scenario.max_steps and self.launch():
            pass
        if not self.launched:
            assert not self.stories or all(s.final for s in self.stories.values()), "work, but no step"
            return {}
        self.cancel(in_flight=True)
        self.check_in_flight()
        step, pending = self.launched[0]
        results = pending.wait()
        self.launched.popleft()
        if self.tick in self.scenario.failing_ticks:
            self.fail(step, pending)
        else:
            self.dropped -= {row.sequence.id for row in step.rows}
            self.take(self.scheduler.update(step, results))
        self.check_in_flight()
        stats = self.scheduler.stats(0.5)
        assert stats.num_rows == len(step.rows) and stats.num_rounds == step.num_rounds
        assert stats.num_tokens == sum(row.num_computed for row in step.rows)
        assert stats.prefix_hit_tokens <= stats.prefix_query_tokens
        assert not stats.ahead or stats.num_preempted == 0
        return {row.sequence.id: row.num_computed for row in step.rows}

    def launch(self) -> bool:
        self.take(self.scheduler.expire(self.tick))
        admitted_before = {s.id for s in self.scheduler.running}
        self.num_allocations = 0
        before = [pool.num_free for pool in self.pools]
        step = self.scheduler.schedule(self.tick, self.scenario.max_draws)
        if step is None:
            assert not self.launched or before == [pool.num_free for pool in self.pools], "something was done"
            self.check()
            return False
        self.num_ahead += bool(self.launched)
        self.check_step(step, admitted_before)
        for row in step.rows:
            story = self.stories[row.sequence.id]
            story.first_tick = self.tick if story.first_tick is None else story.first_tick
            if story.arrival.fails_at == self.tick:
                self.device.failing_rows[row.sequence.id] = RowFailure("INTERNAL", "made to fail")
        self.launched.append((step, self.device.launch(step)))
        self.check()
        return True

    def fail(self, step: Step, pending: Pending) -> None:
        """And drop what was launched behind it."""
        self.device.spoil(pending)
        self.take(self.scheduler.fail(step, "VRAM_OOM", "made to fail"))
        assert all(row.sequence.finish_reason is not None for row in step.rows)
        if self.launched:
            behind, pending = self.launched[0]
            pending.wait()
            self.device.spoil(pending)
            self.launched.popleft()
            self.scheduler.drop(behind)
            self.dropped |= {row.sequence.id for row in behind.rows}
            self.check()

    # -- promises ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Reference counts are right, free + held = total, lists are sorted, and who waits holds nothing."""
        live = self.scheduler.running + self.scheduler.waiting
        ended = list(dict.fromkeys(r.sequence for r in self.in_flight if r.sequence not in live))
        for group in range(len(self.pools)):
            self.check_group(group, self.scheduler.running + ended)
        assert not any(s.block_tables for s in self.scheduler.waiting), "who waits holds no blocks"
        assert not any(s.num_computed_tokens for s in self.scheduler.waiting), "and has nothing computed"
        for s in self.scheduler.running:
            idle = s.num_steps_under_way == 0
            assert not idle or s.num_scheduled_tokens == s.num_computed_tokens, "what was computed is lost"
        for queue in (self.scheduler.running, self.scheduler.waiting):
            ranks = [(s.priority, s.arrival) for s in queue]
            assert ranks == sorted(ranks)
        assert {s.id for s in live} == {i for i, story in self.stories.items() if story.final is None}

    def check_group(self, group: int, holders: list[Sequence]) -> None:
        pool, (window, num_blocks) = self.pools[group], self.scenario.groups[group]
        held = Counter(b for s in holders for b in s.block_tables[group] if b != 0)
        for block_id in range(pool.num_blocks):
            assert pool.ref_count(block_id) == held[block_id], "a reference count is wrong"
        assert len(held) + pool.num_free == pool.num_usable == num_blocks - 1
        salts: dict[int, bytes] = {}
        for s in self.scheduler.running:
            first = first_visible(s.num_computed_tokens, window) // self.scenario.block_size
            behind, visible = s.block_tables[group][:first], s.block_tables[group][first:]
            assert not any(behind), "blocks are held that nobody will see"
            assert all(visible) and len(set(visible)) == len(visible), "blocks are missing"
            if s.id in self.dropped or any(row.sequence is s for row in self.in_flight):
                continue
            if window is not None:
                assert len(visible) <= self.scenario.held_at_most(window), "more blocks than a window needs"
            for block_id in visible:
                assert salts.setdefault(block_id, s.cache_salt) == s.cache_salt, "shared between salts"

    def check_step(self, step: Step, admitted_before: set[int]) -> None:
        scenario, scheduler = self.scenario, self.scheduler
        assert 0 < step.num_tokens <= scenario.budget
        assert len(scheduler.running) <= scenario.max_seqs
        assert len({r.sequence.id for r in step.rows}) == len(step.rows)
        for row in step.rows:
            sequence = row.sequence
            assert row.num_tokens > 0 and row.start == sequence.num_scheduled_tokens - row.num_computed
            assert row.previous_draw is not None or row.end <= len(sequence.token_ids)
            last = sequence.num_prompt_tokens + sequence.max_tokens
            assert row.end + max(1, row.num_draws) <= last, "more than it may have"
            assert row.num_draws <= scenario.max_draws
            assert row.num_draws <= 1 or all(r.num_tokens == 1 and r.samples for r in step.rows)
            deadline = self.stories[row.sequence.id].sequence.deadline
            assert deadline is None or deadline > self.tick, "cycles on doomed work"
            first = row.start // scenario.block_size
            last = (row.start + row.num_computed - 1) // scenario.block_size
            for pool, table in zip(self.pools, row.sequence.block_tables, strict=True):
                for block_id in table[first : last + 1]:
                    assert pool.ref_count(block_id) == 1, "a write to a shared block"
        if step.num_rounds > 1:
            self.check_rounds(step)
        in_step = {r.sequence.id for r in step.rows}
        idle = [s for s in scheduler.running if s.id not in in_step and s.num_unscheduled_tokens]
        assert not idle or step.num_tokens == scenario.budget, "budget left, and somebody idle"
        if any(s.num_unscheduled_tokens == 1 for s in idle):  # a decode stalls: only decodes may be before it
            assert all(r.num_tokens == 1 for r in step.rows)
        unfinished = [r for r in step.rows if not r.samples and not self.lacks_blocks(r)]
        assert not unfinished or step.num_tokens == scenario.budget, "a prompt could have gone on"
        for admitted in (s for s in scheduler.running if s.id not in admitted_before):
            for waiting in scheduler.waiting:
                assert (admitted.priority, admitted.arrival) < (waiting.priority, waiting.arrival), (
                    "overtaken"
                )

    def check_rounds(self, step: Step) -> None:
        running, in_step = self.scheduler.running, {row.sequence for row in step.rows}
        assert not any(s.num_unscheduled_tokens > 1 for s in running), "a prompt waits for rounds of others"
        assert not any(s.num_unscheduled_tokens and s not in in_step for s in running), "somebody waits"
        if self.scheduler.waiting:
            assert all(row.num_draws == step.num_rounds for row in step.rows), "a seat stays empty"
            assert all(s in in_step for s in running), "a seat stays empty that is about to be free"

    def lacks_blocks(self, row: Row) -> bool:
        """Whether a pool had no block for the row's next token."""
        return any(
            pool.num_free == 0 and len(table) * self.scenario.block_size == row.end
            for pool, table in zip(self.pools, row.sequence.block_tables, strict=True)
        )

    def check_in_flight(self) -> None:
        for _step, pending in self.launched:
            for group, pool in enumerate(self.pools):
                for block_id in pending.block_ids(group):
                    assert pool.ref_count(block_id) > 0, "a block was freed while the device may write to it"


def play(code: Code, scenario: Scenario) -> World:
    """Run a scenario to its end. Raises AssertionError where a promise is broken."""
    world = World(code, scenario)
    last_event = max(a.tick + max(a.cancel or 0, a.deadline or 0) for a in scenario.arrivals)
    for world.tick in range(MAX_TICKS):
        for arrival in scenario.arrivals:
            if arrival.tick == world.tick:
                world.submit(arrival)
        world.cancel(in_flight=False)
        if not world.step() and world.tick > last_event:
            break
    else:
        raise AssertionError("starved")
    assert world.lost == 0, "blocks were lost"
    for story in world.stories.values():
        check_story(story, scenario)
    return world


def check_story(story: Story, scenario: Scenario) -> None:
    arrival = story.arrival
    assert story.final is not None, "no last output"
    windows = [window for window, _num_blocks in scenario.groups]
    expected = alone(
        arrival.prompt,
        arrival.max_tokens,
        seed=arrival.seed,
        min_tokens=arrival.min_tokens,
        windows=windows,
        penalises=arrival.penalises,
    )
    assert story.sequence.token_ids == arrival.prompt + story.tokens
    match story.final.finish_reason:
        case FinishReason.STOP:
            assert story.tokens == expected and story.tokens[-1] in STOP
        case FinishReason.LENGTH:
            assert story.tokens == expected and len(story.tokens) == arrival.max_tokens
        case reason:
            assert story.tokens == expected[: len(story.tokens)]
            allowed = {
                FinishReason.CANCELLED: arrival.cancel is not None,
                FinishReason.DEADLINE: arrival.deadline is not None,
                FinishReason.ERROR: arrival.fails_at is not None or bool(scenario.failing_ticks),
            }
            assert allowed.get(reason)
    assert (story.final.error is not None) == (story.final.finish_reason is FinishReason.ERROR)
