"""EngineClient alone: admission, dispatch, and that every sequence is cancelled exactly when it must be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from contextlib import aclosing

import pytest

from worker_orcd.engine.messages import Cancel, Output, Submit
from worker_orcd.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    DeviceError,
    Draining,
    DuplicateJob,
    Internal,
    InvalidParameter,
    OutOfMemory,
    QueueFull,
)
from worker_orcd.sequence import FinishReason, SampledToken, SamplingParams
from worker_orcd.server.client import EngineClient, Generation

WORK = Generation(
    prompt_token_ids=(1, 2), max_tokens=5, stop_token_ids=frozenset(), sampling=SamplingParams()
)


@pytest.fixture
async def sent():
    return []


@pytest.fixture
async def client(sent):
    return EngineClient(sent.append, loop=asyncio.get_running_loop(), max_queue=4, max_buffered_outputs=8)


def token(stream_id, token_id, finish=None):
    return Output(stream_id, (SampledToken(token_id),), finish_reason=finish)


async def generate(client, admission, request):
    """`follow` for a reader that is a task."""
    news = asyncio.Event()
    with contextlib.closing(client.follow(admission, request, news.set)) as outputs:
        for output in outputs:
            if output is not None:
                yield output
                continue
            await news.wait()
            news.clear()


async def collect(client, admission, seen):
    async with aclosing(generate(client, admission, WORK)) as outputs:
        async for output in outputs:
            seen.append(output.tokens[0].token_id)


async def begun(sent, number):
    async with asyncio.timeout(60):
        while len(sent) < number:
            await asyncio.sleep(0)
    return [command.id for command in sent if isinstance(command, Submit)]


async def test_outputs_reach_their_streams_in_order_from_another_thread(client, sent):
    seen = [[], []]
    with client.admit("a") as a, client.admit("b") as b:
        tasks = [
            asyncio.create_task(collect(client, job, into)) for job, into in zip((a, b), seen, strict=True)
        ]
        first, second = await begun(sent, 2)

        def engine():
            for k in range(100):
                client.publish([token(first, k), token(second, 1000 + k)])
            client.publish([token(first, 100, FinishReason.STOP), token(second, 1100, FinishReason.LENGTH)])

        client._max_buffered_outputs = 1000  # pyright: ignore[reportPrivateUsage]
        thread = threading.Thread(target=engine)
        thread.start()
        await asyncio.gather(*tasks)
        thread.join()
    assert seen == [list(range(101)), list(range(1000, 1101))]
    assert [command for command in sent if isinstance(command, Cancel)] == []
    assert client.num_admitted == 0


async def test_one_wake_up_a_step(client, sent, monkeypatch):
    calls = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: calls.append(call))
    client.publish([token(k, 0) for k in range(50)])
    assert len(calls) == 1


async def test_a_step_of_many_streams_leaves_turns_to_others(sent):
    """Outputs of three steps that came at once: each stream gets its own in order, a few at a time."""
    client = EngineClient(sent.append, loop=asyncio.get_running_loop(), max_queue=40)
    seen = [[] for _ in range(40)]
    with contextlib.ExitStack() as stack:
        admissions = [stack.enter_context(client.admit(f"j{k}")) for k in range(40)]
        pairs = zip(admissions, seen, strict=True)
        tasks = [asyncio.create_task(collect(client, job, into)) for job, into in pairs]
        ids = await begun(sent, 40)
        for k in range(3):
            client.publish([token(number, k, FinishReason.STOP if k == 2 else None) for number in ids])
        progress = [0]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            progress.append(sum(map(len, seen)))
        await asyncio.gather(*tasks)
    assert seen == [[0, 1, 2]] * 40
    assert max(after - before for before, after in itertools.pairwise(progress)) <= 16


class Reader:
    """Takes what there is whenever it is woken, as a stream of events does."""

    def __init__(self, client, admission):
        self.turns = []  # token ids of each time
        self.is_over = False
        self.failure = None
        self._outputs = client.follow(admission, WORK, self.take)
        self.take()

    def take(self):
        self.turns.append([])
        for output in self._outputs:
            if output is None:
                return
            self.turns[-1] += [token.token_id for token in output.tokens]
        self.is_over = True

    def close(self):
        self._outputs.close()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


async def test_a_reader_takes_all_there_is_at_once(client, sent):
    with client.admit("a") as job, contextlib.closing(Reader(client, job)) as reader:
        (stream_id,) = await begun(sent, 1)
        client.publish([token(stream_id, 0)])
        await until(lambda: len(reader.turns) == 2)
        for k in range(1, 4):  # before the loop has a turn
            client.publish([token(stream_id, k)])
        await until(lambda: len(reader.turns) == 3)
        client.publish([token(stream_id, 4, FinishReason.LENGTH)])
        await until(lambda: reader.is_over)
    assert reader.turns == [[], [0], [1, 2, 3], [4]]
    assert len(sent) == 1


async def test_a_burst_is_no_reason_to_lose_a_stream_that_is_read(client, sent):
    with client.admit("a") as job, contextlib.closing(Reader(client, job)) as reader:
        (stream_id,) = await begun(sent, 1)
        for k in range(30):  # the loop had other things to do; 8 may be buffered
            client.publish([token(stream_id, k, FinishReason.STOP if k == 29 else None)])
        await until(lambda: reader.is_over)
    assert list(itertools.chain(*reader.turns)) == list(range(30))


async def test_nor_is_one_burst_after_the_other(client, sent):
    with client.admit("a") as job, contextlib.closing(Reader(client, job)) as reader:
        (stream_id,) = await begun(sent, 1)
        for burst in range(3):
            for k in range(10 * burst, 10 * burst + 10):
                client.publish([token(stream_id, k, FinishReason.STOP if k == 29 else None)])
            await until(lambda last=k: reader.turns[-1][-1:] == [last])
        assert reader.is_over
    assert list(itertools.chain(*reader.turns)) == list(range(30))
    assert len(sent) == 1


async def test_a_stream_that_is_read_too_slowly_does_not_grow(client, sent):
    """Its reader takes one output whenever three have come."""
    with client.admit("a") as job:
        taken = []
        outputs = client.follow(job, WORK, lambda: taken.append(next(outputs)))
        assert next(outputs) is None
        (stream_id,) = await begun(sent, 1)
        for k in range(30):
            client.publish([token(stream_id, 3 * k + part) for part in range(3)])
            await asyncio.sleep(0.001)
            if len(sent) > 1:
                break
        assert sent[1:] == [Cancel(stream_id)]
        assert [output.tokens[0].token_id for output in taken] == list(range(len(taken)))
        assert len(taken) <= 8
        outputs.close()


async def test_a_reader_that_fails_stops_no_other(client, sent):
    def fault():
        raise ZeroDivisionError

    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    with (
        client.admit("a") as bad,
        client.admit("b") as job,
        contextlib.closing(client.follow(bad, WORK, fault)) as broken,
        contextlib.closing(Reader(client, job)) as reader,
    ):
        assert next(broken) is None
        ids = [command.id for command in sent]
        client.publish([token(number, 7, FinishReason.STOP) for number in sorted(ids, reverse=True)])
        client.publish([token(number, 8) for number in ids])
        await until(lambda: reader.is_over)
    assert reader.turns == [[], [7]]
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_whoever_cancels_does_not_wait_for_the_reader(client, sent):
    with client.admit("a") as job:
        told = []
        outputs = client.follow(job, WORK, lambda: told.append(True))
        assert next(outputs) is None
        client.cancel("a")
        assert (len(sent), told) == (2, [])
        await until(lambda: told)
        with pytest.raises(Cancelled):
            next(outputs)


async def test_leaving_the_generator_cancels_once(client, sent):
    with client.admit("a") as job:
        generator = generate(client, job, WORK)
        pending = asyncio.create_task(anext(generator))
        (stream_id,) = await begun(sent, 1)
        client.publish([token(stream_id, 7)])
        assert (await pending).tokens[0].token_id == 7
        await generator.aclose()
        await generator.aclose()
        assert sent[1:] == [Cancel(stream_id)]
        client.publish([token(stream_id, 8), Output(stream_id, finish_reason=FinishReason.CANCELLED)])
        await asyncio.sleep(0)
    assert sent[1:] == [Cancel(stream_id)]


async def test_a_task_that_is_cancelled_cancels_its_sequence(client, sent):
    with client.admit("a") as job:
        task = asyncio.create_task(collect(client, job, []))
        (stream_id,) = await begun(sent, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert sent[1:] == [Cancel(stream_id)]


async def test_giving_a_place_back_cancels_what_is_left(client, sent):
    job = client.admit("a")
    generator = generate(client, job, WORK)
    pending = asyncio.create_task(anext(generator))
    (stream_id,) = await begun(sent, 1)
    client.release(job)
    client.release(job)
    assert sent[1:] == [Cancel(stream_id)]
    assert client.num_admitted == 0
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    assert sent[1:] == [Cancel(stream_id)]


async def test_places(client):
    a = client.admit("a", num_sequences=3)
    with pytest.raises(DuplicateJob):
        client.admit("a")
    with pytest.raises(QueueFull, match="3 sequences waiting or running, 2 more asked for, at most 4"):
        client.admit("b", num_sequences=2)
    with pytest.raises(InvalidParameter, match="asks for 5 sequences at once; at most 4"):
        client.admit("c", num_sequences=5)
    b = client.admit("b")
    assert client.is_full
    assert client.num_admitted == 4
    client.release(a)
    client.release(b)
    assert client.num_admitted == 0
    assert await client.wait_idle(0)


async def test_draining(client):
    with client.admit("a"):
        client.begin_drain()
        with pytest.raises(Draining):
            client.admit("b")
        assert not await client.wait_idle(0.001)
    assert await client.wait_idle(0.001)


async def test_a_job_cancelled_before_it_is_submitted_never_is(client, sent):
    with client.admit("a") as job:
        assert client.cancel("a")
        with pytest.raises(Cancelled):
            await collect(client, job, [])
    assert sent == []
    assert not client.cancel("a")


async def test_cancelling_a_job_ends_all_its_sequences(client, sent):
    with client.admit("a", num_sequences=2) as job:
        tasks = [asyncio.create_task(collect(client, job, [])) for _ in range(2)]
        ids = await begun(sent, 2)
        assert client.cancel("a")
        assert client.cancel("a")
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Cancelled, Cancelled]
    assert sent[2:] == [Cancel(stream_id) for stream_id in ids]


async def test_a_cancel_that_comes_too_late_changes_nothing(client, sent):
    seen = []
    with client.admit("a") as job:
        task = asyncio.create_task(collect(client, job, seen))
        (stream_id,) = await begun(sent, 1)
        client._dispatch([token(stream_id, 1, FinishReason.STOP)])  # pyright: ignore[reportPrivateUsage]
        client.cancel("a")
        await task
    assert seen == [1]
    assert len(sent) == 1


async def test_a_stream_nobody_reads_is_cancelled_alone(client, sent):
    seen = []
    with client.admit("deaf") as deaf, client.admit("good") as good:
        unread = generate(client, deaf, WORK)
        first = asyncio.create_task(anext(unread))
        task = asyncio.create_task(collect(client, good, seen))
        deaf_id, good_id = await begun(sent, 2)
        client.publish([token(deaf_id, 0)])
        await first
        for k in range(9):
            client.publish([token(deaf_id, k), token(good_id, k)])
            await asyncio.sleep(0.001)
        assert sent[2:] == [Cancel(deaf_id)]
        client.publish([token(good_id, 9, FinishReason.LENGTH)])
        await task
        with pytest.raises(Cancelled, match="does not read"):
            await anext(unread)
    assert seen == list(range(10))
    assert sent[2:] == [Cancel(deaf_id)]


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ({"finish_reason": FinishReason.CANCELLED}, Cancelled),
        ({"finish_reason": FinishReason.DEADLINE}, DeadlineExceeded),
        ({"finish_reason": FinishReason.ERROR, "error_code": "VRAM_OOM", "error": "e"}, OutOfMemory),
        ({"finish_reason": FinishReason.ERROR, "error_code": "CUDA_ERROR", "error": "e"}, DeviceError),
        ({"finish_reason": FinishReason.ERROR, "error_code": "INTERNAL", "error": "e"}, Internal),
        (
            {"finish_reason": FinishReason.ERROR, "error_code": "INVALID_REQUEST", "error": "e"},
            ContextLengthExceeded,
        ),
        ({"finish_reason": FinishReason.ERROR, "error_code": "DRAINING", "error": "e"}, Draining),
        ({"finish_reason": FinishReason.ERROR}, Internal),
    ],
)
async def test_the_ways_to_fail(client, sent, output, error):
    with client.admit("a") as job:
        task = asyncio.create_task(collect(client, job, []))
        (stream_id,) = await begun(sent, 1)
        client.publish([Output(stream_id, **output)])
        with pytest.raises(error):
            await task
    assert len(sent) == 1  # what has ended is not cancelled


async def test_an_engine_that_takes_no_more_commands(client, monkeypatch):
    def closed(command):
        if isinstance(command, Submit):
            raise Draining("the worker is shutting down")

    monkeypatch.setattr(client, "_send", closed)
    with client.admit("a") as job, pytest.raises(Draining):
        await collect(client, job, [])
    assert client.num_admitted == 0


async def test_a_failed_engine(client, sent):
    with client.admit("a") as job:
        task = asyncio.create_task(collect(client, job, []))
        await begun(sent, 1)
        client.fail(DeviceError("lost"))
        with pytest.raises(DeviceError):
            await task
        with pytest.raises(DeviceError):
            client.admit("b")


async def test_news_after_the_loop_is_closed_goes_nowhere():
    loop = asyncio.new_event_loop()
    client = EngineClient(lambda _: None, loop=loop, max_queue=1)
    loop.close()
    client.publish([token(1, 1)])
