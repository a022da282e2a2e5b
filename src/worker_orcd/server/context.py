"""What the routes share: one frozen object made by `create_app`, and the ways to get at it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from worker_orcd.config import ServerConfig
from worker_orcd.narration import Narration
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.status import Status

T = TypeVar("T")

MAX_TEXT_THREADS = 4  # that tokenise and render templates at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    config: ServerConfig
    status: Status
    metrics: Metrics
    narration: Narration
    request_shutdown: Callable[[], None]
    text_threads: ThreadPoolExecutor  # tokenise and render; a request that is gone frees no thread early

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what would hold up the event loop in one of the few text threads."""
        return await asyncio.get_running_loop().run_in_executor(self.text_threads, work)


async def context_of(request: Request) -> Context:
    return request.app.state.context


ContextOf = Annotated[Context, Depends(context_of)]
