"""
What a scheduler promises, one example each; `CHECKS` has those of block pool and tables too.

Each check takes the code under test, so that it runs on the real modules and on mutants alike.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_ahead_checks import AHEAD_CHECKS
from engine_block_checks import BLOCK_CHECKS, Check
from engine_fakes import FakeDevice, alone
from engine_round_checks import ROUND_CHECKS
from engine_window_checks import WINDOW_CHECKS
from engine_world import Arrival, Code, Scenario, World, play

from worker_orcd.config import EngineConfig
from worker_orcd.engine.messages import GroupBlocks, Output, Submit
from worker_orcd.errors import Internal
from worker_orcd.sequence import FinishReason, SampledToken, SamplingParams

CHECKS = BLOCK_CHECKS + WINDOW_CHECKS + AHEAD_CHECKS + ROUND_CHECKS


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def make(code: Code, **sizes: Any) -> World:
    return World(code, Scenario(arrivals=[], **sizes))


def computed_by(world: World) -> dict[int, int]:
    """Run one step; tokens computed by sequence id."""
    rows = world.step()
    world.tick += 1
    return rows


def finish(world: World) -> None:
    while computed_by(world):
        pass


def submit(**fields: Any) -> Submit:
    defaults: dict[str, Any] = {
        "id": 0,
        "prompt_token_ids": (1, 2, 3),
        "max_tokens": 4,
        "stop_token_ids": frozenset(),
        "sampling": SamplingParams(),
    }
    return Submit(**(defaults | fields))


@check
def what_can_never_run_is_refused(code: Code) -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, block_size=4, max_model_len=20)
    scheduler = code.scheduler.Scheduler(config, code.groups((None, 100)))
    for wrong, said in [
        ({"prompt_token_ids": ()}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_token_ids": (1, -1)}, "negative"),
        ({"prompt_token_ids": (1, 2**31)}, "vocabulary"),
        (
            {"prompt_token_ids": (1,) * 17},
            "17 prompt tokens and max_tokens 4 exceed the context length of 20",
        ),
    ]:
        [output] = scheduler.submit(submit(**wrong), 0.0)
        assert output.finish_reason is FinishReason.ERROR and output.error_code == "INVALID_REQUEST"
        assert said in (output.error or "")
    assert scheduler.is_idle
    assert scheduler.submit(submit(prompt_token_ids=(1,) * 16), 0.0) == []


@check
def the_pool_bounds_the_length(code: Code) -> None:
    world = make(code, num_blocks=6, block_size=4)
    assert world.scheduler.max_len == 20
    config = EngineConfig(block_size=4, max_model_len=1000)
    assert code.scheduler.Scheduler(config, code.groups((None, 6))).max_len == 20
    story = world.submit(Arrival(0, [1] * 8, 12, min_tokens=12))
    finish(world)
    assert story.tokens == alone([1] * 8, 12, min_tokens=12)


@check
def an_id_in_use_is_not_taken_twice(code: Code) -> None:
    world = make(code)
    story = world.submit(Arrival(0, [1, 2, 3], 4))
    with pytest.raises(Internal):
        world.scheduler.submit(submit(id=0), 0.0)
    finish(world)
    assert story.tokens == alone([1, 2, 3], 4)


@check
def the_same_salt_hits_and_another_misses(code: Code) -> None:
    world = make(code, num_blocks=40)
    prompt = list(range(1, 14))
    for salt, cached_tokens in [(b"a", 0), (b"a", 12), (b"b", 0), (b"b", 12), (b"", 0), (b"a", 12)]:
        story = world.submit(Arrival(world.tick, prompt, 2, salt=salt))
        finish(world)
        assert story.final is not None and story.final.num_cached_tokens == cached_tokens


@check
def at_least_one_token_of_a_cached_prompt_is_computed(code: Code) -> None:
    world = make(code, num_blocks=40)
    prompt = list(range(1, 13))  # three whole blocks
    for cached_tokens in (0, 8):
        story = world.submit(Arrival(world.tick, prompt, 1))
        finish(world)
        assert story.final is not None and story.final.num_cached_tokens == cached_tokens


@check
def answers_are_cached_too(code: Code) -> None:
    world = make(code, num_blocks=40)
    first = world.submit(Arrival(0, [1, 2, 3, 4, 5], 8, min_tokens=8))
    finish(world)
    story = world.submit(Arrival(world.tick, [1, 2, 3, 4, 5, *first.tokens], 1))
    finish(world)
    assert (
        story.final is not None and story.final.num_cached_tokens == 12
    )  # the thirteenth was never computed


@check
def nothing_is_found_with_caching_off(code: Code) -> None:
    world = make(code, num_blocks=40, caching=False)
    for _ in range(2):
        story = world.submit(Arrival(world.tick, [1] * 9, 1))
        finish(world)
        assert story.final is not None and story.final.num_cached_tokens == 0


@check
def a_block_is_not_found_in_the_step_that_computes_it(code: Code) -> None:
    world = make(code, num_blocks=40, budget=64)
    first, second = (world.submit(Arrival(0, [5] * 9, 2)) for _ in range(2))
    assert computed_by(world) == {0: 9, 1: 9}
    assert second.sequence.num_cached_tokens == 0
    assert not set(first.sequence.block_tables[0]) & set(second.sequence.block_tables[0])


@check
def each_block_is_hashed_once(code: Code) -> None:
    world = make(code, num_blocks=40, budget=3)
    hashed, original = [], code.scheduler.hash_block
    code.scheduler.hash_block = lambda *args: hashed.append(args) or original(*args)
    try:
        world.submit(Arrival(0, list(range(1, 11)), 11, min_tokens=11))
        finish(world)
    finally:
        code.scheduler.hash_block = original
    assert len(hashed) == 5  # of 21 tokens the last is never computed


@check
def decodes_do_not_wait_for_a_prompt(code: Code) -> None:
    world = make(code, num_blocks=100, budget=8)
    for _ in range(2):
        world.submit(Arrival(0, [1, 2], 30, min_tokens=30))
    computed_by(world)
    world.submit(Arrival(1, [3] * 60, 2))
    for _ in range(10):
        assert computed_by(world) == {0: 1, 1: 1, 2: 6}


@check
def a_short_prompt_overtakes_a_long_one_and_neither_waits_for_ever(code: Code) -> None:
    world = make(code, num_blocks=200, budget=16, max_seqs=8)
    world.submit(Arrival(0, [3] * 100, 2))
    world.submit(Arrival(0, [4] * 6, 2))
    assert computed_by(world) == {0: 10, 1: 6}  # half each, and what the short one leaves
    steps = 0
    while 0 not in {i for i, s in world.stories.items() if s.tokens}:
        world.submit(Arrival(world.tick, [5 + steps] * 15, 1))
        computed_by(world)
        steps += 1
    assert steps <= 100 // 7


@check
def a_prompt_that_fits_is_not_cut(code: Code) -> None:
    world = make(code, num_blocks=200, budget=16)
    world.submit(Arrival(0, [3] * 12, 2))
    world.submit(Arrival(0, [4] * 12, 2))
    assert computed_by(world) == {0: 12, 1: 4}
    assert computed_by(world) == {0: 1, 1: 8}


@check
def waiting_is_in_order_of_priority_and_arrival(code: Code) -> None:
    world = make(code, num_blocks=100, budget=64, max_seqs=1)
    for priority in (1, 0, 1, -1, 0):
        world.submit(Arrival(0, [1, 2, 3], 1, priority=priority))
    order = [next(iter(computed_by(world))) for _ in range(5)]
    assert order == [3, 1, 4, 0, 2]


@check
def the_latest_of_the_worst_priority_is_preempted(code: Code) -> None:
    world = make(code, num_blocks=8, budget=64)
    for priority in (0, 1, 1, 0):  # four blocks, and three to spare
        world.submit(Arrival(0, [1, 2, 3, 4], 9, min_tokens=9, priority=priority))
    computed_by(world)
    assert [s.id for s in world.scheduler.running] == [0, 3, 1, 2]
    computed_by(world)
    assert [s.id for s in world.scheduler.running] == [0, 3, 1]
    assert [s.id for s in world.scheduler.waiting] == [2]
    assert [story.sequence.num_preemptions for story in world.stories.values()] == [0, 0, 1, 0]
    finish(world)
    for story in world.stories.values():
        assert story.tokens == alone([1, 2, 3, 4], 9, min_tokens=9)


@check
def a_better_priority_takes_blocks_but_no_seat(code: Code) -> None:
    world = make(code, num_blocks=10, budget=64, max_seqs=2, caching=False)
    low = world.submit(Arrival(0, [1] * 20, 8, min_tokens=8, priority=1))
    computed_by(world)
    high = world.submit(Arrival(1, [2] * 28, 2, min_tokens=2))
    assert computed_by(world) == {high.sequence.id: 28}
    assert low.sequence.num_preemptions == 1
    world = make(code, num_blocks=100, budget=64, max_seqs=1)
    world.submit(Arrival(0, [1] * 20, 8, min_tokens=8, priority=1))
    computed_by(world)
    world.submit(Arrival(1, [2] * 4, 2))
    assert list(computed_by(world)) == [0]


@check
def nobody_is_preempted_in_vain_or_for_an_equal(code: Code) -> None:
    world = make(code, num_blocks=12, budget=64, max_seqs=4, caching=False)
    first = world.submit(Arrival(0, [1] * 20, 8, min_tokens=8, priority=0))
    low = world.submit(Arrival(0, [2] * 8, 8, min_tokens=8, priority=1))
    computed_by(world)
    world.submit(Arrival(1, [3] * 30, 2, priority=-1))  # would not fit without both
    assert computed_by(world) == {2: 30}
    assert first.sequence.num_preemptions == low.sequence.num_preemptions == 1
    world = make(code, num_blocks=12, budget=64, max_seqs=4, caching=False)
    first = world.submit(Arrival(0, [1] * 20, 8, min_tokens=8, priority=0))
    low = world.submit(Arrival(0, [2] * 8, 8, min_tokens=8, priority=1))
    computed_by(world)
    world.submit(Arrival(1, [3] * 30, 2, priority=0))  # all of priority 1 would not be enough
    computed_by(world)
    assert first.sequence.num_preemptions == low.sequence.num_preemptions == 0


@check
def admission_leaves_a_spare_block_for_each_that_runs(code: Code) -> None:
    world = make(code, num_blocks=5, budget=64, caching=False)
    for i in range(3):
        world.submit(Arrival(0, [i + 1] * 4, 3, min_tokens=3))
    assert list(computed_by(world)) == [0, 1]  # a third would take the blocks they need next
    finish(world)
    assert all(s.sequence.num_preemptions == 0 for s in world.stories.values())


@check
def a_deadline_ends_what_waits_and_what_runs(code: Code) -> None:
    world = make(code, max_seqs=1)
    running = world.submit(Arrival(0, [1, 2], 20, min_tokens=20, deadline=3))
    waiting = world.submit(Arrival(0, [1, 2], 20, deadline=3))
    for _ in range(3):
        computed_by(world)
    world.take(world.scheduler.expire(2.9))
    assert running.final is waiting.final is None
    world.take(world.scheduler.expire(3))
    for story, num_tokens in ((running, 3), (waiting, 0)):
        assert story.final is not None and story.final.finish_reason is FinishReason.DEADLINE
        assert story.final.tokens == () and len(story.tokens) == num_tokens
    assert world.scheduler.schedule(3) is None


@check
def a_forgotten_deadline_does_not_end_another(code: Code) -> None:
    scheduler = code.scheduler.Scheduler(EngineConfig(block_size=4), code.groups((None, 100)))
    scheduler.submit(submit(deadline=5.0), 0.0)
    scheduler.cancel(0)
    scheduler.submit(submit(deadline=9.0), 0.0)  # the same id
    assert scheduler.expire(6.0) == []
    assert [o.finish_reason for o in scheduler.expire(9.0)] == [FinishReason.DEADLINE]


@check
def a_stop_token_counts_only_after_min_tokens(code: Code) -> None:
    scheduler = code.scheduler.Scheduler(EngineConfig(block_size=4), code.groups((None, 100)))
    scheduler.submit(submit(stop_token_ids=frozenset({9}), min_tokens=2, max_tokens=8), 0.0)
    reasons = []
    for _ in range(3):
        step = scheduler.schedule(0.0)
        reasons += [o.finish_reason for o in scheduler.update(step, [SampledToken(9)])]
    assert reasons == [None, None, FinishReason.STOP]


@check
def a_cancelled_sequence_keeps_its_blocks_until_the_step_is_over(code: Code) -> None:
    world = make(code, num_blocks=10, budget=64)
    world.submit(Arrival(0, [1] * 6, 8, min_tokens=8))
    world.submit(Arrival(0, [2] * 6, 8, min_tokens=8))
    step = world.scheduler.schedule(0)
    [output] = world.scheduler.cancel(0)
    assert output == Output(0, finish_reason=FinishReason.CANCELLED)
    assert world.pool.num_free == 5 and world.scheduler.cancel(0) == []
    outputs = world.scheduler.update(step, world.device.launch(step).wait())
    assert [o.id for o in outputs] == [1] and world.pool.num_free == 7


@check
def a_row_fails_alone(code: Code) -> None:
    world = make(code)
    good, bad = (world.submit(Arrival(0, [i] * 6, 3, fails_at=at)) for i, at in ((1, None), (2, 0)))
    finish(world)
    assert good.tokens == alone([1] * 6, 3)
    assert bad.final is not None and (bad.final.error_code, bad.final.error) == ("INTERNAL", "made to fail")


@check
def what_a_failed_row_computed_is_not_found(code: Code) -> None:
    world = make(code, num_blocks=40, budget=64)
    world.submit(Arrival(0, [1] * 9, 3, fails_at=0))
    computed_by(world)
    story = world.submit(Arrival(1, [1] * 9, 3))
    finish(world)
    assert story.tokens == alone([1] * 9, 3) and story.sequence.num_cached_tokens == 0


@check
def a_runner_that_loses_a_token_loses_one_sequence(code: Code) -> None:
    world = make(code, budget=10)
    world.submit(Arrival(0, [1] * 4, 3))
    world.submit(Arrival(0, [2] * 9, 3))
    step = world.scheduler.schedule(0)
    outputs = world.scheduler.update(step, [None, SampledToken(3)])  # row 1 is a chunk: it cannot sample
    assert [o.finish_reason for o in outputs] == [FinishReason.ERROR] * 2
    assert world.lost == 0


@check
def what_a_failed_step_computed_is_not_found(code: Code) -> None:
    world = make(code, num_blocks=40, budget=64)
    world.submit(Arrival(0, [1] * 9, 3))
    step = world.scheduler.schedule(0)
    [output] = outputs = world.scheduler.fail(step, "VRAM_OOM", "no memory")
    world.take(outputs)
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "VRAM_OOM")
    story = world.submit(Arrival(0, [1] * 9, 3))
    finish(world)
    assert story.tokens == alone([1] * 9, 3) and story.sequence.num_cached_tokens == 0


@check
def ending_all_ends_each_once(code: Code) -> None:
    world = make(code, max_seqs=2)
    for _ in range(4):
        world.submit(Arrival(0, [1] * 6, 3))
    computed_by(world)
    world.take(world.scheduler.end_all(FinishReason.ERROR, "CUDA_ERROR", "gone"))
    assert all(s.final and s.final.error_code == "CUDA_ERROR" for s in world.stories.values())
    assert world.scheduler.is_idle and world.lost == 0


@check
def stats_say_what_a_step_did(code: Code) -> None:
    world = make(code, num_blocks=40, budget=10)
    world.submit(Arrival(0, [1] * 9, 3, min_tokens=3))
    computed_by(world)
    world.submit(Arrival(1, [1] * 8 + [2] * 5, 3, min_tokens=3))
    computed_by(world)
    stats = world.scheduler.stats(0.25)
    assert (stats.seconds, stats.num_rows, stats.num_tokens, stats.num_sampled) == (0.25, 2, 6, 2)
    assert (stats.num_prompt_tokens, stats.prefix_query_tokens, stats.prefix_hit_tokens) == (5, 13, 8)
    assert (stats.num_running, stats.num_waiting, stats.num_preempted) == (2, 0, 0)
    assert stats.kv_groups == (GroupBlocks(window=None, free=34, total=39),)
    snapshot = world.scheduler.snapshot()
    assert (snapshot.num_running, snapshot.kv_blocks_free, snapshot.failed) == (2, 34, False)


@check
def the_same_calls_give_the_same_steps(code: Code) -> None:
    scenario = Scenario([Arrival(i, [i % 3] * (5 + i), 6, priority=i % 2) for i in range(8)], num_blocks=14)
    steps: list[list[tuple[int, int, tuple[tuple[int, ...], ...]]]] = []
    original = FakeDevice.launch

    def record(device: FakeDevice, step: Any) -> Any:
        steps[-1].append(
            [(r.sequence.id, r.num_tokens, tuple(map(tuple, r.sequence.block_tables))) for r in step.rows]
        )
        return original(device, step)

    FakeDevice.launch = record
    try:
        for _ in range(2):
            steps.append([])
            world = play(code, scenario)
    finally:
        FakeDevice.launch = original
    assert steps[0] == steps[1]
    assert any(s.sequence.num_preemptions for s in world.stories.values()), "nothing interesting happened"
