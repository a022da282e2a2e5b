"""The routes that jobs come by, called without FastAPI, which takes 0.2 to 0.5 ms of the loop for a request.

FastAPI knows them too, for `/openapi.json` and for other methods than POST. What a request passes is the same
in the same order: edge, API key, body, route, and errors are told by the edge in the same words.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker_orcd.server.auth import BearerToken
from worker_orcd.server.context import Context


@dataclass(frozen=True, slots=True)
class DirectRoute:
    """A POST route: what reads its body, and what answers."""

    read: Callable[[Request, Context], Awaitable[Any]]
    answer: Callable[[Request, Context, Any], Awaitable[Response]]


class DirectRoutes:
    """An ASGI application of these paths, for POST requests to them."""

    def __init__(self, routes: Mapping[str, DirectRoute], *, token: BearerToken, context: Context) -> None:
        self._routes = routes
        self._token = token
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes[scope["path"]]
        request = Request(scope, receive, send)
        await self._token(request)
        body = await route.read(request, self._context)
        response = await route.answer(request, self._context, body)
        await response(scope, receive, send)
