"""
Tells whoever started the worker that it is ready: one POST, retried with backoff, fatal when it fails.

What may be over by the next try is tried again: no connection, no answer in time, 408, 429, 5xx. Any other
answer but 2xx is final. Redirects are not followed and the environment's proxies and .netrc are not used: the
token is for one address only.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker_orcd.config import CallbackConfig
from worker_orcd.errors import Internal, InvalidConfiguration
from worker_orcd.narration import Narration

if TYPE_CHECKING:
    import httpx

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
_TRANSIENT = frozenset({408, 429})

Sleep = Callable[[float], Awaitable[None]]


def read_token(config: CallbackConfig) -> str | None:
    """The bearer token, read before the model is loaded. Raises InvalidConfiguration without telling it."""
    if config.token_file is None:
        return None
    try:
        token = config.token_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise InvalidConfiguration(
            f"the callback token file cannot be read: {error.strerror or type(error).__name__}"
        ) from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise InvalidConfiguration("the callback token file must hold one printable ASCII word, the token")
    return token


async def announce(
    config: CallbackConfig,
    token: str | None,
    body: Mapping[str, object],
    narration: Narration,
    sleep: Sleep = asyncio.sleep,
) -> None:
    """POST `body` as JSON to `config.url`.

    Raises Internal once it has failed for good, InvalidConfiguration where there is nothing to call.
    """
    if config.url is None:
        return
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        where = _without_secrets(config.url)
    except ValueError:
        raise InvalidConfiguration("the callback URL is not a URL that can be called") from None
    import httpx  # here: most workers announce themselves to nobody

    async with httpx.AsyncClient(timeout=config.timeout_seconds, trust_env=False) as client:
        for attempt in range(1, config.attempts + 1):
            problem, final = await _post(client, config.url, body, headers, config.timeout_seconds)
            if problem is None:
                narration.tell("ready", f"The callback to {where} was accepted.", attempt=attempt)
                return
            if final or attempt == config.attempts:
                raise Internal(f"the ready callback to {where} failed: {problem} (attempt {attempt})")
            narration.tell(
                "warning",
                f"The callback to {where} failed: {problem}. Attempt {attempt} of {config.attempts}.",
                attempt=attempt,
            )
            await sleep(_pause(attempt))


async def _post(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, object],
    headers: dict[str, str],
    seconds: float,
) -> tuple[str | None, bool]:
    """What went wrong, if anything, and whether trying again is pointless. Within `seconds`, whatever the
    other side does: httpx's own limit is for every read, and a byte at a time is within it for ever.
    """
    import httpx

    try:
        async with (
            asyncio.timeout(seconds),
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            pass  # how it begins is all that counts; its body may have no end
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        return "it is not a URL that can be called", True
    except (httpx.TimeoutException, TimeoutError):
        return "no answer in time", False
    except httpx.HTTPError as error:
        return f"no connection ({type(error).__name__})", False
    if response.is_success:
        return None, True
    transient = response.is_server_error or response.status_code in _TRANSIENT
    return f"it answered {response.status_code}", not transient


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubling, and spread so that a fleet does not call in step."""
    longest = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)


def _without_secrets(url: str) -> str:
    """The URL without user, password and query, for people."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
