"""Streams of the Harmony format for tests: written with the names of control tokens, cut and damaged."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker_orcd.text.harmony import CONTROLS, HarmonyStream
from worker_orcd.text.regions import Message

EXAMPLES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "harmony" / "examples.json").read_text(encoding="utf-8")
)
NAME = re.compile("(" + "|".join(map(re.escape, CONTROLS)) + "|<\\|reserved\\|>)")

Item = str | bytes  # a control token by its name, or ordinary text


def items_of(stream: str, *, words: bool = False) -> list[Item]:
    """The control tokens of a stream, and each character between them. `words`: of messages, each word."""
    found: list[Item] = []
    for part in NAME.split(stream):
        if NAME.fullmatch(part):
            found.append(part)
        else:
            in_words = words and found[-1:] == ["<|message|>"]
            found += [piece.encode() for piece in (re.findall(r"\s*\S+|\s+", part) if in_words else part)]
    return found


def cut(items: Iterable[Item], places: Iterable[int]) -> Iterator[Item]:
    """The same stream, its text in the longest pieces but for cuts after so many bytes (a control is 1)."""
    borders = set(places)
    held, position = b"", 0
    for item in items:
        if isinstance(item, str):
            yield from [held, item] if held else [item]
            held = b""
            position += 1
            continue
        for byte in item:
            if position in borders and held:
                yield held
                held = b""
            held += bytes([byte])
            position += 1
    if held:
        yield held


@dataclass
class Reading:
    """What came out: the messages in order, the text of each."""

    messages: list[tuple[Message, str]] = field(default_factory=list[tuple[Message, str]])
    stopped: str | None = None
    held: int = 0  # characters, at most, that were in and neither out nor header

    @property
    def told(self) -> list[list[str | None]]:
        """Channel, recipient, content type and text of each message that has text."""
        return [[m.channel, m.recipient, m.content_type, text] for m, text in self.messages if text]

    def of_kind(self, kind: str) -> str:
        return "".join(text for m, text in self.messages if m.kind == kind)


def read(items: Iterable[Item], stop: Iterable[str] = ()) -> Reading:
    stream, reading = HarmonyStream(tuple(stop)), Reading()
    taken = given = 0

    def note(delta: Any) -> None:
        nonlocal given
        reading.stopped = delta.stopped
        if delta.message is None:
            assert delta.text == ""
            return
        known = reading.messages[-1][0] if reading.messages else None
        if delta.message is not known:
            reading.messages.append((delta.message, ""))
            given = taken - len(delta.text)  # what was held before is header
        reading.messages[-1] = (delta.message, reading.messages[-1][1] + delta.text)
        given += len(delta.text)

    for item in items:
        if isinstance(item, str):
            note(stream.control(CONTROLS.get(item)))
        else:
            taken += len(item.decode("utf-8", "ignore"))
            note(stream.text(item))
        reading.held = max(reading.held, taken - given)
    note(stream.finish())
    return reading


def damaged(items: list[Item]) -> Iterator[tuple[str, list[Item]]]:
    """Every item left out, doubled, and made the last; something else inserted at every place."""
    for k in range(len(items)):
        yield f"without {k}", [*items[:k], *items[k + 1 :]]
        yield f"doubled {k}", [*items[: k + 1], *items[k:]]
        yield f"first {k}", items[:k]
    others: list[Item] = [*CONTROLS, "<|reserved|>", b" ", b"x", b"to=", b"assistant", b"final", b"\xf0\x9f"]
    for k, other in itertools.product(range(len(items) + 1), others):
        yield f"{other!r} at {k}", [*items[:k], other, *items[k:]]
