"""The engine's thread on a device that takes two steps: what is launched when, told when, and lost when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from engine_bench import SECONDS, Bench, Hand, check_last_outputs
from engine_fakes import alone

from worker_orcd.engine.messages import Cancel, Output
from worker_orcd.errors import DeviceError, Internal, OutOfMemory
from worker_orcd.sequence import FinishReason


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(max_steps=2)
    made.engine.start()
    yield made
    made.before_launch = made.before_wait = lambda: None
    assert made.engine.stop(SECONDS)


def at(number: int, error: BaseException) -> Callable[[], None]:
    """A hook that fails the time of that number, counted from 1."""
    calls = iter(range(1, 1000))

    def hook() -> None:
        if next(calls) == number:
            raise error

    return hook


def test_the_next_step_is_launched_before_this_one_is_waited_for(bench: Bench):
    launched: list[int] = []
    bench.before_wait = lambda: launched.append(bench.device.num_steps)
    bench.last(bench.submit([1, 2, 3], 5, min_tokens=5))
    assert launched == [2, 3, 4, 5, 5]
    bench.wait_for(lambda: len(bench.stats) == 5)
    assert [stats.ahead for stats in bench.stats] == [False, True, True, True, True]


def test_tokens_are_published_when_their_step_is_over_and_not_the_next(bench: Bench):
    hand = Hand(bench)
    number = bench.submit([1, 2, 3], 5, min_tokens=5)
    hand.until_held()
    for count in range(1, 4):
        hand.step()  # the next step is held
        assert len(bench.tokens(number)) == count
    hand.open()
    assert len(bench.last(number).tokens) == 1


def test_steps_take_as_long_as_they_keep_the_device(bench: Bench):
    now = [100.0]
    bench.clock = lambda: now[0]

    def compute() -> None:
        now[0] += 2.0

    bench.before_wait = compute
    bench.last(bench.submit([1, 2, 3], 4, min_tokens=4))
    bench.wait_for(lambda: len(bench.stats) == 4)
    assert [stats.seconds for stats in bench.stats] == [2.0] * 4
    now[0] += 50.0  # nothing is computed
    bench.last(bench.submit([1, 2, 3], 1))
    bench.wait_for(lambda: len(bench.stats) == 5)
    assert bench.stats[-1].seconds == 2.0


def test_who_ends_in_the_first_step_is_told_once_and_frees_its_blocks_after_the_second(bench: Bench):
    held: list[int] = []
    bench.before_wait = lambda: held.append(199 - bench.engine.snapshot.kv_blocks_free)
    numbers = [bench.submit([n % 7 + 1] * 3, 50) for n in range(60)]  # most end with a stop token
    for number in numbers:
        bench.last(number)
        assert bench.tokens(number) == alone([number % 7 + 1] * 3, 50, seed=number)
    check_last_outputs(bench, numbers)
    bench.wait_for(lambda: bench.engine.snapshot.kv_blocks_free == 199)
    assert max(held) > 8


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before_launch", "before_wait"])
def test_what_a_step_gave_before_one_failed_is_told(bench: Bench, where: str):
    setattr(bench, where, at(3, OutOfMemory("none left")))
    number = bench.submit([1, 2, 3], 9, min_tokens=9)
    output = bench.last(number)
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "VRAM_OOM")
    assert bench.tokens(number) == alone([1, 2, 3], 2, seed=number, min_tokens=9)
    other = bench.submit([1, 2, 3], 9, min_tokens=9)
    bench.last(other)
    assert bench.tokens(other) == alone([1, 2, 3], 9, seed=other, min_tokens=9)
    check_last_outputs(bench, [number, other])
    assert bench.log.getvalue().count("none left") == 1 and not bench.failures


def test_who_is_only_in_the_step_behind_one_that_failed_goes_on(bench: Bench):
    hand = Hand(bench)
    first = bench.submit([1] * 64, 9, min_tokens=9)  # all of a step
    hand.until_held()
    second = bench.submit([2] * 5, 9, min_tokens=9)
    hand.step()  # now the first's decode is held, and the second's prompt is in the step behind it
    assert bench.engine.snapshot.num_running == 2
    hand.open(Internal("no"))
    assert bench.last(first).error_code == "INTERNAL" and len(bench.tokens(first)) == 1
    assert bench.last(second).finish_reason is FinishReason.LENGTH
    assert bench.tokens(second) == alone([2] * 5, 9, seed=second, min_tokens=9)
    check_last_outputs(bench, [first, second])


def test_a_lost_device_is_told_once_and_nothing_is_left_under_way(bench: Bench):
    hand = Hand(bench)
    numbers = [bench.submit([n + 1] * 5, 50, min_tokens=50) for n in range(12)]
    hand.until_held()
    hand.open(DeviceError("the device is lost"))
    for number in numbers:
        assert bench.last(number).error_code == "CUDA_ERROR"
    bench.wait_for(lambda: len(bench.failures) == 1)
    bench.wait_for(lambda: bench.engine.snapshot.kv_blocks_free == 199)
    assert bench.last(bench.submit([1], 1)).error_code == "CUDA_ERROR"
    check_last_outputs(bench, numbers)
    assert bench.device.device.num_launched == bench.device.device.num_computed


def test_stopping_waits_for_both_steps(bench: Bench):
    hand = Hand(bench)
    numbers = [bench.submit([n + 1] * 5, 500, min_tokens=500) for n in range(12)]
    hand.until_held()
    hand.step()
    assert not bench.engine.stop(0)
    hand.open()
    assert bench.engine.stop(SECONDS)
    check_last_outputs(bench, numbers)
    assert all(bench.outputs[number][-1].finish_reason is FinishReason.CANCELLED for number in numbers)
    assert bench.device.device.num_launched == bench.device.device.num_computed
    assert bench.engine.snapshot.kv_blocks_free == 199


# -- bursts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("burst_seconds", "most"), [(0.0, 1), (1e-9, 1), (10.0, 4)])
def test_a_burst_is_as_many_tokens_as_there_is_time_for(burst_seconds: float, most: int):
    bench = Bench(max_steps=2, max_draws=4, burst_seconds=burst_seconds)
    numbers = [bench.submit([n + 1] * 5, 21, min_tokens=21) for n in range(3)]
    bench.engine.start()
    for number in numbers:
        assert bench.last(number).finish_reason is FinishReason.LENGTH
        assert bench.tokens(number) == alone([number + 1] * 5, 21, seed=number, min_tokens=21)
        assert max(len(output.tokens) for output in bench.outputs[number]) == most
    assert bench.engine.stop(SECONDS)
    assert max(stats.num_rounds for stats in bench.stats) == most
    assert sum(stats.num_sampled for stats in bench.stats) == 63


@pytest.mark.parametrize(("device_seconds", "most"), [(0.0, 8), (0.02, 1)])
def test_a_slow_host_does_more_at_once_for_a_fast_device_only(device_seconds: float, most: int):
    """Publishing takes longer than a burst may. Where the device is fast nobody can measure a round of it."""
    bench = Bench(max_steps=2, max_draws=8, burst_seconds=0.004)
    publish = bench.engine._publish

    def slowly(outputs: list[Output]) -> None:
        time.sleep(0.01)
        publish(outputs)

    bench.engine._publish = slowly
    bench.before_wait = lambda: time.sleep(device_seconds)
    numbers = [bench.submit([n + 1] * 5, 60, min_tokens=60) for n in range(2)]
    bench.engine.start()
    for number in numbers:
        assert bench.last(number).finish_reason is FinishReason.LENGTH
        assert bench.tokens(number) == alone([number + 1] * 5, 60, seed=number, min_tokens=60)
    assert bench.engine.stop(SECONDS)
    assert max(stats.num_rounds for stats in bench.stats) == most


# -- the same, whatever happens -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_draws", [1, 5])
@pytest.mark.parametrize("seed", range(8))
def test_a_storm_gives_the_answers_of_a_quiet_sea(seed: int, max_draws: int):
    """Cancels, deadlines that have passed, steps that fail, too few blocks: tokens are those of one alone."""
    generator = random.Random(seed)
    bench = Bench(max_steps=2, num_blocks=30, max_seqs=6, max_draws=max_draws, burst_seconds=1.0)
    fails = [False]

    def maybe_fail() -> None:
        fails[0] = generator.random() < 0.02
        if fails[0]:
            raise OutOfMemory("none left")

    bench.before_wait = bench.before_launch = maybe_fail
    bench.engine.start()
    wanted: dict[int, list[int]] = {}
    for _ in range(60):
        prompt = [generator.randrange(3) for _ in range(generator.randrange(1, 40))]
        length, least = generator.randrange(1, 25), generator.choice((0, 0, 20))
        deadline = generator.choice((None,) * 9 + (1.0,))
        number = bench.submit(
            prompt, length, min_tokens=least, priority=generator.choice((0, 0, 1)), deadline=deadline
        )
        wanted[number] = alone(prompt, length, seed=number, min_tokens=least)
        if generator.random() < 0.1:
            bench.engine.send(Cancel(generator.choice(list(wanted))))
    whole = 0
    for number, tokens in wanted.items():
        last: Output = bench.last(number)
        found = bench.tokens(number)
        if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert found == tokens
            whole += 1
        assert found == tokens[: len(found)]
    assert whole > 10
    check_last_outputs(bench, list(wanted))
    assert bench.engine.stop(SECONDS)
    assert bench.engine.snapshot.kv_blocks_free == 29
    assert any(stats.ahead for stats in bench.stats) and not bench.failures
    # The most that a step may draw it draws only where nothing of the storm falls into it.
    assert min(2, max_draws) <= max(stats.num_rounds for stats in bench.stats) <= max_draws
