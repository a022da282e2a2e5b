"""What a server knows of the client that a response is for, where it tells: `scope["extensions"][PEER]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope

PEER = "worker_orcd.peer"


class Peer(Protocol):
    """Lets a response be written from a callback, and tells that the client is gone without a task that waits
    for it.
    """

    on_gone: Callable[[], None] | None
    """Called once, on the loop, when the client hangs up before its answer is complete."""

    @property
    def has_gone(self) -> bool: ...

    @property
    def has_sent_all(self) -> bool:
        """Whether the end of the request's body has come: reading it waits for nothing."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the response has begun and the connection takes more of its body now."""
        ...

    def hold_head(self) -> None:
        """The head, which the server writes next, goes with what it writes after that."""
        ...

    def write(self, body: bytes) -> None:
        """A part of the body, not empty. Only while `is_open`."""
        ...


def peer_of(scope: Scope) -> Peer | None:
    return scope.get("extensions", {}).get(PEER)
