"""Server-sent events: a response that streams frames, keeps the connection alive and notices that it is gone.

A frame is one whole event, encoded. When nothing was sent for `keep_alive_seconds` a comment goes out, which
clients must ignore. When the client hangs up, or the response ends in any other way, the frames' generator is
closed, and with it whatever it was waiting for.

Two ways lead to the client. As long as the connection takes what it is given, frames are written as soon as
they are known, all that are known at once, and no task wakes up for them. Otherwise, and for the first and
the last bytes, a task sends them through ASGI and waits for the connection. The head of the response goes
with the first events, or alone when they take longer than a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import closing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.server.disconnect import HangUp
from worker_orcd.server.peer import Peer, peer_of

KEEP_ALIVE = b": keep-alive\n\n"

HEAD_SECONDS = 0.1  # that the head of a response waits for the first events, to be one write with them

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx holds events back
]

_encoder = msgspec.json.Encoder()


def event(name: str, data: object) -> bytes:
    """A named event whose data is JSON."""
    return b"event: " + name.encode() + b"\ndata: " + _encoder.encode(data) + b"\n\n"


def data(content: object) -> bytes:
    """An event without a name, as OpenAI's API sends them."""
    return b"data: " + _encoder.encode(content) + b"\n\n"


Frames = Callable[[Callable[[], None]], Generator[bytes, None, None]]


class EventStream(Response):
    """Streams what `frames(wake)` yields; after an empty frame there is no more until `wake` is called.

    `frames` must not raise: an error is an event like any other.
    """

    def __init__(
        self,
        frames: Frames,
        *,
        keep_alive_seconds: float,
        headers: dict[str, str] | None = None,
        clock: Clock = MONOTONIC,
    ) -> None:
        self.status_code, self.background = 200, None
        added = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self.raw_headers = _HEADERS + added
        self._frames = frames(self._wake)
        self._keep_alive_seconds = keep_alive_seconds
        self._clock = clock
        self._written_at = clock()
        self._peer: Peer | None = None
        self._is_gone = False
        self._has_begun = False  # the head has been sent
        self._waits = False  # the task has nothing to send: frames may be written without it
        self._has_news = False  # for the task
        self._woken = asyncio.Event()  # there is news, or it has waited for long enough
        self._last = b""  # frames that go with the end of the response
        self._failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._peer = peer_of(scope)
        async with HangUp(scope, receive, self._hung_up):
            await self._write(send)

    async def _write(self, send: Send) -> None:
        with closing(self._frames):
            known: list[bytes] = []
            for frame in self._frames:
                if self._is_gone:
                    return
                if frame:
                    known.append(frame)
                    continue
                if known:
                    await self._send(send, b"".join(known))
                    known.clear()
                else:
                    await self._wait(send)
                if self._failure is not None:
                    raise self._failure
            await self._begin(send, with_body=True)
            last = b"".join([*known, self._last])
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _begin(self, send: Send, *, with_body: bool) -> None:
        if not self._has_begun:
            self._has_begun = True
            if with_body and self._peer is not None:
                self._peer.hold_head()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._written_at = self._clock()

    async def _send(self, send: Send, body: bytes) -> None:
        await self._begin(send, with_body=True)
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._written_at = self._clock()

    async def _wait(self, send: Send) -> None:
        """For news, with comments while there are none."""
        self._waits = True
        while not self._has_news:
            patience = self._keep_alive_seconds
            if not self._has_begun:
                patience = min(patience, HEAD_SECONDS)
            left = patience - (self._clock() - self._written_at)
            if left > 0:
                self._woken.clear()
                timer = asyncio.get_running_loop().call_later(left, self._woken.set)
                try:
                    await self._woken.wait()
                finally:
                    timer.cancel()
            elif self._has_begun:
                await self._send(send, KEEP_ALIVE)
            else:
                await self._begin(send, with_body=False)
        self._has_news = self._waits = False

    def _hung_up(self) -> None:
        self._is_gone = True
        self._tell()

    def _tell(self) -> None:
        self._has_news = True
        self._woken.set()

    def _wake(self) -> None:
        """There are new frames. Called in the turn of whoever made them, which must not fail for it."""
        if not self._waits or self._peer is None or not self._peer.is_open:
            self._tell()
            return
        known: list[bytes] = []
        try:
            for frame in self._frames:
                if not frame:
                    break
                known.append(frame)
            else:
                self._last = b"".join(known)  # the task ends the response, and all of it is one write
                self._waits = False
                self._tell()
                return
            if known:
                self._peer.write(b"".join(known))
                self._written_at = self._clock()
        except Exception as error:
            self._failure = error
            self._tell()
