"""The HTTP application: every route, behind one door.

Each route demands the API key unless it is `/livez`; errors of every kind pass through `server.failures`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.config import ServerConfig
from worker_orcd.errors import WorkerError
from worker_orcd.narration import Narration
from worker_orcd.server import control, execute, tokenize
from worker_orcd.server.auth import BearerToken
from worker_orcd.server.context import MAX_BODIES, MAX_TEXT_THREADS, BodyBudget, Context
from worker_orcd.server.direct import DirectRoutes
from worker_orcd.server.edge import Edge, attached, error_response
from worker_orcd.server.failures import ANYWHERE, ERROR_RESPONSE
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.openai import chat, completions, models
from worker_orcd.server.status import Status
from worker_orcd.version import VERSION

_MAX_PATH = 80  # characters of a path in a message
_NOT_YET = frozenset({"/v1/embeddings", "/v1/responses"})


def create_app(
    config: ServerConfig,
    status: Status,
    metrics: Metrics,
    *,
    narration: Narration,
    request_shutdown: Callable[[], None],
    clock: Clock = MONOTONIC,
) -> FastAPI:
    """The application. It can listen before the model is loaded: `status.loaded(...)` makes it serve jobs.

    `request_shutdown` is called on the loop by POST /shutdown and must return at once; whoever gave it drains
    (`Status.begin_drain`, `EngineClient.wait_idle`, `EngineClient.cancel_all`) and stops the server.
    """
    token = BearerToken(config)
    app = _Application(
        title="worker-orcd",
        version=VERSION,
        dependencies=[Depends(token)],
        docs_url=None if config.api_key is not None else "/docs",
        redoc_url=None,
        openapi_url=None if config.api_key is not None else "/openapi.json",
        redirect_slashes=False,
        responses=dict[int | str, dict[str, Any]](dict.fromkeys(ANYWHERE, ERROR_RESPONSE)),
    )
    app.openapi = _without_422(app.openapi)
    context = app.state.context = Context(
        config=config,
        status=status,
        metrics=metrics,
        narration=narration,
        clock=clock,
        request_shutdown=request_shutdown,
        bodies=BodyBudget(MAX_BODIES * config.max_body_bytes),
        text_threads=ThreadPoolExecutor(MAX_TEXT_THREADS, thread_name_prefix="text"),
    )
    for module in (execute, control, tokenize, models, completions, chat):
        app.include_router(module.router)
    app.router.add_route("/livez", control.livez, methods=["GET"])
    app.add_exception_handler(WorkerError, _told)
    app.add_exception_handler(HTTPException, _told)
    direct = execute.DIRECT | completions.DIRECT | chat.DIRECT
    turnstile = asyncio.Lock()
    app.add_middleware(Edge, config=config, narration=narration, turnstile=turnstile)
    jobs = DirectRoutes(direct, token=token, context=context)
    app.jobs = Edge(jobs, config=config, narration=narration, turnstile=turnstile)
    app.job_paths = frozenset(direct)
    return app


class _Application(FastAPI):
    """FastAPI with a way past it and past what it puts around every layer."""

    jobs: ASGIApp
    job_paths: frozenset[str] = frozenset()  # that POST requests to go to `jobs`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self.job_paths:
            await self.jobs(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _without_422(document: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI says that every route with a parameter may answer so; ours never do."""

    def openapi() -> dict[str, Any]:
        made = document()
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return made

    return openapi


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = _in_words(request, error)
    return error_response(error, request.scope, attached(request).correlation_id)


def _in_words(request: Request, error: HTTPException) -> HTTPException:
    """The router's "Not Found" and "Method Not Allowed", with what was found and what is allowed."""
    path = request.scope["path"][:_MAX_PATH]
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "")
        message = f"{path} does not take {request.method[:_MAX_PATH]}; allowed: {allowed}"
    elif path in _NOT_YET:
        message = f"{path} is not in this version"
    else:
        message = f"there is no endpoint {path!r}; GET / names some"
    return HTTPException(error.status_code, message, dict(error.headers or {}))
