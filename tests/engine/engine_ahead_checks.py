"""What a scheduler promises of a step that is made while one is under way, one example each."""

from __future__ import annotations

from typing import Any

from engine_block_checks import Check
from engine_fakes import STOP, alone
from engine_world import Arrival, Code, Scenario, World

from worker_orcd.sequence import FinishReason, SampledToken

AHEAD_CHECKS: list[Check] = []


def check(function: Check) -> Check:
    AHEAD_CHECKS.append(function)
    return function


def make(code: Code, **sizes: Any) -> World:
    return World(code, Scenario(arrivals=[], max_steps=2, **sizes))


def finish(world: World) -> int:
    """The number of steps."""
    count = 0
    while world.step():
        world.tick += 1
        count += 1
    return count


@check
def a_decode_goes_ahead_of_the_token_before_it(code: Code) -> None:
    world = make(code)
    story = world.submit(Arrival(0, [1, 2, 3], 6, min_tokens=6))
    assert finish(world) == 6 and world.num_ahead == 5
    assert story.tokens == alone([1, 2, 3], 6, min_tokens=6)


@check
def a_chunk_goes_ahead_of_the_rest(code: Code) -> None:
    world = make(code, num_blocks=40, budget=4)
    story = world.submit(Arrival(0, [1] * 13, 2, min_tokens=2))
    assert finish(world) == 5 and world.num_ahead == 4
    assert story.tokens == alone([1] * 13, 2, min_tokens=2)


@check
def a_draw_is_told_by_its_place_among_draws(code: Code) -> None:
    world = make(code, num_blocks=40, budget=8)
    for number, length in enumerate((20, 3)):
        world.submit(Arrival(0, [number] * length, 9))
    first, second = world.scheduler.schedule(0), world.scheduler.schedule(0)
    told = [(row.sequence.id, row.start, row.num_tokens, row.samples) for row in first.rows]
    assert told == [(0, 0, 5, False), (1, 0, 3, True)]
    told = [(row.sequence.id, row.start, row.num_tokens, row.previous_draw) for row in second.rows]
    assert told == [(1, 3, 1, 0), (0, 5, 7, None)]


@check
def nobody_gets_a_row_beyond_its_last_token(code: Code) -> None:
    world = make(code)
    world.submit(Arrival(0, [1, 2, 3], 1))
    world.submit(Arrival(0, [4, 5], 2, min_tokens=2))
    world.scheduler.schedule(0)
    ahead = world.scheduler.schedule(0)
    assert [(row.sequence.id, row.start, row.num_tokens) for row in ahead.rows] == [(1, 2, 1)]


@check
def a_sequence_that_ended_in_the_first_step_keeps_its_blocks_for_the_second(code: Code) -> None:
    world = make(code)
    story = world.submit(Arrival(0, [1, 2, 3], 9))
    first, second = world.scheduler.schedule(0), world.scheduler.schedule(0)
    [output] = world.scheduler.update(first, [SampledToken(min(STOP))])
    assert output.finish_reason is FinishReason.STOP
    assert world.lost == 1 and world.scheduler.is_idle
    assert world.scheduler.schedule(0) is None
    assert world.scheduler.update(second, [SampledToken(5)]) == []
    assert world.lost == 0 and story.sequence.token_ids == [1, 2, 3, min(STOP)]


@check
def a_cancelled_sequence_keeps_its_blocks_until_both_steps_are_over(code: Code) -> None:
    world = make(code)
    world.submit(Arrival(0, [1, 2, 3], 9))
    first, second = world.scheduler.schedule(0), world.scheduler.schedule(0)
    world.scheduler.cancel(0)
    assert world.scheduler.update(first, [SampledToken(5)]) == [] and world.lost == 1
    assert world.scheduler.update(second, [SampledToken(5)]) == [] and world.lost == 0


@check
def penalties_go_ahead_of_the_tokens_they_count(code: Code) -> None:
    world = make(code, num_blocks=40, max_draws=4)
    story = world.submit(Arrival(0, [1] * 20, 15, min_tokens=15, penalises=True))
    other = world.submit(Arrival(0, [2] * 5, 15, min_tokens=15))
    assert finish(world) == 6 and world.num_ahead == 5
    assert story.tokens == alone([1] * 20, 15, min_tokens=15, penalises=True)
    assert other.tokens == alone([2] * 5, 15, min_tokens=15)


@check
def penalties_know_how_many_tokens_they_do_not_know(code: Code) -> None:
    world = make(code, max_draws=4)
    world.submit(Arrival(0, [1, 2, 3], 20, min_tokens=20, penalises=True))
    first = world.scheduler.schedule(0, 4)
    missing = []
    for results in (1, 4, 4):
        behind = world.scheduler.schedule(0, 4)
        [row] = behind.rows
        missing.append(row.end - len(row.sequence.token_ids))
        world.scheduler.update(first, [SampledToken(5)] * results)
        first = behind
    assert missing == [1, 4, 4]


@check
def nobody_is_preempted_for_a_step_ahead(code: Code) -> None:
    world = make(code, num_blocks=7, budget=64)
    stories = [world.submit(Arrival(0, [n + 1] * 4, 12, min_tokens=12)) for n in range(2)]
    finish(world)
    assert world.num_ahead > 5
    assert [story.sequence.num_preemptions for story in stories] == [0, 1]
    assert all(s.tokens == alone(s.arrival.prompt, 12, min_tokens=12) for s in stories)


@check
def who_may_preempt_is_not_passed_by_a_step_ahead(code: Code) -> None:
    world = make(code, num_blocks=10, budget=64)
    world.submit(Arrival(0, [1] * 20, 8, min_tokens=8, priority=1))
    first = world.scheduler.schedule(0)
    world.submit(Arrival(0, [2] * 28, 2, min_tokens=2))
    assert world.scheduler.schedule(0) is None
    world.scheduler.update(first, world.device.launch(first).wait())
    assert [row.sequence.id for row in world.scheduler.schedule(0).rows] == [1]


@check
def what_was_dropped_is_computed_again(code: Code) -> None:
    world = make(code, num_blocks=40, budget=8, failing_ticks=frozenset({0}))
    failed = world.submit(Arrival(0, [1] * 8, 9))
    dropped = world.submit(Arrival(0, [2] * 5, 6, min_tokens=6))
    world.step()
    assert failed.final is not None and failed.final.error_code == "VRAM_OOM"
    assert dropped.final is None and dropped.sequence.num_scheduled_tokens == 0
    world.tick += 1
    finish(world)
    assert dropped.tokens == alone([2] * 5, 6, min_tokens=6) and world.lost == 0


@check
def stats_say_which_step_went_ahead(code: Code) -> None:
    world = make(code)
    world.submit(Arrival(0, [1, 2, 3], 3, min_tokens=3))
    found = []
    while world.step():
        stats = world.scheduler.stats(0.1)
        found.append((stats.ahead, stats.num_tokens, stats.num_prompt_tokens, stats.num_sampled))
    assert found == [(False, 3, 3, 1), (True, 1, 0, 1), (True, 1, 0, 1)]
