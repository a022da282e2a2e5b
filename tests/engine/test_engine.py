"""The engine's thread: order, faults, cancellation, shutdown."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from engine_bench import SECONDS, Bench, Hand, check_last_outputs, raises
from engine_fakes import alone

from worker_orcd.engine.messages import Cancel
from worker_orcd.errors import DeviceError, Draining, Internal, OutOfMemory
from worker_orcd.sequence import FinishReason


@pytest.fixture(params=[1, 2], ids=["one step", "two steps"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(max_steps=request.param)
    made.engine.start()
    yield made
    made.before_launch = made.before_wait = lambda: None
    assert made.engine.stop(SECONDS)


def test_answers_come_in_order_and_whole(bench: Bench):
    prompts = [[i % 5 + 1] * (3 + i) for i in range(20)]
    numbers = [bench.submit(prompt, 9, min_tokens=4) for prompt in prompts]
    for number, prompt in zip(numbers, prompts, strict=True):
        assert bench.last(number).finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert bench.tokens(number) == alone(prompt, 9, seed=number, min_tokens=4)
    check_last_outputs(bench, numbers)


def test_a_step_is_published_while_the_next_one_computes(bench: Bench):
    published_before_wait: list[int] = []
    bench.before_wait = lambda: published_before_wait.append(len(bench.batches))
    number = bench.submit([1, 2, 3], 4, min_tokens=4)
    bench.last(number)
    assert published_before_wait == [0, 1, 2, 3]
    assert [len(batch) for batch in bench.batches] == [1, 1, 1, 1]


def test_a_thousand_quick_submits(bench: Bench):
    numbers = [bench.submit([i % 7 + 1, i % 11 + 1, 3], 2, min_tokens=2) for i in range(1000)]
    for number in numbers:
        assert bench.last(number).finish_reason is not None
        assert bench.tokens(number) == alone(
            [number % 7 + 1, number % 11 + 1, 3], 2, seed=number, min_tokens=2
        )
    check_last_outputs(bench, numbers)
    assert bench.engine.snapshot.kv_blocks_free == bench.engine.snapshot.kv_blocks_total == 199


def test_a_refused_submit_gets_its_only_output(bench: Bench):
    output = bench.last(bench.submit([1] * 900, 9))
    assert output.error_code == "INVALID_REQUEST" and "900 prompt tokens" in (output.error or "")


def test_an_id_in_use_leaves_its_owner_alone(bench: Bench):
    gate = threading.Event()
    bench.before_wait = lambda: gate.wait(SECONDS) and None
    number = bench.submit([1, 2, 3], 5, min_tokens=5)
    bench.ids = itertools.count(number)
    bench.submit([9, 9], 5)
    gate.set()
    bench.last(number)
    assert bench.tokens(number) == alone([1, 2, 3], 5, seed=number, min_tokens=5)
    assert "in use" in bench.log.getvalue()


# -- cancelling and deadlines ------------------------------------------------------------------------------


def test_cancelling_takes_at_most_one_step_and_frees_the_blocks(bench: Bench):
    hand = Hand(bench)
    numbers = [bench.submit([i + 1] * 8, 500, min_tokens=500) for i in range(12)]  # eight run, four wait
    hand.until_held()
    while len(bench.outputs[7]) < 2:
        hand.step()
    for number in (3, 10):
        bench.engine.send(Cancel(number))  # a step is in flight
        hand.step()
        assert bench.last(number).finish_reason is FinishReason.CANCELLED  # and the next still computes
    bench.engine.send(Cancel(3))
    bench.engine.send(Cancel(12345))
    for number in numbers:
        bench.engine.send(Cancel(number))
    hand.open()
    for number in numbers:
        assert bench.last(number).finish_reason is FinishReason.CANCELLED
    snapshot = bench.engine.snapshot  # replaced before the last outputs were published
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.kv_blocks_free) == (0, 0, 199)
    check_last_outputs(bench, numbers)


def test_counts_are_told_while_a_step_computes(bench: Bench):
    """A prompt that is being computed runs already; what was cancelled before holds nothing any more."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        snapshot = bench.engine.snapshot
        seen.append((snapshot.num_running, 199 - snapshot.kv_blocks_free))
        if len(seen) == 1:
            assert bench.submit([2] * 40, 50, min_tokens=50) == 1
        elif len(seen) == 2:
            bench.engine.send(Cancel(1))

    bench.before_wait = look
    bench.last(bench.submit([1] * 8, 4, min_tokens=4))
    if bench.device.max_steps == 1:
        assert seen == [(1, 2), (2, 13), (1, 3), (1, 3)]
    else:  # a step ahead holds a block already, and what was cancelled keeps its own until both are over
        assert seen == [(1, 3), (2, 13), (1, 13), (1, 3)]


def test_a_deadline_ends_a_running_sequence(bench: Bench):
    now = [100.0]
    bench.clock = lambda: now[0]

    def pass_the_deadline() -> None:
        if bench.device.num_steps == 20:
            now[0] = 101.0

    bench.before_wait = pass_the_deadline
    number = bench.submit([1, 2, 3], 400, min_tokens=400, deadline=101.0)
    late = bench.submit([1, 2, 3], 400, deadline=99.0)
    output = bench.last(number)
    assert (output.finish_reason, output.tokens) == (FinishReason.DEADLINE, ())
    known = 21 - bench.device.max_steps  # a step ahead is under way, for nothing
    assert bench.tokens(number) == alone([1, 2, 3], known, seed=number, min_tokens=20)
    assert bench.last(late).finish_reason is FinishReason.DEADLINE and not bench.tokens(late)


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before_launch", "before_wait"])
def test_a_failed_step_ends_its_sequences_only(bench: Bench, where: str):
    setattr(bench, where, raises(OutOfMemory("the device has no memory left")))
    output = bench.last(bench.submit([1, 2, 3], 5))
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "VRAM_OOM")
    assert output.error == "the device has no memory left"
    number = bench.submit([1, 2, 3], 5, min_tokens=5)
    bench.last(number)
    assert bench.tokens(number) == alone([1, 2, 3], 5, seed=number, min_tokens=5)
    assert not bench.failures and not bench.engine.snapshot.failed
    assert bench.engine.snapshot.kv_blocks_free == 199


def test_an_unexpected_exception_is_told_by_reference(bench: Bench):
    bench.before_wait = raises(ZeroDivisionError("secret detail at 0x7f00"))
    output = bench.last(bench.submit([1, 2, 3], 5))
    assert output.error_code == "INTERNAL" and output.error is not None
    assert output.error.startswith("internal error, reference ") and "secret" not in output.error
    [event] = [e for e in bench.events() if "exception" in e]
    assert event["reference"] in output.error
    assert "secret detail" in event["exception"] and "Traceback" in event["exception"]


def test_failing_steps_in_a_row_end_the_engine(bench: Bench):
    bench.before_wait = raises(Internal("no"), times=99)
    for _ in range(2):
        bench.last(bench.submit([1, 2, 3], 2))
    bench.before_wait = lambda: None
    number = bench.submit([1, 2, 3], 2)  # succeeds: the row of failures is broken
    assert bench.last(number).finish_reason is not FinishReason.ERROR
    bench.before_wait = raises(Internal("no"), times=99)
    for _ in range(3):
        assert bench.last(bench.submit([1, 2, 3], 2)).error_code == "INTERNAL"
    bench.wait_for(lambda: bench.engine.snapshot.failed)
    assert bench.last(bench.submit([1, 2, 3], 2)).error_code == "INTERNAL"
    assert len(bench.failures) == 1


@pytest.mark.parametrize("where", ["before_launch", "before_wait"])
@pytest.mark.parametrize("error", [OutOfMemory("none left"), MemoryError()], ids=["device", "host"])
def test_memory_that_runs_out_again_and_again_ends_jobs_and_not_the_engine(
    bench: Bench, where: str, error: Exception
):
    setattr(bench, where, raises(error, times=99))
    for _ in range(5):
        assert bench.last(bench.submit([1, 2, 3], 2)).error_code == "VRAM_OOM"
    setattr(bench, where, lambda: None)
    number = bench.submit([1, 2, 3], 5, min_tokens=5)
    bench.last(number)
    assert bench.tokens(number) == alone([1, 2, 3], 5, seed=number, min_tokens=5)
    assert not [event for event in bench.events() if "exception" in event]
    assert not bench.failures and not bench.engine.snapshot.failed


def test_a_lost_device_ends_everything_once(bench: Bench):
    gate = threading.Event()
    bench.before_wait = lambda: gate.wait(SECONDS) and None
    numbers = [bench.submit([i + 1] * 5, 50, min_tokens=50) for i in range(12)]

    def lose() -> None:
        raise DeviceError("the device is lost")

    bench.before_wait = lose
    gate.set()
    for number in numbers:
        output = bench.last(number)
        assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "CUDA_ERROR")
    late = bench.submit([1], 1)
    assert bench.last(late).error_code == "CUDA_ERROR"
    bench.engine.send(Cancel(late))
    check_last_outputs(bench, [*numbers, late])
    assert [type(error) for error in bench.failures] == [DeviceError]
    assert bench.engine.snapshot.failed and bench.engine.snapshot.num_running == 0


def test_a_fault_in_the_scheduler_ends_everything(bench: Bench):
    hand = Hand(bench)
    number = bench.submit([1, 2, 3], 500, min_tokens=500)
    hand.until_held()
    hand.step()
    bench.scheduler.schedule = raises(RuntimeError("a bug"), times=99)  # type: ignore[method-assign]
    hand.open()
    output = bench.last(number)
    assert output.error_code == "INTERNAL" and "reference" in (output.error or "")
    bench.wait_for(lambda: len(bench.failures) == 1)  # told after the outputs
    check_last_outputs(bench, [number])


def test_a_runner_that_miscounts_fails_the_step(bench: Bench):
    original = bench.device.device.compute
    bench.device.device.compute = lambda pending: original(pending)[:-1]  # type: ignore[method-assign]
    output = bench.last(bench.submit([1, 2, 3], 5))
    assert output.error_code == "INTERNAL" and "0 results instead of 1" in (output.error or "")


def test_a_broken_listener_does_not_stop_the_engine():
    broken = [True]
    bench = Bench(
        publish=lambda outputs: (
            raises(ValueError("nobody listens"))() if broken[0] else bench.publish(outputs)
        )
    )
    bench.on_step = raises(ValueError("no metrics"), times=99)  # type: ignore[method-assign,assignment]
    bench.engine.start()
    bench.submit([1, 2, 3], 2)
    deadline = time.monotonic() + SECONDS
    while bench.log.getvalue().count("could not be delivered") < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    broken[0] = False
    number = bench.submit([1, 2, 3], 2, min_tokens=2)
    assert bench.last(number).finish_reason is FinishReason.LENGTH
    assert bench.engine.stop(SECONDS)
    assert "metrics" in bench.log.getvalue() and not bench.failures


# -- stopping ----------------------------------------------------------------------------------------------


def test_stop_cancels_what_is_left_and_loses_nobody():
    bench = Bench()
    bench.engine.start()
    done = threading.Event()
    sent: list[int] = []

    def keep_submitting() -> None:
        with pytest.raises(Draining):
            while True:
                number = bench.submit([1, 2, 3], 30, min_tokens=30)
                with bench.news:
                    sent.append(number)
                    bench.news.notify_all()
                time.sleep(0.0005)
        done.set()

    submitter = threading.Thread(target=keep_submitting)
    submitter.start()
    bench.wait_for(lambda: len(sent) > 10)
    hand = Hand(bench)
    hand.until_held()
    num_sent = len(sent)
    bench.wait_for(lambda: len(sent) > num_sent + 1)  # the last of these comes after the step in flight
    assert not bench.engine.stop(0)
    hand.open()
    assert bench.engine.stop(SECONDS)
    assert done.wait(SECONDS)
    submitter.join()
    check_last_outputs(bench, sent)
    assert any(bench.outputs[n][-1].finish_reason is FinishReason.CANCELLED for n in sent)
    bench.engine.send(Cancel(sent[0]))  # nothing to do, nothing to complain about
    assert bench.engine.stop(SECONDS)


def test_stop_says_when_the_device_hangs():
    bench = Bench()
    hand = Hand(bench)
    bench.engine.start()
    bench.submit([1, 2, 3], 5)
    hand.until_held()
    assert not bench.engine.stop(0.05)
    hand.open()
    assert bench.engine.stop(SECONDS)


def test_an_engine_that_never_started_can_be_stopped():
    assert Bench().engine.stop(SECONDS)


def test_observer_and_snapshot_tell_of_each_step(bench: Bench):
    number = bench.submit([1] * 9, 6, min_tokens=6)
    bench.last(number)
    bench.wait_for(lambda: len(bench.stats) == 6)
    assert [s.num_tokens for s in bench.stats] == [9, 1, 1, 1, 1, 1]
    assert sum(s.num_sampled for s in bench.stats) == 6 and bench.stats[0].num_prompt_tokens == 9
    assert all(s.seconds > 0 for s in bench.stats)
    assert bench.stats[-1].num_running == 0 and bench.stats[-1].kv_groups[0].free == 199
