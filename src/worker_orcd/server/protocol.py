"""HTTP/1.1 connections with every wait and every buffer bounded, on top of uvicorn's.

uvicorn's fast parser bounds neither the head of a request nor the time a peer takes to send one or to read an
answer. Here a head is at most `MAX_HEAD_BYTES` and `HEAD_SECONDS`, and a peer that reads nothing for
`STALL_SECONDS` while data waits for it loses the connection (which cancels its request). How long a body may
take is bounded where it is read, in `server.body`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from worker_orcd.config import ServerConfig
from worker_orcd.server.sse import BODY_WRITER

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_SECONDS = 10.0
STALL_SECONDS = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Runs on the event loop, as all of uvicorn does."""

    max_head_bytes = MAX_HEAD_BYTES
    head_seconds = HEAD_SECONDS
    stall_seconds = STALL_SECONDS

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_bytes = 0  # parsed of the head that is being read
        self._unparsed_bytes = 0  # received since the last head was complete, while a head is being read
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        self._rest_timer = _cancelled(self._rest_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._unparsed_bytes > self.max_head_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a later request on the same connection
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = self._unparsed_bytes = 0
        self._head_timer = _cancelled(self._head_timer)
        super().on_headers_complete()
        writer: Any = ChunkWriter(self.cycle)
        self.cycle.scope["extensions"] = {BODY_WRITER: writer}  # the request's task has not begun yet

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > self.max_head_bytes:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stall_timer = _cancelled(self._stall_timer)
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._rest_timer is None:
            self._watch_rest(0)

    def _watch_rest(self, num_before: int) -> None:
        """See that the peer reads the rest of an answer: it may be too little to pause for, and a connection
        that is closed stays until it is read.
        """
        self._rest_timer = None
        num_left = self.transport.get_write_buffer_size()
        if num_left and num_left == num_before:
            self.transport.abort()
        elif num_left:
            self._rest_timer = self.loop.call_later(self.stall_seconds, self._watch_rest, num_left)

    def _expect_head(self) -> None:
        self._in_head = True
        self._head_timer = _cancelled(self._head_timer)
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.max_head_bytes:
            raise ValueError(
                "the head of the request is too large"
            )  # the parser stops; see send_400_response

    def _refuse_head(self) -> None:
        message = f"the headers are larger than {self.max_head_bytes} bytes"
        body = f'{{"error":{{"code":"INVALID_REQUEST","message":"{message}"}}}}'
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()


class ChunkWriter:
    """The `BodyWriter` of a response: does what uvicorn's `send` does with a part of a body."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @property
    def is_open(self) -> bool:
        cycle = self._cycle
        return (
            cycle.response_started
            and cycle.chunked_encoding is True
            and not (cycle.response_complete or cycle.disconnected)
            and not (self._flow.write_paused or self._transport.is_closing())
        )

    def write(self, body: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How this application is to be served. Trusts no proxy headers and logs nothing but failures."""
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
    )
