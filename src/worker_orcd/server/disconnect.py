"""Noticing that a client has hung up, and stopping what was done for it.

The connection tells (`server.peer`). Only under a server that does not, a task waits for the ASGI message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.types import Receive, Scope

from worker_orcd.errors import Cancelled
from worker_orcd.server.peer import peer_of

T = TypeVar("T")


class HangUp:
    """`async with HangUp(scope, receive, tell)`: `tell` is called, once and on the loop, if the client hangs
    up within the block or had done so before. Only once the body has been read; one at a time for a request.
    """

    def __init__(self, scope: Scope, receive: Receive, tell: Callable[[], None]) -> None:
        self._peer = peer_of(scope)
        self._receive = receive
        self._tell = tell
        self._waiting: asyncio.Task[None] | None = None
        self._telling: asyncio.Handle | None = None

    async def __aenter__(self) -> None:
        if self._peer is None:
            self._waiting = asyncio.create_task(self._wait())
        elif self._peer.has_gone:
            self._telling = asyncio.get_running_loop().call_soon(self._tell)
        else:
            self._peer.on_gone = self._tell

    async def __aexit__(self, *_details: object) -> None:
        if self._peer is not None:
            self._peer.on_gone = None
        if self._telling is not None:
            self._telling.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._tell()


async def unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Do the work, but cancel it as soon as the client hangs up. Raises Cancelled then."""
    task = asyncio.current_task()
    is_gone = False

    def cancel() -> None:  # while the task waits for something that the work wants
        nonlocal is_gone
        if task is not None:
            is_gone = task.cancel()

    async with HangUp(request.scope, request.receive, cancel):
        try:
            return await work()
        except asyncio.CancelledError:
            if not is_gone or task is None or task.uncancel():  # somebody else wants it to end
                raise
            raise Cancelled("the client closed the connection") from None
