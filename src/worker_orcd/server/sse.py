"""Server-sent events: a response that streams frames, keeps the connection alive and notices that it is gone.

A frame is one whole event, encoded. When nothing was sent for `keep_alive_seconds` a comment goes out, which
clients must ignore. When the client hangs up, or the response ends in any other way, the frames' generator is
closed, and with it whatever it was waiting for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker_orcd.server.disconnect import hung_up, settle

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


class EventStream(Response):
    """Streams what `frames` yields. `frames` must not raise: an error is an event like any other."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        keep_alive_seconds: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=200, headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames
        self._keep_alive_seconds = keep_alive_seconds
        self._written_at = 0.0
        self._ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        comments = asyncio.create_task(self._keep_alive(send))
        gone = asyncio.create_task(hung_up(receive))
        writer.add_done_callback(lambda _: comments.cancel())
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await settle(writer, comments, gone)
        if not writer.cancelled():
            writer.result()

    async def _write(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            self._written_at = time.monotonic()
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._written_at = time.monotonic()
            self._ending = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while not self._ending:
            silent = time.monotonic() - self._written_at if self._written_at else 0.0
            if silent >= self._keep_alive_seconds:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._written_at = time.monotonic()
                silent = 0.0
            await asyncio.sleep(max(0.0, self._keep_alive_seconds - silent))
