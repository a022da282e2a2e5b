"""Real sockets: clients that hang up, never read, write slowly or write too much, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import time
from types import SimpleNamespace

import httpx
import pytest

from worker_orcd.server.protocol import HEAD_SECONDS, BoundedProtocol, HttpPeer

Http = functools.partial(httpx.AsyncClient, timeout=60)


def request(path, body, **headers):
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [
        f"Content-Length: {len(data)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + data


@contextlib.asynccontextmanager
async def connection(port, data=b"", **options):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


UNFINISHED = request("/execute", {"job_id": "j", "prompt": "x"})[:-10]
LONG = {"ignore_eos": True, "max_tokens": 400}
CALLS = [
    ("/execute", {"job_id": "j", "prompt": "x", **LONG}),
    ("/v1/completions", {"prompt": "x", "stream": True, **LONG}),
    ("/v1/completions", {"prompt": "x", "stream": False, **LONG}),
    ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "stream": True, **LONG}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True, **LONG}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **LONG}),
]


def tasks_of(package):
    """Tasks that still run a coroutine of this package."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return [c for c in coroutines if package in c.cr_code.co_filename]


@pytest.mark.parametrize("waiting", [False, True], ids=["generating", "queued"])
@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_hanging_up_cancels(world, eventually, path, body, waiting):
    w = world()
    w.engine.step_seconds = 0.05  # 400 of them last much longer than it takes to hang up
    w.engine.answer = lambda _: [65]
    if waiting:
        w.engine.go.clear()
    sequences = len(body["prompt"]) * body["n"] if "n" in body else 1
    async with w.listen() as port:
        async with connection(port, request(path, body)) as (reader, _):
            await eventually(lambda: len(w.engine.submitted) == sequences)
            if body.get("stream", path == "/execute"):
                await reader.readuntil(b"\r\n\r\n")
            assert w.client.num_admitted == sequences
        await eventually(lambda: len(w.engine.cancelled) == sequences)
        await eventually(lambda: w.engine.snapshot.num_running == 0 and w.client.num_admitted == 0)
        assert sorted(w.engine.cancelled) == list(range(1, sequences + 1))
        await eventually(lambda: not tasks_of("worker_orcd"))
        assert w.count('worker_requests_total{outcome="cancelled"}') == 1
        w.engine.go.set()
        async with Http() as http:  # and the worker serves on
            url = f"http://127.0.0.1:{port}/execute"
            response = await http.post(url, json={"job_id": "j", "prompt": "x", "max_tokens": 1})
        assert "event: end" in response.text


class Impatient(BoundedProtocol):
    """Small buffers towards the client; a test says how much patience there is with it."""

    stall_seconds = 600.0

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


@contextlib.contextmanager
def deaf_client(port, body, **headers):
    """A client that asks and never reads."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(request("/execute", body, **headers))
        yield


async def test_a_client_that_never_reads_loses_its_own_stream_only(world, eventually, events_of, monkeypatch):
    w = world(max_buffered_outputs=50)
    w.protocol = Impatient
    w.engine.answer = lambda submit: [submit.prompt_token_ids[0]]
    flood = {"job_id": "deaf", "prompt": "x", "ignore_eos": True, "max_tokens": 500, "logprobs": 20}
    polite = {"job_id": "good", "prompt": "y", "max_tokens": 20, "ignore_eos": True}
    async with w.listen() as port, Http(base_url=f"http://127.0.0.1:{port}") as http:
        with deaf_client(port, flood):
            await eventually(lambda: w.engine.cancelled == [1])  # the bounded queue overflowed
            assert w.client.num_admitted == 1
            good = await http.post("/execute", json=polite)
            assert [name for name, _ in events_of(good.text)][-1] == "end"
        await eventually(lambda: w.client.num_admitted == 0)
        monkeypatch.setattr(Impatient, "stall_seconds", 0.3)
        with deaf_client(port, flood):
            await eventually(lambda: w.engine.cancelled == [1, 3])
            await eventually(lambda: w.client.num_admitted == 0)  # the connection was given up
            assert w.count('worker_requests_total{outcome="cancelled"}') == 2
        good = await http.post("/execute", json=polite)
        assert [name for name, _ in events_of(good.text)][-1] == "end"


async def test_a_client_that_leaves_the_rest_of_its_answer_loses_the_connection(world, eventually):
    """Too little is left for the server to stop writing, and it closes what it cannot flush."""
    lost = []

    class Watched(Impatient):
        stall_seconds = 0.3

        def pause_writing(self):
            raise AssertionError("the answer is too long for this test")

        def connection_lost(self, exc):
            lost.append(exc)
            super().connection_lost(exc)

    w = world()
    w.protocol = Watched
    w.engine.answer = lambda _: [*b"a"]
    body = {"job_id": "deaf", "prompt": "x", "ignore_eos": True, "max_tokens": 60, "logprobs": 20}
    async with w.listen() as port:
        with deaf_client(port, body, Connection="close"):
            await eventually(lambda: w.count('worker_requests_total{outcome="success"}') == 1)
            await eventually(lambda: lost)


async def test_a_slow_reader_gets_every_byte_in_order(world, events_of):
    """A few bytes at a time, so that the socket takes a part of what it is given."""
    w = world()
    w.protocol = Impatient
    w.engine.answer = lambda _: [*b"abcdefghij"]
    body = {"job_id": "slow", "prompt": "x", "ignore_eos": True, "max_tokens": 300, "logprobs": 20}
    async with w.listen() as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(request("/execute", body, Connection="close"))
            client.setblocking(False)
            loop, data = asyncio.get_running_loop(), b""
            while part := await loop.sock_recv(client, 1777):
                data += part
                await asyncio.sleep(0.0001)
    head, _, chunks = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    text = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        text += rest[: int(size, 16)]
        assert rest[int(size, 16) : int(size, 16) + 2] == b"\r\n"
        chunks = rest[int(size, 16) + 2 :]
    tokens = [data for name, data in events_of(text.decode()) if name == "token"]
    assert [token["i"] for token in tokens] == list(range(300))
    assert "".join(token["t"] for token in tokens) == "abcdefghij" * 30
    assert all(len(token["top_logprobs"]) == 20 for token in tokens)


class Transport:
    """What was written, a call each."""

    def __init__(self):
        self.written, self.closed = [], False

    def write(self, data):
        self.written.append(data)

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


def begun_cycle(transport):
    states = {"response_started": True, "response_complete": False, "disconnected": False}
    flow = SimpleNamespace(write_paused=False)
    return SimpleNamespace(transport=transport, flow=flow, chunked_encoding=True, **states)


async def test_a_head_that_is_held_goes_with_what_follows():
    cycle = begun_cycle(transport := Transport())
    peer = HttpPeer(cycle)
    peer.hold_head()
    cycle.transport.write(b"head,")
    assert transport.written == [] and not peer.is_open  # nothing may overtake it
    assert not cycle.transport.is_closing()
    cycle.transport.write(b"first,")
    assert transport.written == [b"head,first,"] and cycle.transport is transport and peer.is_open
    cycle.transport.write(b"second")
    assert transport.written == [b"head,first,", b"second"]


@pytest.mark.parametrize("parts", [[], [b"head"]])
async def test_a_head_that_is_held_is_not_lost_when_the_connection_is_closed(parts):
    cycle = begun_cycle(transport := Transport())
    HttpPeer(cycle).hold_head()
    for part in parts:
        cycle.transport.write(part)
    cycle.transport.close()
    assert (transport.written, transport.closed, cycle.transport) == (parts, True, transport)


@pytest.mark.parametrize("closed", ["response_started", "response_complete", "disconnected", "write_paused"])
async def test_when_a_body_cannot_be_written(closed):
    """Before the response has begun, when it is over, and while its client does not read."""
    cycle = begun_cycle(Transport())
    flow = cycle.flow
    writer = HttpPeer(cycle)
    assert writer.is_open
    owner = flow if closed == "write_paused" else cycle
    setattr(owner, closed, not getattr(owner, closed))
    assert not writer.is_open
    setattr(owner, closed, not getattr(owner, closed))
    cycle.chunked_encoding = None  # HEAD
    assert not writer.is_open


@pytest.mark.parametrize("path", ["/execute", "/v1/completions", "/v1/chat/completions"])
async def test_comments_keep_a_silent_stream_alive(world, eventually, path):
    w = world(keep_alive_seconds=0.05)
    w.engine.go.clear()
    bodies = {
        "/execute": {"job_id": "j", "prompt": "x"},
        "/v1/completions": {"prompt": "x", "stream": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "stream": True},
    }
    begun = time.monotonic()
    async with w.listen() as port, connection(port, request(path, bodies[path])) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            await reader.readuntil(b": keep-alive\n\n")
        answered = time.monotonic()
        assert answered - begun > 0.12
        w.engine.go.set()
        rest = (await reader.readuntil(b"0\r\n\r\n")).decode()
    assert "data: " in rest
    # None among the tokens, but where the machine itself was silent for as long.
    assert rest.partition("data: ")[2].count("keep-alive") <= (time.monotonic() - answered) / 0.05


async def test_a_body_that_does_not_come_is_given_up(world, monkeypatch):
    monkeypatch.setattr("worker_orcd.server.body.BODY_SECONDS", 0.1)
    async with world().listen() as port, connection(port, UNFINISHED) as (reader, _):
        answer = (await reader.read()).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "did not arrive within 0.1 seconds" in answer


async def test_a_client_that_leaves_in_its_body_is_forgotten(world, eventually):
    w = world()
    async with w.listen() as port:
        async with connection(port, UNFINISHED):
            await eventually(lambda: tasks_of("httptools_impl"))  # uvicorn has one for each request
        await eventually(lambda: not tasks_of("httptools_impl"))
        async with Http() as http:
            assert (await http.get(f"http://127.0.0.1:{port}/ready")).status_code == 200
    assert not [event for event in w.narrated() if event["event"] == "error"]


class Hasty(BoundedProtocol):
    head_seconds = 0.1


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: "])
async def test_a_head_that_does_not_come_is_given_up(world, sent):
    w = world()
    w.protocol = Hasty
    async with w.listen() as port:
        begun = time.monotonic()
        async with connection(port, sent) as (reader, _):
            assert await reader.read() == b""
            assert 0.05 < time.monotonic() - begun < HEAD_SECONDS


class Patient(BoundedProtocol):
    head_seconds = 600.0


async def test_a_second_head_that_does_not_come_is_given_up(world, monkeypatch):
    w = world()
    w.protocol = Patient
    async with (
        w.listen() as port,
        connection(port, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") as pair,
    ):
        reader, writer = pair
        assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(Patient, "head_seconds", 0.1)
        begun = time.monotonic()
        writer.write(b"GET /livez HT")
        assert await reader.read() == b""
        assert 0.05 < time.monotonic() - begun < HEAD_SECONDS


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 10_000_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 100_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 5_000_000,
    ],
    ids=["10 MB header", "100,000 headers", "70 kB header", "70 kB path", "5 MB path"],
)
async def test_heads_that_are_too_large(world, head):
    w = world()
    w.protocol = Patient
    async with w.listen() as port, connection(port, head) as (reader, _):
        answer = b""
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
        assert time.monotonic() - begun < Patient.head_seconds / 10  # refused, not waited for
        assert not answer or answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        async with Http() as http:
            response = await http.get(f"http://127.0.0.1:{port}/livez", headers={"X-A": "a" * 50_000})
            assert response.status_code == 200


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01" + b"\x00" * 100]
)
async def test_what_is_not_http(world, garbage):
    async with world().listen() as port, connection(port, garbage) as (reader, _):
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


async def test_two_requests_on_one_connection(world):
    w = world()
    async with w.listen() as port, Http(base_url=f"http://127.0.0.1:{port}") as http:
        for k in range(3):
            assert "event: end" in (await http.post("/execute", json={"job_id": str(k), "prompt": "x"})).text
        big = {"job_id": "big", "prompt": "x" * 200_000}  # larger than a head may be
        assert (await http.post("/execute", json=big)).status_code == 400


@pytest.mark.parametrize(
    "urgent",
    [b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", request("/cancel", {"job_id": "nobody"})],
    ids=["health", "cancel"],
)
async def test_a_crowd_that_comes_at_once_begins_one_by_one(world, urgent, monkeypatch):
    """What is urgent is answered between them, however little of its time the event loop gets."""
    w = world()
    begun = []
    admit = w.client.admit

    def count(job_id, **named):
        begun.append(job_id)
        return admit(job_id, **named)

    monkeypatch.setattr(w.client, "admit", count)
    async with w.listen() as port, contextlib.AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(connection(port)) for _ in range(50)]
        reader, writer = await stack.enter_async_context(connection(port))
        for k, (_, other) in enumerate(crowd):
            other.write(request("/execute", {"job_id": f"j{k}", "prompt": "x"}))
        writer.write(urgent)
        assert b" 20" in await reader.readline()
        assert len(begun) < 25
        for other, _ in crowd:
            assert b" 200 " in await other.readline()
    assert len(begun) == 50
