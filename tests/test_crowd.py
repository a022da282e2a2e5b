"""
Sixty-four streams on a real worker with the real model, and what other clients may do to them: nothing.

The worker is a process of its own, spoken to over HTTP. The checks are those of `benchmarks/crowd.py`, which
also measures; here a time fails only what is wrong altogether.
"""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crowd_checks import (
    SPARE_QUEUE,
    Crowd,
    Freed,
    Way,
    drain,
    free_blocks,
    make_jobs,
    make_mischief,
    until_idle,
)
from worker_client import (
    Answer,
    Client,
    HealthPoller,
    Response,
    WorkerProcess,
    Wrong,
    parse_answer,
    parse_response,
)
from worker_orcd.worker.priority import COMPUTE_NICENESS

CROWD = 64
LATE_SECONDS = 10.0  # beyond a step; a job that goes on to its end holds its blocks for a minute
JOBS = make_jobs(CROWD, words=(3, 12, 30, 60), tokens=(5, 16), longest=100)
OPTIONS = ("--max-queue", str(CROWD + SPARE_QUEUE), "--shutdown-grace-seconds", "600")

LONG = pytest.mark.timeout(3600)  # a minute each on a quiet machine, and the first waits for `alone`

# -- a real worker -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(demo_model: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(str(demo_model), *OPTIONS, "--kv-cache-size-mb", "600") as process:
        yield process


@pytest.fixture(scope="module")
def alone(worker: WorkerProcess) -> list[Answer]:
    """Every job by itself, with a cold and a warm prefix cache."""

    async def run() -> list[Answer]:
        async with Client(worker.port) as client:
            crowd = Crowd(client, JOBS)
            await crowd.run_alone()
            return crowd.alone

    return asyncio.run(run())


@pytest.mark.model
@pytest.mark.slow
@LONG
async def test_streams_are_equal_to_alone_whatever_others_do(worker: WorkerProcess, alone: list[Answer]):
    """Cold and warm; with nonsense, a full queue and cancelled jobs meanwhile; and /health answers."""
    async with Client(worker.port) as client:
        crowd = Crowd(client, JOBS, alone)
        at_start = await client.health()
        poller = HealthPoller(worker.port)
        began = time.monotonic()
        await crowd.run_together("crowd")
        mischief = asyncio.create_task(make_mischief(client))
        warm = await crowd.run_together("crowd", among=[mischief])
        seconds, whole = sorted(poller.stop()), time.monotonic() - began
        assert len(seconds) > 20 and seconds[len(seconds) * 95 // 100] < whole / 20
        assert sum(answer.started["cached_tokens"] for answer in warm.answers) > 0
        await until_idle(client, at_start["kv_blocks_free"])
        assert await client.health() | {"uptime_seconds": 0} == at_start | {"uptime_seconds": 0}


@pytest.mark.model
@pytest.mark.slow
@LONG
async def test_jobs_that_end_early_give_their_blocks_back_and_disturb_nobody(
    worker: WorkerProcess, alone: list[Answer]
):
    async with Client(worker.port) as client:
        free = (await client.health())["kv_blocks_free"]
        ended = await free_blocks(Crowd(client, JOBS, alone), 1, size=4)
        assert {freed.way.name: max(freed.late) for freed in ended if max(freed.late) > LATE_SECONDS} == {}
        await until_idle(client, free)


@pytest.mark.model
@pytest.mark.slow
@LONG
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # of its client, cut off
)
async def test_another_worker_gives_the_same_and_drains(demo_model: Path, alone: list[Answer]):
    """One thread, small chunks, few blocks, jobs preempted for an urgent one; SIGTERM while jobs run."""
    options = ("--cpu-threads", "1", "--max-num-batched-tokens", "96", "--kv-cache-size-mb", "20")
    with WorkerProcess(str(demo_model), *OPTIONS, *options) as worker:
        async with Client(worker.port) as client:
            crowd = Crowd(client, JOBS, alone)
            free = (await client.health())["kv_blocks_free"]
            await crowd.run_together("crowd", among=[asyncio.create_task(urge(client, free // 2))])
            metrics = (await client.fetch("GET", "/metrics")).body.decode()
            assert "worker_preemptions_total" in metrics and "worker_preemptions_total 0.0\n" not in metrics
            await until_idle(client, free)
            await drain(crowd, worker, 8)
        assert worker.process.returncode == 0
        told = [json.loads(line)["event"] for line in worker.log().splitlines()]
        assert "error" not in told and told[-1] == "shutdown"


@pytest.mark.model
@pytest.mark.slow
@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="threads have ranks of their own on Linux")
def test_what_computes_gives_way_to_what_answers(worker: WorkerProcess, alone: list[Answer]):
    assert alone
    loop = worker.process.pid
    threads = {int(task.name): task for task in Path(f"/proc/{loop}/task").iterdir()}
    fields = {
        thread: (task / "stat").read_text().rpartition(")")[2].split() for thread, task in threads.items()
    }
    niceness = {thread: int(values[16]) for thread, values in fields.items()}
    work = {thread: int(values[11]) for thread, values in fields.items() if thread != loop}
    most = max(work, key=lambda thread: work[thread])
    assert niceness[most] == niceness[loop] + COMPUTE_NICENESS
    gives_way = sum(work[thread] for thread in work if niceness[thread] == niceness[most])
    assert gives_way > 0.7 * sum(work.values())  # the rest: loading, reading prompts


async def urge(client: Client, num_blocks: int) -> None:
    """A job for which others must give their blocks up."""
    await client.until(lambda health: health["kv_blocks_free"] < num_blocks, "the others have their blocks")
    job = {"prompt_token_ids": list(range(1000, 1000 + 16 * num_blocks)), "max_tokens": 4, "priority": -1}
    answer = parse_answer(await client.fetch("POST", "/execute", {**job, "job_id": "urgent"}))
    assert answer.error is None and answer.tokens


# -- the checks themselves ---------------------------------------------------------------------------------


def stream(*events: tuple[str, dict[str, object]]) -> Response:
    frames = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events]
    return Response(200, {}, ": keep-alive\n\n".join(["", *frames]).encode())


STARTED = ("started", {"cached_tokens": 0})
TOKENS = [("token", {"t": t, "i": i, "id": 10 + i}) for i, t in enumerate("abc")]
METRICS = ("metrics", {"tokens_out": 3})
END = ("end", {"tokens_out": 3, "stop_reason": "length", "matched_stop": None})
ERROR = ("error", {"code": "CANCELLED"})


def test_a_well_formed_stream_is_taken_apart():
    answer = parse_answer(
        stream(STARTED, TOKENS[0], ("metrics", {"tokens_out": 1}), *TOKENS[1:], METRICS, END)
    )
    assert (answer.text, answer.ids, answer.error) == ("abc", [10, 11, 12], None)
    assert answer.outcome != parse_answer(stream(STARTED, TOKENS[0], ERROR)).outcome


@pytest.mark.parametrize(
    "events",
    [
        [],
        [*TOKENS, METRICS, END],
        [STARTED, STARTED, *TOKENS, METRICS, END],
        [STARTED, *TOKENS, METRICS],
        [STARTED, *TOKENS, END],
        [STARTED, *TOKENS, METRICS, END, END],
        [STARTED, *TOKENS, METRICS, END, ERROR],
        [STARTED, *TOKENS, METRICS, END, METRICS],
        [STARTED, TOKENS[0], TOKENS[2], METRICS, END],
        [STARTED, TOKENS[1], TOKENS[0], TOKENS[2], METRICS, END],
        [STARTED, TOKENS[0], TOKENS[0], TOKENS[1], TOKENS[2], METRICS, END],
        [STARTED, *TOKENS[:2], METRICS, END],
        [STARTED, *TOKENS[:2], ("metrics", {"tokens_out": 3}), TOKENS[2], END],
        [STARTED, *TOKENS, METRICS, ("other", {}), END],
    ],
)
def test_a_stream_that_is_not_is_told(events: list[tuple[str, dict[str, object]]]):
    with pytest.raises(Wrong):
        parse_answer(stream(*events))


@pytest.mark.parametrize(
    "body", [b"event: started\n", b"data: {}\n\n", b"event: started\ndata: {}\ndata: {}\n\n"]
)
def test_a_malformed_frame_is_told(body: bytes):
    with pytest.raises(Wrong):
        parse_answer(Response(200, {}, body))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_response_is_taken_apart():
    response = parse_response(CHUNKED + b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n")
    assert (response.status, response.body) == (200, b"abc0123456789")
    plain = parse_response(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nX-A: b\r\n\r\n{}")
    assert (plain.status, plain.headers["x-a"], plain.json()) == (404, "b", {})


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"3\r\nab",
        CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n\r\nmore",
    ],
)
def test_a_broken_response_is_told(data: bytes):
    with pytest.raises(Wrong):
        parse_response(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.tokens[1].update(id=99),
        lambda answer: answer.tokens[2].update(logprob=-0.1),
        lambda answer: answer.tokens.pop(),
        lambda answer: answer.end.update(stop_reason="stop"),
        lambda answer: setattr(answer, "error", {"code": "INTERNAL"}),
    ],
)
async def test_another_outcome_is_told(change: Callable[[Answer], object]):
    def told() -> Answer:
        return parse_answer(stream(STARTED, *TOKENS, METRICS, END))

    crowd = Crowd(Client(0), [{}], [told()])
    crowd.compare([told()], "once more")
    other = told()
    change(other)
    with pytest.raises(Wrong, match="job 0"):
        crowd.compare([other], "changed")


def test_lateness_is_beyond_the_step():
    freed = Freed(Way("any"), [0.30, 0.01], [0.25, 0.02])
    assert freed.late == pytest.approx([0.05, 0.0])


@pytest.mark.slow
def test_a_worker_that_does_not_start_is_told():
    with pytest.raises(Wrong, match=r"ended before it was ready(.|\n)*no-such-option"):
        WorkerProcess("demo", "--no-such-option")


def test_jobs_are_the_same_in_every_run():
    made = "make_jobs(32, words=(3, 9), tokens=(5, 9), longest=20)"
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}; from crowd_checks import *; print({made})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    jobs = make_jobs(32, words=(3, 9), tokens=(5, 9), longest=20)
    assert ast.literal_eval(done.stdout) == jobs
    assert len({json.dumps(job) for job in jobs}) == len(jobs)
