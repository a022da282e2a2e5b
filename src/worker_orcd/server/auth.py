"""An optional bearer token, demanded of every route that does not say otherwise.

A dependency of the application, not a middleware that looks at paths: a route is protected because it exists,
however its path is written. `/livez` is the only route without it.
"""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from worker_orcd.errors import Unauthorized


class BearerToken:
    """Compares digests in constant time, so that neither content nor length of the key can be measured."""

    def __init__(self, api_key: str | None) -> None:
        self._digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, request: Request) -> None:
        """Raises Unauthorized unless the request carries the key. Without a key everybody may come in."""
        if self._digest is None:
            return
        headers = request.headers.getlist("authorization")
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        digest = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
        if not (hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"):
            raise Unauthorized("this worker wants its API key as 'Authorization: Bearer …'")


def cache_salt(api_key: str | None, requested: str) -> bytes:
    """Separates prefix caches: by the key's identity, and within it by what the request asks for."""
    if api_key is None and not requested:
        return b""
    identity = hashlib.sha256((api_key or "").encode()).digest()
    return hashlib.sha256(b"prefix-cache" + identity + requested.encode()).digest()
