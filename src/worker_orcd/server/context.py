"""What the routes share: one frozen object made by `create_app`, and the ways to get at it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from worker_orcd.clock import Clock
from worker_orcd.config import ServerConfig
from worker_orcd.errors import QueueFull
from worker_orcd.narration import Narration
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.status import Status

T = TypeVar("T")

MAX_TEXT_THREADS = 4  # that tokenise and render templates at a time
MAX_BODIES = 16  # of the largest size allowed, held at a time


class BodyBudget:
    """Bytes of request bodies that are held at a time, by all requests together. On the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Raises QueueFull when that would be too much."""
        if self.held_bytes + num_bytes > self.max_bytes:
            raise QueueFull(f"the requests being served hold {self.held_bytes} of {self.max_bytes} bytes")
        self.held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    config: ServerConfig
    status: Status
    metrics: Metrics
    narration: Narration
    clock: Clock
    request_shutdown: Callable[[], None]
    bodies: BodyBudget
    text_threads: ThreadPoolExecutor  # tokenise and render; a request that is gone frees no thread early

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what would hold up the event loop in one of the few text threads."""
        return await asyncio.get_running_loop().run_in_executor(self.text_threads, work)


async def context_of(request: Request) -> Context:
    return request.app.state.context


ContextOf = Annotated[Context, Depends(context_of)]
