"""Bearer tokens, demanded of every route that does not say otherwise.

A dependency of the application, not a middleware that looks at paths: a route is protected because it exists,
however its path is written. `/livez` is the only route without it.

Callers are told apart by their keys: each key has its own jobs and its own prefix cache. An admin may stop
the worker and cancel anybody's job. That is the holder of the admin key; without one, of the only API key;
without any key, everybody. Of several API keys none is an admin's.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from fastapi import Request

from worker_orcd.config import ServerConfig
from worker_orcd.errors import Forbidden, Unauthorized

_CALLER = "worker_orcd.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    identity: bytes  # the digest of the key; empty without one
    is_admin: bool


class BearerToken:
    """Compares digests in constant time, so that neither content nor length of a key can be measured."""

    def __init__(self, config: ServerConfig) -> None:
        keys = [] if config.api_key is None else config.api_key.split("\n")
        self._is_open = not keys
        self._callers = [
            Caller(_digest(key.encode()), config.admin_key is None and len(keys) == 1) for key in keys
        ]
        self._nobody = Caller(b"", is_admin=config.admin_key is None)
        if config.admin_key is not None:
            self._callers.append(Caller(_digest(config.admin_key.encode()), is_admin=True))

    async def __call__(self, request: Request) -> None:
        """Raises Unauthorized unless the request carries a key. Without API keys everybody may come in."""
        caller = self._who(request.headers.getlist("authorization"))
        if caller is None:
            raise Unauthorized("this worker wants its API key as 'Authorization: Bearer …'")
        request.scope[_CALLER] = caller

    def _who(self, headers: list[str]) -> Caller | None:
        found = self._nobody if self._is_open else None
        if not self._callers:
            return found
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        digest = _digest(token.strip().encode("latin-1", "replace"))
        for caller in self._callers:  # all, whichever it is
            if hmac.compare_digest(digest, caller.identity) and scheme.lower() == "bearer":
                found = caller
        return found


def caller_of(request: Request) -> Caller:
    """Whom BearerToken let in."""
    return request.scope[_CALLER]


async def admins_only(request: Request) -> None:
    """A dependency of routes. Raises Forbidden."""
    if not caller_of(request).is_admin:
        raise Forbidden("this is for the holder of the worker's admin key")


def cache_salt(identity: bytes, requested: str) -> bytes:
    """Separates prefix caches: by who asks, and within that by what the request asks for."""
    if not identity and not requested:
        return b""
    return _digest(b"prefix-cache" + (identity or _digest(b"")) + requested.encode())


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
