"""What every request passes first and every response last.

* `Host` must be one well-formed host. A worker without an API key that listens on this machine only must also
  be addressed by an IP address, as localhost, or by the name it was told to listen on; otherwise a web page
  could reach it by DNS rebinding.
* A state-changing request that a browser sends from another origin is refused; there is no CORS.
* Every request has a correlation id (`X-Correlation-Id`, or a fresh UUID) and a clean-up stack, and every
  response carries the id. Whatever a request holds is given back here, however it ends.
* An exception that nothing else answered becomes INTERNAL with that id as its reference.
* Requests that cost something begin one after the other, each in its own turn of the event loop: between a
  hundred that come at once, `/health` and `/cancel` are answered.

Only `scope["path"]` is ever read: no URL is rebuilt from headers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker_orcd.config import ServerConfig
from worker_orcd.errors import WorkerError
from worker_orcd.narration import Narration
from worker_orcd.server.failures import failure_of
from worker_orcd.server.json import JSON

_CORRELATION_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")  # RFC 3986
_ATTACHED = "worker_orcd.attached"
_KNOWN_HEADERS = frozenset(
    (
        b"host",
        b"origin",
        b"x-correlation-id",
        b"x-request-id",
        b"x-deadline",
        b"content-length",
        b"content-type",
        b"content-encoding",
    )
)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_URGENT_PATHS = ("/cancel", "/shutdown")


@dataclass(slots=True)
class Attached:
    """What the edge knows of a request."""

    correlation_id: str
    headers: Mapping[bytes, list[str]]  # those that are of interest on the way to a job, looked through once
    stack: ExitStack = field(default_factory=ExitStack)  # closed when the request is over

    def header(self, name: bytes) -> str | None:
        """The first of that name, which is one of `_KNOWN_HEADERS`."""
        values = self.headers.get(name)
        return values[0] if values else None


def attached(request: Request) -> Attached:
    return request.scope[_ATTACHED]


def speaks_openai(scope: Scope) -> bool:
    """Whether errors on this path are told as OpenAI tells them."""
    path: str = scope["path"]
    return path == "/v1" or path.startswith("/v1/")


def error_response(error: BaseException, scope: Scope, correlation_id: str) -> JSON:
    """Any error as a response, in the dialect of the path."""
    failure = failure_of(error, correlation_id)
    body = failure.openai_body() if speaks_openai(scope) else failure.native_body(correlation_id)
    headers = failure.headers
    if isinstance(error, HTTPException) and error.headers is not None:
        headers |= dict(error.headers)  # Allow, with 405
    return JSON(body, status=failure.status, headers=headers)


class Edge:
    """The outermost ASGI layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServerConfig,
        narration: Narration,
        turnstile: asyncio.Lock | None = None,
    ) -> None:
        """`turnstile`: shared with the edges of other parts of the same server."""
        self._app = app
        self._narration = narration
        self._turnstile = turnstile or asyncio.Lock()
        self._good_hosts: list[str] | None = None  # of the last request: most requests have the same
        self._names = {"localhost", config.host.lower()}
        self._any_host = config.api_key is not None or not _is_loopback(config.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _known_headers(scope)
        correlation_id = _correlation_id(headers.get(b"x-correlation-id"))
        request_id = _correlation_id(headers.get(b"x-request-id"), [correlation_id])
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message["headers"],
                    (b"x-correlation-id", correlation_id.encode()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        known = scope[_ATTACHED] = Attached(correlation_id, headers)
        with known.stack:
            try:
                self._admit(scope, headers)
                await self._wait_for_turn(scope)
                await self._app(scope, receive, send_named)
            except Exception as error:
                if started or not isinstance(error, HTTPException | WorkerError):
                    self._narration.tell(
                        "error",
                        f"A request failed in an unexpected way: {type(error).__name__}.",
                        trace=error,
                        correlation_id=correlation_id,
                    )
                if started:
                    raise  # too late for an answer: uvicorn cuts the connection
                await error_response(error, scope, correlation_id)(scope, receive, send_named)

    async def _wait_for_turn(self, scope: Scope) -> None:
        if scope["method"] not in _SAFE_METHODS and scope["path"] not in _URGENT_PATHS:
            async with self._turnstile:
                await asyncio.sleep(0)

    def _admit(self, scope: Scope, headers: Mapping[bytes, list[str]]) -> None:
        """Raises HTTPException for a request that a browser was tricked into, or that is malformed."""
        hosts = headers.get(b"host", [])
        if not hosts and scope.get("http_version") == "1.0":
            return  # old health checkers; no browser does this
        if hosts != self._good_hosts:
            self._check_host(hosts)
            self._good_hosts = hosts
        if scope["method"] in _SAFE_METHODS:
            return
        origins = headers.get(b"origin", [])
        if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in origins):
            raise HTTPException(403, "requests from web pages of other origins are not served")

    def _check_host(self, hosts: list[str]) -> None:
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise HTTPException(400, "the request must have one Host header that names a host and a port")
        if not (self._any_host or self._is_ours(match["name"].lower())):
            raise HTTPException(
                403,
                "this worker listens on this machine only and is not known under the name in the Host header",
            )

    def _is_ours(self, name: str) -> bool:
        return name in self._names or name.endswith(".localhost") or _address(name) is not None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _known_headers(scope: Scope) -> dict[bytes, list[str]]:
    known: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        if name in _KNOWN_HEADERS:
            known.setdefault(name, []).append(value.decode("latin-1"))
    return known


def _correlation_id(*candidates: list[str] | None) -> str:
    """The first that is well-formed, of the first of each header, else a fresh UUID."""
    for texts in candidates:
        if texts is not None and _CORRELATION_ID.fullmatch(texts[0]):
            return texts[0]
    return _new_id()


def _new_id() -> str:
    """A UUID of version 4, in a fifth of the time that the standard library takes for it."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
