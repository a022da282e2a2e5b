"""Which characters of a rendered prompt came from users, where that decides what is a control token.

A template mixes messages into its own text, and may trim, cut, quote or repeat them on the way. Before
rendering, characters of user strings with which a control token's name could begin or be completed are
exchanged for private-use characters that occur nowhere else: marks. Marks survive what templates do to text;
afterwards each becomes the character it stands for, in a segment of its own that is not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from worker_orcd.errors import InvalidParameter

_FIRST, _LAST = 0x100000, 0x10FFFD  # supplementary private use area B
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_PREFIX = 3  # characters of a control token's name that make the first of them suspicious
MAX_DEPTH = 64

Plain = str | int | float | bool | None | list[Any] | dict[str, Any]


class ControlNames:
    """The names of a tokenizer's control tokens, prepared for finding what could become one."""

    def __init__(self, names: Collection[str]) -> None:
        named = [name for name in names if name]
        self.firsts = frozenset(name[0] for name in named)
        self.longest = max((len(name) for name in named), default=0)
        self.beginnings = frozenset(name[:k] for name in named for k in range(1, len(name)))
        self.endings = frozenset(name[k:] for name in named for k in range(1, len(name)))
        self.short = frozenset(name[:_PREFIX].lower() for name in named)
        both = {c for first in self.firsts for c in (first, first.lower(), first.upper())}
        self.first = re.compile("[" + re.escape("".join(sorted(both))) + "]") if named else None

    def suspects(self, text: str, *, strict: bool) -> Iterator[int]:
        """Positions in a user's string, ascending, that could be part of a control token after rendering.

        The first character, where it could complete a name that the template began; whatever begins like a
        name, in either case; and at the end the beginning of a name. `strict`: every character with which a
        name begins.
        """
        if not text or self.first is None:
            return
        if any(text[:k] in self.endings for k in range(1, min(self.longest, len(text)) + 1)):
            yield 0
        tail = len(text) - self.longest
        for match in self.first.finditer(text):
            i = match.start()
            if (
                strict
                or any(text[i : i + k].lower() in self.short for k in range(1, _PREFIX + 1))
                or (i > tail and text[i:] in self.beginnings)
            ):
                yield i


class Marker:
    """Marks the strings of one request. `forbidden`: text that is rendered besides (the template)."""

    def __init__(self, names: ControlNames, forbidden: str, *, strict: bool) -> None:
        self._names = names
        self._strict = strict
        self._taken = set(_PRIVATE.findall(forbidden))
        self._marks: dict[str, str] = {}  # character -> its mark

    def reserve(self, value: Plain) -> None:
        """Marks must not occur in the request; call this for all of it before `mark`."""
        for text in _strings(value):
            self._taken.update(_PRIVATE.findall(text))

    def mark(self, value: Plain) -> Plain:
        """A copy in which every string, also of keys, is marked."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self._mark(key): self.mark(item) for key, item in value.items()}
        return value

    def segments(self, rendered: str) -> list[tuple[str, bool]]:
        """(text, trusted) pairs: the rendered text with the original characters for the marks."""
        if not self._marks:
            return [(rendered, True)]
        originals = {mark: character for character, mark in self._marks.items()}
        if "\\ud" in rendered:  # JSON with ensure_ascii
            for mark in originals:
                rendered = rendered.replace(_escaped(mark), mark)
        pieces = re.split("([" + "".join(originals) + "])", rendered)
        return [(originals.get(piece, piece), piece not in originals) for piece in pieces if piece]

    def _mark(self, text: str) -> str:
        pieces: list[str] = []
        end = 0
        for i in self._names.suspects(text, strict=self._strict):
            if i >= end:
                pieces += [text[end:i], self._mark_of(text[i])]
                end = i + 1
        return "".join([*pieces, text[end:]]) if pieces else text

    def _mark_of(self, character: str) -> str:
        mark = self._marks.get(character)
        if mark is None:
            free = (chr(c) for c in range(_FIRST, _LAST + 1) if chr(c) not in self._taken)
            mark = next(free, None)
            if mark is None:
                raise InvalidParameter("the messages use up all private-use characters", param="messages")
            self._taken.add(mark)
            self._marks[character] = mark
        return mark


def _escaped(character: str) -> str:
    high, low = character.encode("utf-16-be")[:2], character.encode("utf-16-be")[2:]
    return f"\\u{high.hex()}\\u{low.hex()}"


def _strings(value: Plain) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


def plain(value: object, where: str, depth: int = 0) -> Plain:
    """A copy as plain JSON data. Raises InvalidParameter naming `where` for anything else."""
    if depth > MAX_DEPTH:
        raise InvalidParameter(f"{where} is nested more than {MAX_DEPTH} deep", param=where)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        copied: dict[str, Any] = {}
        for key, item in items:
            if not isinstance(key, str):
                raise InvalidParameter(f"{where} has a key that is no string", param=where)
            copied[key] = plain(item, where, depth + 1)
        return copied
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, where, depth + 1) for item in cast("Sequence[object]", value)]
    raise InvalidParameter(f"{where} has a {type(value).__name__}; allowed is JSON", param=where)
