"""Connections without sockets: bounded buffers, and peers that read fast, slowly or not at all, or go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import httptools
from sim_loop import VirtualLoop


class Peer(Protocol):
    """Who gets a response as it comes."""

    def on_head(self, status: int) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_complete(self) -> None: ...

    def on_cut(self) -> None:
        """The connection is gone before the response was complete."""


class Pipe(asyncio.Transport):
    """The server's side of a connection, and what the client does with it."""

    def __init__(
        self, loop: VirtualLoop, protocol: Any, *, high_water: int, wrong: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._wrong = wrong
        self._high_water = high_water
        self._buffer = bytearray()  # written by the server, not read by the client
        self._closing = False
        self.is_lost = False  # for the server
        self.is_paused = False  # the server was asked not to write
        self.reads = True  # the client takes everything at once
        self.peer: Peer | None = None
        self._parser: Any = None
        protocol.connection_made(self)

    # -- the client's side ---------------------------------------------------------------------------------

    def request(self, data: bytes, peer: Peer) -> None:
        self.peer, self._parser = peer, httptools.HttpResponseParser(self)
        self.send(data)

    def send(self, data: bytes) -> None:
        if not (self._closing or self.is_lost):
            self._protocol.data_received(data)

    def hang_up(self) -> None:
        """The client is gone: what was written is lost."""
        self.peer = None
        self._lose(ConnectionResetError("the client is gone"))

    def read(self, num_bytes: int | None = None) -> None:
        """Take some of what waits, or all of it."""
        taken = bytes(self._buffer[:num_bytes])
        del self._buffer[: len(taken)]
        if self.is_paused and len(self._buffer) <= self._high_water // 4 and not self.is_lost:
            self.is_paused = False
            self._protocol.resume_writing()
        if taken and self.peer is not None:
            self._parser.feed_data(taken)
        if self._closing and not self._buffer and not self.is_lost:
            self._lose(None)

    @property
    def num_buffered(self) -> int:
        return len(self._buffer)

    # httptools' callbacks

    def on_headers_complete(self) -> None:
        if self.peer is not None:
            self.peer.on_head(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        if self.peer is not None:
            self.peer.on_body(data)

    def on_message_complete(self) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.on_complete()

    # -- the server's side ---------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if self.is_lost or not data:
            return
        if self._closing:
            self._wrong("the server writes to a connection that it has closed")
        self._buffer += data
        if self.reads and not self.is_paused:
            self.read()
        elif len(self._buffer) > self._high_water and not self.is_paused:
            self.is_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def is_closing(self) -> bool:
        return self._closing or self.is_lost

    def close(self) -> None:
        if not self.is_closing():
            self._closing = True
            if not self._buffer:
                self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        self._buffer.clear()

        def lost() -> None:
            self._protocol.connection_lost(error)
            peer, self.peer = self.peer, None
            if peer is not None:
                peer.on_cut()

        self._loop.call_soon(lost)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8080)}.get(name, default)

    def pause_reading(self) -> None:
        """What the client sends is small."""

    def resume_reading(self) -> None:
        """Likewise."""
