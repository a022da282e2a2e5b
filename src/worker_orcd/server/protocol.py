"""HTTP/1.1 connections with every wait and every buffer bounded, on top of uvicorn's.

uvicorn's fast parser bounds neither the head of a request nor the time a peer takes to send one or to read an
answer. Here:

* A head is at most `MAX_HEAD_BYTES` and `HEAD_SECONDS`; so much may stand between and behind chunks, too.
* A peer that reads nothing for `STALL_SECONDS` while data waits for it loses the connection (which cancels
  its request), and so does one that leaves the end of an answer lying for as long.
* How long a body may take is bounded where it is read, in `server.body`, and where it comes after its answer
  (which said no), here.
* One request at a time: who sends more than that gets the answer to the first and `connection: close`.
  uvicorn would keep any number of requests behind one, and not notice that their client has gone.
* Who offers another protocol (h2c, as Java's client does with every request) is answered in this one. The
  parser thinks that what follows such a head is of that protocol, and uvicorn would lose the body.
* What stands behind a chunked body (trailers) is no header: whoever looked at the headers did not see it.
* There are only so many connections: files stay free for what the worker opens itself.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from worker_orcd.config import ServerConfig
from worker_orcd.server.body import BODY_SECONDS
from worker_orcd.server.peer import PEER

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_SECONDS = 10.0
STALL_SECONDS = 30.0
MOST_CONNECTIONS = 16384


def connections_at_most() -> int:
    """Three quarters of the files that this process may open, and never more than `MOST_CONNECTIONS`."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(16, min(MOST_CONNECTIONS, files * 3 // 4 - 32))


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Runs on the event loop, as all of uvicorn does."""

    max_head_bytes = MAX_HEAD_BYTES
    max_connections = connections_at_most()
    head_seconds = HEAD_SECONDS
    body_seconds = BODY_SECONDS
    stall_seconds = STALL_SECONDS

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_bytes = 0  # parsed of the head, or of the trailers, that are being read
        self._unparsed_bytes = 0  # received since something of known use was complete
        self._in_head = True
        self._in_message = False
        self._peer: HttpPeer | None = None  # of the request that is being answered, or was last
        self._is_deaf = False  # what else comes is thrown away; that the peer hangs up is still noticed
        self._timer: asyncio.TimerHandle | None = None  # for the peer to send what it has begun to send
        self._stall_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # As uvicorn does it, without asking the system for both addresses: nobody here looks at them.
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        self.scheme = "http"
        if len(self.connections) > self.max_connections:
            self._refuse("503 Service Unavailable", "QUEUE_FULL", "there are too many connections")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer = _cancelled(self._timer)
        self._stall_timer = _cancelled(self._stall_timer)
        self._rest_timer = _cancelled(self._rest_timer)
        super().connection_lost(exc)
        if self._peer is not None and self._peer.has_gone and self._peer.on_gone is not None:
            self._peer.on_gone()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unparsed_bytes += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._unparsed_bytes > self.max_head_bytes and not self.transport.is_closing():
            self._refuse_head()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            (position,) = upgrade.args
            self._go_on_without_upgrade(data[position:])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """After a head that offers another protocol: a new parser is told how long the body is."""
        if self.parser.get_method() == b"CONNECT":  # nothing that follows could be HTTP
            self._is_deaf = True
            self.cycle.keep_alive = False
            return
        framing = self._framing()
        self.parser = _parser_of(_AfterHead(self) if framing else self)
        if framing:
            lines = b"".join(b"%b: %b\r\n" % header for header in framing)
            self._feed(b"POST / HTTP/1.1\r\n" + lines + b"\r\n")
        if rest:
            self._unparsed_bytes = len(rest)
            self._feed(rest)

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """The headers of the request that say how long its body is, which the parser found good."""
        return [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]

    def on_message_begin(self) -> None:
        if self._is_answering:
            raise ValueError("a request before the answer to the last")  # see send_400_response
        super().on_message_begin()
        self._in_message = True
        if not self._in_head:  # a later request on the same connection
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = self._unparsed_bytes = 0
        self._timer = _cancelled(self._timer)
        super().on_headers_complete()
        peer: Any = HttpPeer(self.cycle)
        self._peer = peer
        self.cycle.scope["extensions"] = {PEER: peer}  # the request's task has not begun yet

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and self._framing():
            return  # that is only its head: see `_go_on_without_upgrade`
        self._in_message = False
        self._head_bytes = self._unparsed_bytes = 0
        if self.cycle.response_complete:  # the timer was for the rest of its body
            self._timer = _cancelled(self._timer)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message:
            self._timer = _cancelled(self._timer)
            self._timer = self.loop.call_later(self.body_seconds, self.transport.abort)
        if self._rest_timer is None:
            self._watch_rest(0)

    def send_400_response(self, msg: str) -> None:
        if self._is_answering:  # it is not about the request that is being answered
            self._is_deaf = True
            self.cycle.keep_alive = False
        elif self._head_bytes > self.max_head_bytes:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = _cancelled(self._stall_timer)
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stall_timer = _cancelled(self._stall_timer)
        super().resume_writing()

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

    @property
    def _is_answering(self) -> bool:
        """Whether a request has been read to its end, and its answer has not been written yet."""
        return not self._in_message and self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _expect_head(self) -> None:
        self._in_head = True
        self._timer = _cancelled(self._timer)
        self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.max_head_bytes:
            # the parser stops; see send_400_response
            raise ValueError("the head of the request is too large")

    def _refuse_head(self) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.abort()  # another status would become a part of that answer
            return
        self._refuse(
            "431 Request Header Fields Too Large",
            "INVALID_REQUEST",
            f"the headers are larger than {self.max_head_bytes} bytes",
        )

    def _refuse(self, status: str, code: str, message: str) -> None:
        self._is_deaf = True
        body = f'{{"error":{{"code":"{code}","message":"{message}"}}}}'
        self.transport.write(
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n".encode()
            + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()


class _AfterHead:
    """The callbacks of a parser that is first told a head which its protocol has seen already."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol
        self._in_old_head = True
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        if not self._in_old_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_old_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_old_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_old_head:
            self._in_old_head = False
        else:
            self._protocol.on_headers_complete()


def _parser_of(callbacks: object) -> httptools.HttpRequestParser:
    """As uvicorn makes it: what follows a request that ends its connection is for nobody."""
    parser = httptools.HttpRequestParser(callbacks)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class HttpPeer:
    """The `Peer` of a response: does what uvicorn's `send` does with a part of a body."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.on_gone: Callable[[], None] | None = None
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @property
    def has_gone(self) -> bool:
        return self._cycle.disconnected

    @property
    def has_sent_all(self) -> bool:
        return not self._cycle.more_body

    @property
    def is_open(self) -> bool:
        cycle = self._cycle
        return (
            cycle.response_started
            and cycle.chunked_encoding is True
            and not (cycle.response_complete or cycle.disconnected)
            and not (self._flow.write_paused or self._transport.is_closing())
            and cycle.transport is self._transport
        )

    def hold_head(self) -> None:
        held: Any = _HeldHead(self._cycle)
        self._cycle.transport = held

    def write(self, body: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class _HeldHead:
    """In place of a cycle's transport until it has written twice: uvloop would call the system for each."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
        else:
            self._cycle.transport = self._transport
            self._transport.write(self._head + data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        """Something went wrong between the two."""
        self._cycle.transport = self._transport
        if self._head is not None:
            self._transport.write(self._head)
        self._transport.close()


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
