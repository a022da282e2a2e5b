"""Which characters of a rendered prompt came from users, where that decides what is a control token.

A template mixes messages into its own text, and may trim, cut, quote or repeat them on the way. Before
rendering, characters of user strings with which a control token's name could begin, or by which one that the
template began could be completed, are exchanged for private-use characters that occur nowhere else: marks.
Marks survive what templates do to text; afterwards each becomes the character it stands for, and its place is
known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from worker_orcd.errors import InvalidParameter

_FIRST, _LAST = 0x100000, 0x10FFFD  # supplementary private use area B
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_GRAM = 3  # characters of a name that make a place suspicious
_MANY = 256  # different beginnings of names from which their first character is suspicious by itself
MAX_DEPTH = 64
_MAX_INTEGER = 2**64  # what JSON readers agree on; Python would refuse to write longer ones

Plain = str | int | float | bool | None | list[Any] | dict[str, Any]


class ControlNames:
    """The names of a tokenizer's control tokens, prepared for finding what could become one."""

    def __init__(self, names: Collection[str]) -> None:
        named = [name for name in names if name]
        firsts = {c for name in named for c in (name[0], name[0].lower(), name[0].upper())}
        first = "[" + re.escape("".join(sorted(firsts))) + "]" if named else "(?!)"
        grams = sorted({name[:_GRAM] for name in named})
        lenient = f"(?={'|'.join(map(re.escape, grams))}){first}" if 0 < len(grams) <= _MANY else first
        self._first = re.compile(first)
        self._lenient = re.compile(lenient)
        self._endings = {name[i:] for name in named for i in range(1, len(name))}
        self._longest = max(map(len, named), default=0)
        self._joined = "\0".join(named)

    def concern(self, value: Plain) -> bool:
        """Whether `strict` marks could differ from the others for any string of the request."""
        return any(self._first.search(text) or self._inside(text) for text in _strings(value))

    def suspects(self, text: str, *, strict: bool) -> Iterator[int]:
        """Positions in a user's string, ascending, that could be part of a control token after rendering.

        The first character, where the string begins with the end of a name; whatever begins like a name.
        `strict`: every character with which a name begins, and of strings that are part of a name the first;
        a template that compares strings may not recognise them then.
        """
        lengths = range(1, min(self._longest, len(text) + 1))
        if any(text[:k] in self._endings for k in lengths) or (strict and self._inside(text)):
            yield 0
        for match in (self._first if strict else self._lenient).finditer(text):
            yield match.start()

    def _inside(self, text: str) -> bool:
        return 0 < len(text) < self._longest and text in self._joined


class Marker:
    """Marks the strings of one request; no mark occurs in `texts`, which are rendered besides, or the
    request.
    """

    def __init__(self, names: ControlNames, request: Plain, *texts: str) -> None:
        self._names = names
        self._taken = {mark for text in (*texts, *_strings(request)) for mark in _PRIVATE.findall(text)}
        self._marks: dict[str, str] = {}  # character -> its mark

    def mark(self, value: Plain, *, strict: bool) -> Plain:
        """A copy in which every string, also of keys, is marked."""
        if isinstance(value, str):
            return self._mark(value, strict)
        if isinstance(value, list):
            return [self.mark(item, strict=strict) for item in value]
        if isinstance(value, dict):
            return {self._mark(key, strict): self.mark(item, strict=strict) for key, item in value.items()}
        return value

    def reveal(self, rendered: str, filler: str) -> tuple[str, str]:
        """The text with the original characters for the marks, and the text with `filler` for them."""
        if "\\ud" in rendered:  # a template that writes JSON with ensure_ascii
            for mark in self._marks.values():
                rendered = rendered.replace(_escaped(mark), mark)
        originals = {ord(mark): character for character, mark in self._marks.items()}
        return rendered.translate(originals), rendered.translate(dict.fromkeys(originals, filler))

    def _mark(self, text: str, strict: bool) -> str:
        pieces: list[str] = []
        end = 0
        for i in self._names.suspects(text, strict=strict):
            if i >= end:  # found once already
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
    units = character.encode("utf-16-be").hex()
    return f"\\u{units[:4]}\\u{units[4:]}"


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
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise InvalidParameter(f"{where} has an integer of more than 64 bits", param=where)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        copied: dict[str, Any] = {}
        for key, item in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise InvalidParameter(f"{where} has a key that is no string", param=where)
            copied[key] = plain(item, where, depth + 1)
        return copied
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, where, depth + 1) for item in cast("Sequence[object]", value)]
    raise InvalidParameter(f"{where} has a {type(value).__name__}; allowed is JSON", param=where)
