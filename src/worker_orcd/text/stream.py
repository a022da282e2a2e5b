"""Token bytes to text deltas: whole UTF-8 only, stop strings across tokens.

What is emitted is final. A character that is not complete yet is held back; bytes that no continuation could
make valid become U+FFFD as soon as that is certain (one for each maximal invalid part, as the Unicode
standard advises and `bytes.decode` does), so that a stray byte cannot hold up the text behind it; an
incomplete character at the end is replaced once, by `finish`. The deltas joined are what decoding all bytes
at once would give, cut before the stop string that is complete first (the longest of those that end at the
same character).

Stop strings are matched character by character by one automaton (Aho and Corasick 1975): work is linear in
the text, whatever the strings.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from worker_orcd.text.regions import Message


@dataclass(frozen=True, slots=True)
class Delta:
    text: str  # may be empty: the token's text is held back
    stopped: str | None = None  # the stop string that matched; nothing after it will be emitted
    message: Message | None = None  # whose text it is, where messages are told apart; None: of none


@dataclass(slots=True)
class _State:
    """What has been read is a beginning of a stop string, `depth` characters long."""

    depth: int
    children: dict[str, _State]
    fallback: _State | None = None  # the longest proper suffix of it that is one too; None at the root
    found: str | None = None  # the longest stop string that ends here


def _automaton(stop: Sequence[str]) -> _State:
    root = _State(0, {})
    for text in stop:
        state = root
        for character in text:
            state = state.children.setdefault(character, _State(state.depth + 1, {}))
        if text:
            state.found = text
    queue = deque(root.children.values())
    for state in root.children.values():
        state.fallback = root
    while queue:
        state = queue.popleft()
        for character, child in state.children.items():
            child.fallback = _advance(state.fallback or root, character, root)
            child.found = child.found or child.fallback.found
            queue.append(child)
    return root


def _advance(state: _State, character: str, root: _State) -> _State:
    while True:
        following = state.children.get(character)
        if following is not None:
            return following
        if state.fallback is None:
            return root
        state = state.fallback


class StopStrings:
    """The stop strings of a request, prepared once: they may be looked for in several texts."""

    def __init__(self, stop: Sequence[str]) -> None:
        """An empty stop string matches nothing."""
        self._root = _automaton(stop)

    def matcher(self) -> StopMatcher:
        """For a text that begins now."""
        return StopMatcher(self._root)


class StopMatcher:
    """Holds back what may be the beginning of a stop string. After a match, nothing more is emitted."""

    def __init__(self, root: _State) -> None:
        self._root = root
        self._state = root
        self._held = ""  # the last `_state.depth` characters: perhaps the beginning of a stop string
        self._stopped: str | None = None

    def push(self, text: str) -> Delta:
        """Text that is now certain to be no part of a stop string."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        if self._state is self._root and self._root.children.keys().isdisjoint(text):
            return Delta(text)
        known = self._held + text
        state = self._state
        for position, character in enumerate(text, start=len(self._held) + 1):
            state = _advance(state, character, self._root)
            if state.found is not None:
                self._stopped = state.found
                self._held = ""
                return Delta(known[: position - len(state.found)], state.found)
        self._state = state
        certain = len(known) - state.depth
        self._held = known[certain:]
        return Delta(known[:certain])

    def finish(self) -> Delta:
        """What was held back: the text is over, and a new one may begin."""
        held, self._held, self._state = self._held, "", self._root
        return Delta(held, self._stopped)


class TextStream:
    """One answer being streamed. What is emitted is append-only, and never contains a stop string.

    An empty stop string matches nothing. After a match, or `finish`, nothing more is emitted.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopStrings(stop).matcher()
        self._finished = False
        self.is_whole = True  # no beginning of a character is held back, and more may come

    def push(self, token: bytes) -> Delta:
        """Text that is now certain: no partial characters, no possible beginning of a stop string."""
        if self._finished:
            return self._matcher.push("")
        text = self._decoder.decode(token)
        self.is_whole = not self._decoder.getstate()[0]
        return self._matcher.push(text)

    def push_text(self, text: str) -> Delta:
        """The same for whole characters. Only while `is_whole`."""
        return self._matcher.push(text)

    def finish(self) -> Delta:
        """What was held back; bytes that never became valid UTF-8 as U+FFFD."""
        if self._finished:
            return self._matcher.push("")
        self._finished, self.is_whole = True, False
        delta = self._matcher.push(self._decoder.decode(b"", final=True))
        return Delta(delta.text + self._matcher.finish().text, delta.stopped)
