"""EventStream: what is written at once, what a task sends, and that nobody sees a difference."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

import pytest

from worker_orcd.server import sse
from worker_orcd.server.peer import PEER
from worker_orcd.server.sse import KEEP_ALIVE, EventStream


class Connection:
    """The server's side of one response. Bodies: `sent` by ASGI, `written` by the writer."""

    def __init__(self):
        self.sent, self.written = [], []
        self.begun_at = None
        self.takes = True  # there is room for more
        self.holds_head = False
        self.room = asyncio.Event()  # cleared: `send` waits, as uvicorn's does
        self.room.set()
        self.gone = asyncio.Event()
        self.on_gone = None  # as a peer

    @property
    def is_open(self):
        return self.takes and self.begun_at is not None

    @property
    def has_gone(self):
        return self.gone.is_set()

    def hold_head(self):
        assert self.begun_at is None
        self.holds_head = True

    def hang_up(self):
        self.gone.set()
        if self.on_gone is not None:
            self.on_gone()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.room.wait()
        if message["type"] == "http.response.start":
            self.begun_at = time.monotonic()
        else:
            self.sent.append(message["body"] + b"(end)" * (not message["more_body"]))

    def write(self, body):
        assert self.is_open
        self.written.append(body)

    async def serve(self, stream, *, as_peer=True):
        extensions = {PEER: self} if as_peer else {}
        await stream({"type": "http", "extensions": extensions}, self.receive, self.send)


class News:
    """Frames that a test makes; `is_closed` once nobody wants more of them."""

    def __init__(self):
        self.frames = []
        self.is_over = self.is_closed = False
        self.wake = None

    def __call__(self, wake):
        self.wake = wake
        return self._frames()

    def _frames(self):
        try:
            while self.frames or not self.is_over:
                if not self.frames:
                    yield b""
                    continue
                frame = self.frames.pop(0)
                if isinstance(frame, Exception):
                    raise frame
                yield frame
        finally:
            self.is_closed = True

    def tell(self, *frames, is_over=False):
        self.frames += frames
        self.is_over = is_over
        self.wake()


@contextlib.asynccontextmanager
async def streaming(news, *, keep_alive_seconds=600.0, with_head=True, **options):
    """A connection on which the stream has begun and waits; afterwards the response is over."""
    connection = Connection()
    stream = EventStream(news, keep_alive_seconds=keep_alive_seconds)
    task = asyncio.create_task(connection.serve(stream, **options))
    await asyncio.sleep(0.01)
    while with_head and connection.begun_at is None:
        await asyncio.sleep(0.01)
    try:
        yield connection
        async with asyncio.timeout(60):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert news.is_closed


async def test_news_is_written_in_the_same_turn_and_all_of_it_at_once():
    news = News()
    async with streaming(news) as connection:
        news.tell(b"a")
        assert connection.written == [b"a"]
        news.tell(b"b", b"c")
        news.tell()
        assert connection.written == [b"a", b"bc"]
        news.tell(b"d", b"e", is_over=True)
    assert connection.written == [b"a", b"bc"]
    assert connection.sent == [b"de(end)"]  # what is last goes with the end of the response


async def test_the_head_goes_with_the_first_news(monkeypatch):
    monkeypatch.setattr(sse, "HEAD_SECONDS", 60)
    news = News()
    async with streaming(news, with_head=False) as connection:
        assert connection.begun_at is None
        news.tell(b"a", b"b")
        await asyncio.sleep(0.01)
        assert connection.sent == [b"ab"] and connection.begun_at is not None and connection.holds_head
        news.tell(b"c", is_over=True)
    assert connection.sent == [b"ab", b"c(end)"]


async def test_the_head_does_not_wait_for_long():
    news = News()
    begun = time.monotonic()
    async with streaming(news) as connection:
        assert connection.begun_at - begun > sse.HEAD_SECONDS / 2 and not connection.holds_head
        news.tell(is_over=True)
    assert (connection.sent, connection.written) == ([b"(end)"], [])


async def test_what_fails_before_the_head_has_none(monkeypatch):
    monkeypatch.setattr(sse, "HEAD_SECONDS", 60)
    news = News()
    with pytest.raises(ZeroDivisionError):
        async with streaming(news, with_head=False) as connection:
            news.tell(ZeroDivisionError())
    assert connection.begun_at is None  # whoever sees to errors can still answer


async def test_a_server_that_knows_no_peer_sends_the_same():
    news = News()
    async with streaming(news, as_peer=False) as connection:
        news.tell(b"a")
        news.tell(b"b", b"c")
        await asyncio.sleep(0.01)
        news.tell(b"d", is_over=True)
    assert connection.written == [] and b"".join(connection.sent) == b"abcd(end)"


async def test_while_the_connection_takes_nothing_frames_are_not_made():
    news = News()
    async with streaming(news) as connection:
        connection.takes = False
        connection.room.clear()
        for frame in (b"a", b"b", b"c"):
            news.tell(frame)
            await asyncio.sleep(0.001)
        assert news.frames == [b"b", b"c"]  # the first is on its way
        connection.takes = True
        news.tell(b"d")
        assert (connection.sent, connection.written) == ([], [])  # nothing overtakes it
        connection.room.set()
        await asyncio.sleep(0.01)
        news.tell(b"e")
        news.tell(is_over=True)
    assert connection.sent == [b"a", b"bcd", b"(end)"]
    assert connection.written == [b"e"]


async def test_a_fault_is_not_that_of_whoever_has_the_news():
    news = News()
    with pytest.raises(ZeroDivisionError):
        async with streaming(news) as connection:
            news.tell(b"a", ZeroDivisionError())
    assert connection.sent == []  # no end: the server cuts the connection


@pytest.mark.parametrize("as_peer", [True, False])
async def test_a_client_that_hangs_up_wants_no_more(as_peer):
    news = News()
    async with streaming(news, as_peer=as_peer) as connection:
        assert (connection.on_gone is not None) == as_peer
        connection.hang_up()
    news.tell(b"too late")
    assert (connection.sent, connection.written) == ([], [])
    assert connection.on_gone is None


async def test_a_client_that_has_gone_before_wants_nothing():
    connection, news = Connection(), News()
    connection.hang_up()
    async with asyncio.timeout(60):
        await connection.serve(EventStream(news, keep_alive_seconds=600.0))
    assert (connection.sent, connection.written, news.is_closed) == ([], [], True)


async def test_comments_come_only_into_silence():
    news = News()
    async with streaming(news, keep_alive_seconds=0.2) as connection:
        told = [time.monotonic()]
        for _ in range(30):
            await asyncio.sleep(0.02)
            news.tell(b"a")
            told.append(time.monotonic())
        if max(after - before for before, after in itertools.pairwise(told)) < 0.1:
            assert connection.sent == []
        while KEEP_ALIVE not in connection.sent:
            await asyncio.sleep(0.01)
        news.tell(b"z", is_over=True)
    assert connection.sent[-1] == b"z(end)"
