"""Token ids to text as they come: one answer, with stop strings, and for Harmony models with its messages.

Control tokens have no text. Which models speak Harmony their vocabularies tell (`Tokenizer.speaks_harmony`).
Their answers to messages are taken apart; what they add to a raw prompt is one text like any other. A token's
`Delta.message` is the one it belongs to; tokens of headers belong to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from worker_orcd.text.harmony import CONTROLS, HarmonyStream
from worker_orcd.text.stream import Delta, TextStream
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
        self._has_stop = any(stop)

    def push(self, token_id: int) -> Delta:
        if self._stream.is_whole and not self._first:
            whole = self._tokenizer.whole_text(token_id)
            if whole is not None:
                return self._stream.push_text(whole.text) if self._has_stop else whole
        if not self._tokenizer.is_text(token_id):
            return Delta("")
        piece = self._tokenizer.stream_bytes(token_id, first=self._first)
        self._first = False
        return self._stream.push(piece)

    def finish(self) -> Delta:
        return self._stream.finish()


class HarmonyDetokenizer:
    """Messages, as `harmony` tells them apart."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        names = {i: tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.control_ids}
        self._controls = {i: CONTROLS.get(name) for i, name in names.items()}
        self._stream = HarmonyStream(stop)

    def push(self, token_id: int) -> Delta:
        if self._tokenizer.is_text(token_id):
            return self._stream.text(self._tokenizer.token_bytes(token_id))
        return self._stream.control(self._controls.get(token_id))

    def finish(self) -> Delta:
        return self._stream.finish()
