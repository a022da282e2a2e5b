"""Real sockets: what a peer may make a connection wait for, hold or queue, on both sides of each limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from typing import ClassVar

import httpx
import pytest

from worker_orcd.server.protocol import BoundedProtocol

HOST = b"Host: 127.0.0.1\r\n"
JSON = HOST + b"Content-Type: application/json\r\n"
LONG = {"job_id": "j", "prompt": "x", "ignore_eos": True, "max_tokens": 400}


def post(path, body, headers=JSON):
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (path.encode(), headers, len(data), data)


@contextlib.asynccontextmanager
async def connection(port, data=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_all(reader):
    """What comes until the other side closes, and b"" where it resets the connection."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 60)
    return b""


class Watched(BoundedProtocol):
    """Knows its connections; a test says how much patience there is with them."""

    alive: ClassVar[set[BoundedProtocol]] = set()

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.alive.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc):
        self.alive.discard(self)
        super().connection_lost(exc)


class Patient(Watched):
    """Longer than any test, so that what ends a connection is the one limit that a subclass sets."""

    head_seconds = 600.0
    body_seconds = 600.0
    stall_seconds = 600.0


def limited(**limits):
    return type("Limited", (Patient,), {**limits, "alive": set()})


@contextlib.contextmanager
def deaf(port, *requests):
    """Sends and never reads."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"".join(requests))
        yield client


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"], ids=["keep-alive", "close"])
async def test_an_answer_that_nobody_fetches_holds_its_connection_for_so_long(world, eventually, last):
    """It is whole and shorter than what makes a writer pause, but longer than the sockets' buffers."""
    w = world()
    w.protocol = limited(stall_seconds=0.3)
    body = {"tokens": [65] * 30_000}
    async with w.listen() as port:
        with deaf(port, post("/detokenize", body, JSON + last)):
            await eventually(lambda: w.protocol.alive)
            begun = time.monotonic()
            await eventually(lambda: not w.protocol.alive)
            assert time.monotonic() - begun > 0.2
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert len((await http.post("/detokenize", json=body)).json()["prompt"]) == 30_000


@pytest.mark.parametrize("refused", [True, False])
async def test_a_body_that_follows_its_answer_slowly_is_given_up(world, eventually, refused):
    """The answer, 401 or 404, does not wait for the body; what drips in after it is nobody's."""
    w = world(api_key="k" if refused else None)
    w.protocol = limited(body_seconds=0.4)
    path = b"/execute" if refused else b"/nothing"
    head = b"POST %s HTTP/1.1\r\n%sContent-Length: 1000000\r\n\r\n" % (path, JSON)
    async with w.listen() as port, connection(port, head) as (reader, writer):
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % (401 if refused else 404))
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x")
                await asyncio.sleep(0.02)
                if not w.protocol.alive:
                    break
        await eventually(lambda: not w.protocol.alive)


async def test_a_body_that_follows_its_answer_is_read_over(world):
    """And the connection serves the next request."""
    w = world(api_key="k")
    w.protocol = limited()
    async with w.listen() as port, connection(port) as (reader, writer):
        writer.write(b"POST /execute HTTP/1.1\r\n%sContent-Length: 200000\r\n\r\n" % JSON)
        await reader.readuntil(b'"}}')
        writer.write(b"x" * 200_000 + b"GET /livez HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert (await read_all(reader)).endswith(b"ok\n")


@pytest.mark.parametrize("path", ["/execute", "/v1/completions"])
@pytest.mark.parametrize(
    "behind", [post("/execute", LONG), b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n", b"GET", b"\x00\x01"]
)
async def test_who_sends_more_than_a_request_and_hangs_up_is_noticed(world, eventually, path, behind):
    w = world()
    w.engine.step_seconds = 0.05
    w.engine.answer = lambda _: [65]
    body = LONG if path == "/execute" else {"prompt": "x", "ignore_eos": True, "max_tokens": 400}
    async with w.listen() as port:
        async with connection(port, post(path, body) + behind):
            await eventually(lambda: w.engine.submitted)
        await eventually(lambda: w.client.num_admitted == 0)
        assert w.engine.cancelled == [1]
        assert len(w.engine.submitted) == 1
    assert not [event for event in w.narrated() if event["event"] == "error"]


@pytest.mark.parametrize("num_behind", [1, 2, 10, 10_000])
async def test_requests_are_not_queued_on_a_connection(world, num_behind):
    """The first is answered and the connection closed: a client sends the others again, one by one."""
    w = world()
    w.protocol = limited()
    one = b"GET /livez HTTP/1.1\r\n%s\r\n" % HOST
    async with w.listen() as port, connection(port, one * (1 + num_behind)) as (reader, _):
        answer = await read_all(reader)
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"ok\n") <= 1
    if num_behind <= 10:  # of more there may be so much unread that the system resets the connection
        assert b"connection: close" in answer


async def test_a_line_end_behind_a_request_is_no_request(world, events_of):
    w = world()
    async with w.listen() as port, connection(port) as (reader, writer):
        for _ in range(2):
            writer.write(post("/execute", {"job_id": "j", "prompt": "x"}) + b"\r\n")
            assert b"event: end" in await reader.readuntil(b"0\r\n\r\n")


CHUNKED = b"POST /execute HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"


def pieces(kind, num_bytes):
    """A chunked body with so much that is neither head nor body in one place of it."""
    body = json.dumps({"job_id": "j", "prompt": "x"}).encode()
    filler = b"a" * num_bytes
    size = b"%x" % len(body)
    return {
        "extension": size + b";a=" + filler + b"\r\n" + body + b"\r\n0\r\n\r\n",
        "last extension": size + b"\r\n" + body + b"\r\n0;a=" + filler + b"\r\n\r\n",
        "trailer": size + b"\r\n" + body + b"\r\n0\r\nX-A: " + filler + b"\r\n\r\n",
        "trailers": size + b"\r\n" + body + b"\r\n0\r\n" + b"X-A: 1\r\n" * (num_bytes // 8) + b"\r\n",
    }[kind]


@pytest.mark.parametrize("kind", ["extension", "last extension", "trailer", "trailers"])
@pytest.mark.parametrize("num_bytes", [0, 60_000, 1_000_000, 30_000_000])
async def test_what_comes_between_and_behind_chunks_is_bounded(world, kind, num_bytes):
    w = world()
    w.protocol = limited()
    async with w.listen() as port, connection(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(CHUNKED + pieces(kind, num_bytes))
            if num_bytes <= 60_000:
                answer = await reader.readuntil(b"0\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 200 ") and b"event: end" in answer
            else:
                answer = await read_all(reader)
                assert not answer or answer.startswith(b"HTTP/1.1 431 ")
        assert len(w.engine.submitted) == (num_bytes <= 60_000)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
async def test_small_chunks_are_fine(world, size):
    body = json.dumps({"job_id": "j", "prompt": "x" * 400, "max_tokens": 1}).encode() + b" " * 20_000
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    w = world()
    async with w.listen() as port, connection(port, CHUNKED + data) as (reader, _):
        assert b"event: end" in await reader.readuntil(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "name", ["Content-Type", "Authorization", "X-Deadline", "Content-Encoding", "Origin"]
)
async def test_what_stands_behind_a_body_is_no_header(world, name):
    """Whoever looked at the headers in front of this worker did not see it."""
    values = {"Content-Type": "text/plain", "X-Deadline": "x", "Authorization": "Bearer x"}
    body = b'{"job_id": "j", "prompt": "x"}'
    trailer = f"{name}: {values.get(name, 'x')}\r\n\r\n".encode()
    w = world(api_key="k")
    head = CHUNKED.replace(HOST, HOST + b"Authorization: Bearer k\r\n")
    async with w.listen() as port, connection(port) as (reader, writer):
        writer.write(head)
        writer.write(b"%x\r\n%b\r\n0\r\n" % (len(body), body) + trailer)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert b"event: end" in await reader.readuntil(b"0\r\n\r\n")


@pytest.mark.parametrize("limit", [1, 3])
async def test_connections_are_counted(world, eventually, limit):
    w = world()
    w.protocol = limited(max_connections=limit)
    async with w.listen() as port, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connection(port)) for _ in range(limit)]
        await eventually(lambda: len(w.protocol.alive) == limit)
        for _ in range(3):
            async with connection(port, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n") as (reader, _):
                answer = await read_all(reader)
                assert not answer or answer.startswith(b"HTTP/1.1 503 ")
        reader, writer = held[0]
        writer.write(b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert (await read_all(reader)).endswith(b"ok\n")
        await eventually(lambda: len(w.protocol.alive) == limit - 1)
        async with connection(port, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n") as (reader, _):
            assert await reader.readuntil(b"ok\n")


def test_there_are_file_descriptors_beyond_those_of_connections(monkeypatch):
    import resource

    from worker_orcd.server import protocol

    for files in (64, 1024, 65536, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        most = protocol.connections_at_most()
        assert 16 <= most <= 16384
        assert files == resource.RLIM_INFINITY or most <= files - 32


async def test_half_closed_and_reset_connections_cancel(world, eventually):
    w = world()
    w.engine.step_seconds = 0.05
    w.engine.answer = lambda _: [65]
    async with w.listen() as port:
        for how in ("half-closed", "reset"):
            async with connection(port, post("/execute", LONG)) as (_, writer):
                await eventually(lambda: w.client.num_admitted == 1)
                if how == "half-closed":
                    writer.write_eof()
                else:
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                await eventually(lambda: w.client.num_admitted == 0)
    assert w.engine.cancelled == [1, 2]


@pytest.mark.parametrize(
    "head",
    [
        b"POST /execute HTTP/1.1\r\n%sContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        b"POST /execute HTTP/1.1\r\n%sContent-Length: -5\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sContent-Length: +5\r\n\r\nxxxxx",
        b"POST /execute HTTP/1.1\r\n%sContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sTransfer-Encoding: gzip\r\n\r\nx",
        b"POST /execute HTTP/1.1\r\n%sTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"POST /execute HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /livez HTTP/1.1\r\n%sX-A: a\x00b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n%sX A: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n%sX-A : b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n%s: b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n%s\r\n",
        b"GET /livez HTTP/9.9\r\n%s\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%s",
        b"CONNECT x:1 HTTP/1.1\r\n%s\r\n",
        b"OPTIONS * HTTP/1.1\r\n%s\r\n",
        b"BREW /livez HTTP/1.1\r\n%s\r\n",
        b"GET http://127.0.0.1 HTTP/1.1\r\n%s\r\n",
        b"GET ftp://127.0.0.1/livez HTTP/1.1\r\n%sConnection: close\r\n\r\n",
        b"GET livez HTTP/1.1\r\n%s\r\n",
    ],
)
async def test_requests_that_two_parsers_could_read_differently(world, head, caplog):
    w = world()
    async with w.listen() as port, connection(port, head.replace(b"%s", JSON)) as (reader, writer):
        writer.write_eof()
        answer = await read_all(reader)
        assert answer.count(b"HTTP/1.1 ") <= 1
        assert not answer or answer.split()[1] in (b"400", b"403", b"404", b"405", b"200"), answer
        assert b"HTTP/1.1 200" not in answer or b"ftp" in head
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{port}/livez")).status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert not w.narrated() and not w.engine.submitted


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "x" * 1000])
async def test_nothing_is_upgraded(world, upgrade):
    head = f"GET /livez HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n".encode()
    async with world().listen() as port, connection(port, head + HOST + b"\r\n") as (reader, _):
        answer = await reader.readuntil(b"ok\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


def told_in_pieces(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


async def answer_of(reader):
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET])
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("size", [1, 7, 60, 10_000])
async def test_who_offers_another_protocol_is_answered_in_this_one(world, offer, framing, size):
    """As Java's HTTP client does with each request until it knows better. What follows is read as well."""
    body = json.dumps({"prompt": "one two three"}).encode()
    if framing == "length":
        rest = b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    else:
        rest = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    request = b"POST /tokenize HTTP/1.1\r\n" + JSON + offer + rest
    plain = post("/tokenize", {"prompt": "one two three"})
    async with world().listen() as port, connection(port) as (reader, writer):
        answers = []
        models = b"GET /v1/models HTTP/1.1\r\n" + HOST + offer + b"\r\n"
        for data in (plain, request, models, request, plain):
            for piece in told_in_pieces(data, size):
                writer.write(piece)
                await writer.drain()
                if size > 1:
                    await asyncio.sleep(0)
            answers.append(await answer_of(reader))
    assert [status for status, _ in answers] == [200] * 5
    assert answers[0] == answers[1] == answers[3] == answers[4] != answers[2]


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        (b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"Content-Length: 99999999999\r\n\r\n{", 413),
    ],
)
async def test_an_offer_lets_nothing_through_that_is_refused_without_it(world, framing, status):
    w = world()
    request = b"POST /execute HTTP/1.1\r\n" + JSON + H2C + framing
    async with w.listen() as port, connection(port, request) as (reader, _):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    assert int(head.split()[1]) == status
    assert not w.engine.submitted


async def test_what_stands_behind_connect_is_no_request(world):
    w = world()
    behind = post("/execute", {"job_id": "j", "prompt": "x"})
    head = b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n" + HOST + b"\r\n"
    async with w.listen() as port, connection(port, head + behind) as (reader, _):
        answer = await asyncio.wait_for(read_all(reader), 5)
    assert answer.count(b"HTTP/1.1 ") == 1 and not w.engine.submitted
