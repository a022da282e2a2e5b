"""What chat completions call the parts of an answer: content, and reasoning_content.

Calls are told as reasoning: they are not for the user to read, and there are no tool calls in this version. A
message that follows another one in the same field begins on a new line. Streamed or not, the parts are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from worker_orcd.server.answer import Piece
from worker_orcd.text.regions import Message


class Parts(NamedTuple):
    reasoning: str
    content: str


class Splitter:
    """Splits one answer as it comes."""

    def __init__(self) -> None:
        self._last: dict[bool, Message | None] = {}  # of whom text was told last, by whether it is content

    def split(self, pieces: Iterable[Piece]) -> Parts:
        """The next pieces, in order."""
        texts: dict[bool, list[str]] = {False: [], True: []}
        for piece in pieces:
            if not piece.text:
                continue
            is_content = piece.message is None or piece.message.kind == "content"
            if is_content in self._last and self._last[is_content] is not piece.message:
                texts[is_content].append("\n")
            self._last[is_content] = piece.message
            texts[is_content].append(piece.text)
        return Parts("".join(texts[False]), "".join(texts[True]))
