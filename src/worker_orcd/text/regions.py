"""What the parts of an answer are for: a message, its channel, and whom it is for.

Reasoning models write more than the answer. The names are those of the Harmony format, which is the only one
here that says so itself; an answer of any other model is one text without regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Channel = Literal["analysis", "commentary", "final"]
Kind = Literal["reasoning", "content", "call"]

CHANNELS: tuple[Channel, ...] = get_args(Channel)
_READERS = frozenset({"assistant", "user", "all"})  # recipients that are no tools


@dataclass(frozen=True, slots=True)
class Message:
    """One message of an answer, as its header tells."""

    channel: Channel
    recipient: str | None = None  # `functions.get_weather`; None: whoever reads the answer
    content_type: str | None = None  # `json`, `code`
    header: str = ""  # what was understood of it, as it was written, names of control tokens included

    @property
    def kind(self) -> Kind:
        """`call`: arguments for a tool. `content`: for the user, preambles to calls included."""
        if self.recipient is not None and self.recipient not in _READERS:
            return "call"
        return "reasoning" if self.channel == "analysis" else "content"
