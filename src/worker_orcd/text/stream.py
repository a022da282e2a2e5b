"""Token bytes to text deltas: whole UTF-8 only, stop strings across tokens. Interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delta:
    text: str  # may be empty: the token's text is held back
    stopped: str | None = None  # the stop string that matched; nothing after it will be emitted


class TextStream:
    """One answer being streamed. What is emitted is append-only, and never contains a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        raise NotImplementedError

    def push(self, token: bytes) -> Delta:
        """Text that is now certain: no partial characters, no possible beginning of a stop string."""
        raise NotImplementedError

    def finish(self) -> Delta:
        """What was held back; bytes that never became valid UTF-8 as U+FFFD."""
        raise NotImplementedError
