"""Noticing that a client has hung up, and stopping what was done for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from worker_orcd.errors import Cancelled

T = TypeVar("T")


async def hung_up(receive: Receive) -> None:
    """Returns when the client has closed the connection. Only once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do the work, but cancel it as soon as the client hangs up. Raises Cancelled then."""
    task = asyncio.create_task(work())
    gone = asyncio.create_task(hung_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client closed the connection")
    finally:
        await settle(task, gone)


async def settle(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has ended; its exceptions are somebody else's."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
