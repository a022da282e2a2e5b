"""Token ids to text as they come: one answer, with stop strings, and for Harmony models with its messages.

Control tokens have no text. Which models speak Harmony their vocabularies tell (`Tokenizer.speaks_harmony`).
Their answers to messages are taken apart; what they add to a raw prompt is one text like any other. A token's
`Delta.message` is the one it belongs to; tokens of headers belong to none.

Stop strings are looked for in content only: reasoning restates the question and calls are data, and callers
want to cut neither. They do not match across messages.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from worker_orcd.text.harmony import CONTROLS, Control, HarmonyScanner, Segment
from worker_orcd.text.regions import Message
from worker_orcd.text.stream import Delta, StopMatcher, StopStrings, TextStream
from worker_orcd.text.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """One answer. Its tokens in order, then `finish`."""

    def push(self, token_id: int) -> Delta: ...

    def finish(self) -> Delta:
        """What was held back. Nothing may be pushed after it."""
        ...


def detokenizer(
    tokenizer: Tokenizer, prompt: Sequence[int], *, stop: Sequence[str] = (), messages: bool = False
) -> Detokenizer:
    """For an answer to `prompt`. `messages`: the chat template made it, for messages."""
    if messages and tokenizer.speaks_harmony:
        return HarmonyDetokenizer(tokenizer, stop)
    return PlainDetokenizer(tokenizer, stop, starts_text=tokenizer.starts_text(prompt))


class PlainDetokenizer:
    """One text. `starts_text`: it begins one rather than continuing the prompt's."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, starts_text: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(stop)
        self._first = starts_text

    def push(self, token_id: int) -> Delta:
        if not self._tokenizer.is_text(token_id):
            return Delta("")
        piece = self._tokenizer.stream_bytes(token_id, first=self._first)
        self._first = False
        return self._stream.push(piece)

    def finish(self) -> Delta:
        return self._stream.finish()


class HarmonyDetokenizer:
    """Messages, as `harmony` tells them apart. Characters do not go across control tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._controls = harmony_controls(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scanner = HarmonyScanner()
        self._stop = StopStrings(stop)
        self._matched: tuple[Message, StopMatcher] | None = None  # the message whose content is being read
        self._stopped: str | None = None

    def push(self, token_id: int) -> Delta:
        if self._stopped is not None:
            return Delta("", self._stopped)
        if self._tokenizer.is_text(token_id):
            text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
            return self._emit([self._scanner.text(text)], self._scanner.current)
        before = self._scanner.current
        segments = [self._scanner.text(self._decoder.decode(b"", final=True))]
        control = self._controls.get(token_id)
        if control is not None:
            segments.append(self._scanner.control(control))
        return self._emit(segments, before)

    def finish(self) -> Delta:
        if self._stopped is not None:
            return Delta("", self._stopped)
        segments = [self._scanner.text(self._decoder.decode(b"", final=True)), self._scanner.finish()]
        current, self._scanner.current = self._scanner.current, None
        return self._emit(segments, current)

    def _emit(self, segments: Sequence[Segment | None], message: Message | None) -> Delta:
        """The text of at most one message, and what stop strings held back of one that is over now."""
        texts: list[str] = []
        for segment in segments:
            if segment is not None and segment.text:
                message = segment.message
                texts.append(self._match(message, segment.text))
        if self._matched is not None and self._matched[0] is not self._scanner.current:
            message = message or self._matched[0]
            texts.append(self._matched[1].finish().text)
            self._matched = None
        return Delta("".join(texts), self._stopped, message)

    def _match(self, message: Message, text: str) -> str:
        if message.kind != "content":
            return text
        if self._matched is None or self._matched[0] is not message:
            self._matched = (message, self._stop.matcher())
        delta = self._matched[1].push(text)
        self._stopped = delta.stopped
        return delta.text


def harmony_controls(tokenizer: Tokenizer) -> Mapping[int, Control]:
    """What the control tokens of a vocabulary do, by id."""
    named = {tokenizer.token_bytes(i).decode("utf-8", "replace"): i for i in tokenizer.control_ids}
    return {named[name]: control for name, control in CONTROLS.items() if name in named}
