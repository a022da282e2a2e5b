"""The HTTP application. Interface: the routes follow."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from worker_orcd.config import ServerConfig
from worker_orcd.narration import Narration
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.status import Status


def create_app(
    config: ServerConfig,
    status: Status,
    metrics: Metrics,
    *,
    narration: Narration,
    request_shutdown: Callable[[], None],
) -> FastAPI:
    """The application. It can listen before the model is loaded: `status.loaded(...)` makes it serve jobs.

    `request_shutdown` is called on the loop by POST /shutdown and must return at once; whoever gave it drains
    (`Status.begin_drain`, `EngineClient.wait_idle`, `EngineClient.cancel_all`) and stops the server.
    """
    raise NotImplementedError
