"""Server-sent events: a response that streams frames, keeps the connection alive and notices that it is gone.

A frame is one whole event, encoded. When nothing was sent for `keep_alive_seconds` a comment goes out, which
clients must ignore. When the client hangs up, or the response ends in any other way, the frames' generator is
closed, and with it whatever it was waiting for.

Two ways lead to the client. As long as the connection takes what it is given, frames are written as soon as
they are known, all that are known at once, and no task wakes up for them. Otherwise, and for the first and
the last bytes, a task sends them through ASGI and waits for the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import closing, suppress

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.server.disconnect import HangUp
from worker_orcd.server.peer import Peer, peer_of

KEEP_ALIVE = b": keep-alive\n\n"

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx holds events back
}

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
        super().__init__(status_code=200, headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames(self._wake)
        self._keep_alive_seconds = keep_alive_seconds
        self._clock = clock
        self._written_at = 0.0
        self._peer: Peer | None = None
        self._is_gone = False
        self._waits = False  # the task has nothing to send: frames may be written without it
        self._news = asyncio.Event()  # for the task
        self._last = b""  # frames that go with the end of the response
        self._failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._peer = peer_of(scope)
        async with HangUp(scope, receive, self._hung_up):
            await self._write(send)

    async def _write(self, send: Send) -> None:
        with closing(self._frames):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            self._written_at = self._clock()
            for frame in self._frames:
                if self._is_gone:
                    return
                if frame:
                    await self._send(send, frame)
                else:
                    await self._wait(send)
                if self._failure is not None:
                    raise self._failure
            await send({"type": "http.response.body", "body": self._last, "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._written_at = self._clock()

    async def _wait(self, send: Send) -> None:
        """For news, with comments while there are none."""
        self._waits = True
        while not self._news.is_set():
            silent = self._clock() - self._written_at
            if silent >= self._keep_alive_seconds:
                await self._send(send, KEEP_ALIVE)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._keep_alive_seconds - silent):
                    await self._news.wait()
        self._news.clear()
        self._waits = False

    def _hung_up(self) -> None:
        self._is_gone = True
        self._news.set()

    def _wake(self) -> None:
        """There are new frames. Called in the turn of whoever made them, which must not fail for it."""
        if not self._waits or self._peer is None or not self._peer.is_open:
            self._news.set()
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
                self._news.set()
                return
            if known:
                self._peer.write(b"".join(known))
                self._written_at = self._clock()
        except Exception as error:
            self._failure = error
            self._news.set()
