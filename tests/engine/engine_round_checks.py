"""What a scheduler promises of steps in which rows draw several tokens, one example each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_block_checks import Check
from engine_fakes import STOP, alone
from engine_world import Arrival, Code, Scenario, World

from worker_orcd.sequence import FinishReason, RowFailure, SampledToken

ROUND_CHECKS: list[Check] = []


def check(function: Check) -> Check:
    ROUND_CHECKS.append(function)
    return function


def make(code: Code, **sizes: Any) -> World:
    return World(code, Scenario(arrivals=[], **({"max_draws": 4, "num_blocks": 40} | sizes)))


def finish(world: World) -> list[int]:
    """The rounds of each step."""
    found = []
    while world.step():
        world.tick += 1
        found.append(world.scheduler.stats(0.1).num_rounds)
    return found


def told(world: World, max_draws: int = 4) -> list[tuple[int, int, int]]:
    """The rows of the next step: sequence, start, draws."""
    step = world.scheduler.schedule(0, max_draws)
    return [(row.sequence.id, row.start, row.num_draws) for row in step.rows]


def before_rounds(code: Code) -> tuple[World, Any]:
    """A sequence that has had a token, and a step in which it draws four."""
    world = make(code)
    world.submit(Arrival(0, [1, 2, 3], 9))
    world.scheduler.update(world.scheduler.schedule(0), [SampledToken(5)])
    return world, world.scheduler.schedule(0, 4)


@check
def decodes_are_in_rounds_and_prompts_are_not(code: Code) -> None:
    world = make(code)
    story = world.submit(Arrival(0, [1, 2, 3], 10, min_tokens=10))
    assert finish(world) == [1, 4, 4, 1]
    assert story.tokens == alone([1, 2, 3], 10, min_tokens=10)


@check
def penalties_and_biases_do_not_end_rounds(code: Code) -> None:
    world = make(code)
    story = world.submit(Arrival(0, [1, 2, 3], 10, min_tokens=10, penalises=True))
    story.sequence.sampling = replace(story.sequence.sampling, logit_bias=((3, 1.0),))
    assert finish(world) == [1, 4, 4, 1]
    assert story.tokens == alone([1, 2, 3], 10, min_tokens=10, penalises=True)


@check
def who_ends_first_draws_fewer(code: Code) -> None:
    world = make(code)
    world.submit(Arrival(0, [1, 2, 3], 3, min_tokens=3))
    world.submit(Arrival(0, [4, 5], 9, min_tokens=9))
    world.step()
    assert (found := told(world)) == [(0, 3, 2), (1, 2, 4)], found


@check
def a_round_behind_a_stop_is_thrown_away(code: Code) -> None:
    world, step = before_rounds(code)
    results = [SampledToken(token) for token in (6, min(STOP), 7, 8)]
    [output] = world.scheduler.update(step, results)
    assert output.finish_reason is FinishReason.STOP
    assert [token.token_id for token in output.tokens] == [6, min(STOP)]
    assert world.scheduler.stats(0.1).num_sampled == 2 and world.lost == 0


@check
def a_failure_in_a_round_comes_behind_the_tokens_before_it(code: Code) -> None:
    world, step = before_rounds(code)
    failure = RowFailure("INTERNAL", "made to fail")
    news, last = world.scheduler.update(step, [SampledToken(6), failure, SampledToken(7), failure])
    assert [token.token_id for token in news.tokens] == [6] and news.finish_reason is None
    assert (last.tokens, last.error) == ((), "made to fail") and world.lost == 0


@check
def rounds_leave_a_block_for_each(code: Code) -> None:
    """One more would be for a token that may never come."""
    for num_blocks, rounds in ((5, 1), (6, 1), (7, 4)):
        world = make(code, num_blocks=num_blocks)
        for number in range(2):
            world.submit(Arrival(0, [number] * 3, 5, min_tokens=5))
        world.step()
        assert max(draws for _id, _start, draws in told(world)) == rounds, num_blocks


@check
def min_tokens_ends_a_step_s_rounds(code: Code) -> None:
    """What may be drawn changes then; not where it never does."""
    for min_tokens, draws in ((3, 2), (5, 4), (9, 4)):
        world = make(code)
        world.submit(Arrival(0, [1, 2, 3], 9, min_tokens=min_tokens))
        world.step()
        assert told(world) == [(0, 3, draws)]


@check
def rounds_end_with_the_first_where_somebody_waits(code: Code) -> None:
    world = make(code, max_seqs=2)
    for length in (4, 9, 5):
        world.submit(Arrival(0, [1, 2, length], length, min_tokens=length))
    world.step()
    assert told(world) == [(0, 3, 3), (1, 3, 3)]


@check
def a_step_ahead_of_rounds_goes_on_behind_them(code: Code) -> None:
    world = make(code, max_steps=2)
    story = world.submit(Arrival(0, [1, 2, 3], 20, min_tokens=20))
    world.step()
    steps = [(row.start, row.num_draws, row.previous_draw) for step, _ in world.launched for row in step.rows]
    assert steps == [(3, 4, 0)]
    finish(world)
    assert story.tokens == alone([1, 2, 3], 20, min_tokens=20)


@check
def nobody_waits_for_rounds_of_those_before_him(code: Code) -> None:
    """Four decode in turns of three."""
    world = make(code, budget=3)
    for number in range(4):
        world.submit(Arrival(0, [number], 9, min_tokens=9))
    for _ in range(2):
        world.step()
    assert told(world) == [(0, 2, 1), (1, 2, 1), (2, 2, 1)]
