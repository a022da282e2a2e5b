"""Faults of a worker's life: signals at every stage, whom it calls back, who does not read, the time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from typing import Any

from fault_worker import Bench, FaultWorker, Innocents, Row
from worker_client import HOST, Client, Exchange, free_port, parse_answer, require

GRACE = "60"
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
STALL_SECONDS = 30.0  # `server.protocol`
FILL_SECONDS = 200.0  # that a busy machine may take to fill the system's buffers, some MB a connection
DEAF = 2
HOUR = 3600.0

# -- signals -----------------------------------------------------------------------------------------------

LOST = {  # by others than the worker
    "streaming": "nothing: 4 streams finish, but for SIGKILL",
    "draining": "4 streams, cut",
}
STAGES = ("starting", "listening", "loading", "ready", "streaming", "draining", "calling back")


async def signals(bench: Bench) -> list[Row]:
    """SIGTERM, SIGINT and SIGKILL at every stage; the next worker takes the same port at once."""
    rows: list[Row] = []
    port = free_port()
    for stage in ("loading", "streaming") if bench.quick else STAGES:
        ends: list[str] = []
        for number in TOLD:
            code, seconds = await told_to_end(bench, port, stage, number)
            until = f"exit {code}" if code >= 0 else "killed by it"
            ends.append(f"{number.name}: {until}, {1000 * seconds:,.0f} ms")
        fault = "a second signal while draining" if stage == "draining" else f"a signal while {stage}"
        lost = LOST.get(stage, "nothing")
        rows.append(Row(fault, "no process, file or port is left", None, "; ".join(ends), lost))
    with FaultWorker(bench, port=port) as worker:  # what the last one left does not keep it from serving
        worker.until_ready()
    return rows


def wanted(stage: str, number: signal.Signals) -> int:
    """The exit code."""
    if number is signal.SIGKILL:
        return -signal.SIGKILL
    if stage == "starting":  # no handler is there; Python turns SIGINT into KeyboardInterrupt
        return 130 if number is signal.SIGINT else -number
    return 128 + number if stage == "draining" else 0  # there it is the second signal


async def told_to_end(bench: Bench, port: int, stage: str, number: signal.Signals) -> tuple[int, float]:
    """Exit code, and seconds to the end of the process."""
    options = ("--shutdown-grace-seconds", GRACE)
    orders = {"load": {"fraction": 0.3}} if stage == "loading" else None
    async with silence() as url:
        if stage == "calling back":
            options += ("--callback-url", url, "--callback-timeout-seconds", "60")
        with FaultWorker(bench, *options, orders=orders, port=port) as worker:
            return await at_stage(worker, stage, number)


async def at_stage(worker: FaultWorker, stage: str, number: signal.Signals) -> tuple[int, float]:
    what = f"{number.name} while {stage}"
    async with Client(worker.port) as client:
        streams = await reach(worker, client, stage)
        children = worker.children()
        begun = worker.signal(number)
        code, seconds = await worker.ended(begun)
        require(code == wanted(stage, number), f"{what}: exit code {code}\n{worker.log()}")
        require("Traceback" not in worker.log(), f"{what}: a traceback\n{worker.log()}")
        for stream in streams if code == 0 else ():
            answer = parse_answer(await stream.response())
            require(answer.end, f"{what}: a stream ended with {answer.error}")
        worker.require_no_traces(children)
    return code, seconds


async def reach(worker: FaultWorker, client: Client, stage: str) -> list[Exchange]:
    """Wait for the stage; the streams that run then."""
    match stage:
        case "starting":
            worker.until(lambda: "pydantic_core" in worker.maps(), "importing")
        case "listening":
            worker.until_listening()
        case "loading":
            worker.until_told("load")
        case _:
            worker.until_ready()
    if stage not in ("streaming", "draining"):
        return []
    streams: list[Exchange] = []
    job = {"prompt": "a grey cat", "max_tokens": 3000 if stage == "draining" else 400, "ignore_eos": True}
    for number in range(4):
        streams.append(await client.start("POST", "/execute", {**job, "job_id": f"stream-{number}"}))
        await streams[-1].until_marks(2)
    if stage == "draining":
        worker.signal(signal.SIGTERM)
        worker.until(lambda: worker.events("shutdown"), "draining")
    return streams


# -- the callback ------------------------------------------------------------------------------------------

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def endpoint(answer: Answering) -> AsyncGenerator[str]:
    """A server on a free port that answers like that; its URL."""
    tasks = set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}/ready"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def silence() -> contextlib.AbstractAsyncContextManager[str]:
    return endpoint(_hangs)


async def _hangs(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(HOUR)


async def _closes(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def _fails(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")


async def _babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"nothing of HTTP\r\n\r\n" * 20)


async def _drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte at a time, each within any time limit of its own."""
    await reader.readuntil(b"\r\n\r\n")
    for byte in b"HTTP/1.1 204 No Content\r\nx: " + b"y" * 100000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.05)


async def _never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


CALLED: tuple[tuple[str, Answering, str], ...] = (
    ("never answers", _hangs, "no answer in time"),
    ("closes the connection", _closes, "no connection"),
    ("answers 500", _fails, "it answered 500"),
    ("answers something else than HTTP", _babbles, "no connection"),
    ("answers a byte at a time", _drips, "no answer in time"),
    ("answers 500 with a body that never ends", _never_ends, "it answered 500"),
)


async def callback(bench: Bench) -> list[Row]:
    """Whom the worker calls back does not do its part: jobs run, it ends after the attempts."""
    rows: list[Row] = []
    options = (
        "--callback-attempts",
        "2",
        "--callback-timeout-seconds",
        "0.5",
        "--shutdown-grace-seconds",
        GRACE,
    )
    for what, answer, words in CALLED[4:5] if bench.quick else CALLED:
        async with endpoint(answer) as url:
            with FaultWorker(bench, *options, "--callback-url", url) as worker:
                await asyncio.to_thread(worker.until_ready)
                begun = time.monotonic()
                async with Client(worker.port) as client:
                    job = {"job_id": "meanwhile", "prompt": "a cat", "max_tokens": 100, "ignore_eos": True}
                    answered = parse_answer(await client.fetch("POST", "/execute", job))
                    require(answered.end, f"a job ended with {answered.error}")
                code, seconds = await worker.ended(begun, 20)
                require(code == 1, f"the callback {what}: exit code {code}")
                worker.require_one_sentence("INTERNAL", words, "attempt 2")
        happened = f"2 attempts of 0.5 s; “{words}”; a job meanwhile is answered"
        rows.append(
            Row(f"the callback's endpoint {what}", happened, seconds, "exit 1", "the worker, as it must")
        )
    return rows


# -- clients and clocks ------------------------------------------------------------------------------------


async def reader(bench: Bench) -> list[Row]:
    """A client that never reads loses its stream, not later than 30 s after its buffers are full."""
    with FaultWorker(bench, "--kv-cache-size-mb", "32") as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            free = (await client.health())["kv_blocks_free"]
            async with innocents:
                seconds = await until_deaf_ones_end(worker)
            lost = innocents.require_unharmed()
            await client.until(lambda health: health["kv_blocks_free"] == free, "blocks are back")
    happened = "their streams are cancelled, the connections closed, blocks are back"
    return [Row(f"{DEAF} clients never read", happened, seconds, "the last one's end", lost)]


async def until_deaf_ones_end(worker: FaultWorker) -> float:
    """Seconds from their requests to the end of their jobs."""
    body = {"prompt": "a cat", "ignore_eos": True, "max_tokens": 4000, "logprobs": 20}
    names = {f"deaf-{number}" for number in range(DEAF)}
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(deaf(worker.port, {**body, "job_id": name}))
        while left := names - outcomes(worker).keys():
            require(time.monotonic() - begun < FILL_SECONDS + STALL_SECONDS, f"unread streams go on: {left}")
            await asyncio.sleep(0.25)
    seconds = time.monotonic() - begun
    ends = {outcomes(worker)[name] for name in names}
    require(ends == {"cancelled"}, f"unread streams end with {ends}")
    return seconds


def outcomes(worker: FaultWorker) -> dict[str, str]:
    """Of the jobs that have ended."""
    told = [event for name in ("execute_end", "cancel", "error") for event in worker.events(name)]
    return {event["job_id"]: event["outcome"] for event in told if "outcome" in event}


def deaf(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection with a job, whose answer waits in as few bytes as the system allows."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((HOST, port))
    content = json.dumps(body).encode()
    head = f"POST /execute HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


async def clock(bench: Bench) -> list[Row]:
    """The wall clock jumps while streams run: deadlines, waits and answers are as before."""
    rows: list[Row] = []
    with FaultWorker(bench, "--kv-cache-size-mb", "32", orders={"wall": {"seconds": 0.0}}) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            for jump, words in ((HOUR, "ahead"), (-HOUR, "back")):
                async with innocents:
                    took, seconds = await deadlines(worker, client, jump)
                    answer = await innocents.run(0)
                told = datetime.fromisoformat(answer.started["started_at"]).timestamp() - time.time()
                require(abs(told - jump) < 60, f"the clock has not jumped: it is {told:.0f} s ahead")
                happened = f"a deadline of 400 ms strikes after {1000 * took:.0f} ms, one of 60 s does not"
                lost = innocents.require_unharmed()
                rows.append(Row(f"the wall clock jumps an hour {words}", happened, seconds, "answer", lost))
        worker.process.terminate()
        require(await asyncio.to_thread(worker.exit_code) == 0, "the exit code is not 0")
    return rows


async def deadlines(worker: FaultWorker, client: Client, jump: float) -> tuple[float, float]:
    """The seconds that a deadline takes to strike, and those from the jump to the end of a job in time."""
    job = {"prompt": "a cat", "ignore_eos": True}
    long = {**job, "job_id": "in-time", "max_tokens": 300, "deadline_ms": 60_000}
    in_time = await client.start("POST", "/execute", long)
    await in_time.until_marks(2)
    sent = time.monotonic()
    late = {**job, "job_id": "late", "max_tokens": 3500, "deadline_ms": 400}
    exchange = await client.start("POST", "/execute", late)
    await asyncio.sleep(0.1)
    jumped = time.monotonic()
    worker.orders.write("wall", {"seconds": jump})
    answer = parse_answer(await in_time.response())
    seconds = time.monotonic() - jumped
    require(answer.end, f"a job with a minute left ended with {answer.error}")
    error = parse_answer(await exchange.response()).error or {}
    took = exchange.ended_at - sent
    require(error.get("code") == "DEADLINE_EXCEEDED", f"a deadline did not strike: {error}")
    require(0.39 < took < 5, f"a deadline of 400 ms struck after {took:.2f} s")
    return took, seconds
