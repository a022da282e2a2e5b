"""The Harmony format of gpt-oss: a stream of text and control tokens, told apart into messages.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

A header is everything before `<|message|>`; the first one was begun by the prompt, with `<|start|>assistant`.
It names a channel and perhaps a recipient (`to=functions.x`, before or after the channel) and a content type.
Models write headers that are none of this: in one turn of 25 at temperature 1, somebody counted.

* Nothing raises and no text is lost. At the first character that cannot belong to a header, what was
  understood before it counts, and the rest is text of that message: content, unless a channel was named.
* Only tokens are control. The same characters written as ordinary text are text.
* Work is linear in the text, and headers are short, so what is held back is bounded.
* What comes out depends on the characters alone, not on how they are cut into pieces.
* White space between messages, and a header in whose middle the answer ends, are no text.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from worker_orcd.text.regions import CHANNELS, Channel, Message
from worker_orcd.text.stream import Delta, StopMatcher, StopStrings

MAX_HEADER = 256  # characters; names of functions have up to 64
DEFAULT: Channel = "final"  # of a message whose header names no channel

_ROLE = "assistant"
_TO = "to="
_FUNCTIONS = "functions."  # a recipient even where `to=` is forgotten
_TYPES = ("json", "code", "text")  # content types that need neither <|constrain|> nor a recipient
_PUNCTUATION = frozenset("_-.:/+")


class Control(Enum):
    """Control tokens by what they do. Any other one has no effect."""

    START = auto()
    CHANNEL = auto()
    CONSTRAIN = auto()
    MESSAGE = auto()
    END = auto()  # of a message: also <|return|> and <|call|>


CONTROLS: Mapping[str, Control] = {
    "<|start|>": Control.START,
    "<|channel|>": Control.CHANNEL,
    "<|constrain|>": Control.CONSTRAIN,
    "<|message|>": Control.MESSAGE,
    "<|end|>": Control.END,
    "<|return|>": Control.END,
    "<|call|>": Control.END,
}
_NAMES = {Control.START: "<|start|>", Control.CHANNEL: "<|channel|>", Control.CONSTRAIN: "<|constrain|>"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Text of a message. Without text: a header that was understood, but has no message."""

    message: Message
    text: str


class _Field(Enum):
    ROLE = auto()
    CHANNEL = auto()
    TYPE = auto()


@dataclass(slots=True)
class _Header:
    """A header as far as it was read: words, of which the last may be incomplete."""

    interrupted: Message | None = None  # the message in which it began, where that had no end
    field: _Field = _Field.ROLE
    word: str = ""
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    perhaps: str | None = None  # a content type if <|message|> follows, else the first word of a text
    marked: bool = False  # it has a control token of its own, so it is no answer without header
    text: str = ""  # all of it but control tokens
    written: str = ""  # all of it
    understood: int = 0  # characters of `text` that are certainly header
    kept: int = 0  # the same of `written`

    def mark(self, control: Control, new: _Field) -> None:
        """Go on with the field that a control token begins."""
        self.marked = True
        self.field = new
        self.written += _NAMES[control]
        self._understand()

    def read(self, text: str) -> int | None:
        """How many characters prove that this is no header; None: all of them may be one."""
        for position, character in enumerate(text, start=1):
            fits = self._fits(character)
            self.text += character
            self.written += character
            if not fits or len(self.text) > MAX_HEADER:
                return position
        return None

    def complete(self) -> bool:
        """The last word is over. Whether it is one that can stand there."""
        word, self.word = self.word, ""
        if word == "":
            return True
        if self.field is _Field.CHANNEL and self.channel is None:
            self.channel = next((name for name in CHANNELS if name == word), None)
            known = self.channel is not None
        elif self.recipient is None and word.startswith((_TO, _FUNCTIONS)) and word != _TO:
            self.recipient = word.removeprefix(_TO)
            known = True
        elif self.field is _Field.TYPE and self.content_type is None:
            self.content_type = word
            known = True
        elif self._may_be_type(word, whole=True):
            self.perhaps = word
            return True
        else:
            known = self.field is _Field.ROLE and word == _ROLE
        if known:
            self._understand()
        return known

    def rest(self) -> str:
        """What is text where this turns out to be no header."""
        return self.text[self.understood :] if self.marked else self.text

    def message(self) -> Message:
        """What was understood of it."""
        if not self.marked:
            return Message(DEFAULT)
        channel = self.channel or (self.interrupted.channel if self.interrupted else DEFAULT)
        return Message(channel, self.recipient, self.content_type, self.written[: self.kept])

    def opened(self) -> Message:
        """All of it was a header."""
        self.marked = True
        self.content_type = self.content_type or self.perhaps
        self.kept = len(self.written)
        message = self.message()
        if self.channel is None and message.kind == "call":
            return replace(message, channel="commentary")
        return message

    def _understand(self) -> None:
        self.understood, self.kept = len(self.text), len(self.written)

    def _fits(self, character: str) -> bool:
        if character.isspace():
            return self.complete()
        if self._extends(self.word + character):
            self.word += character
            return True
        # The word may be over without a space: `finalThe`, `assistantassistant`, `to=functions.x{`.
        if self.word == "" or not self.complete() or not self._extends(character):
            return False
        self.word = character
        return True

    def _extends(self, word: str) -> bool:
        """Whether the next word may begin like this."""
        if self.field is _Field.CHANNEL and self.channel is None:
            return any(name.startswith(word) for name in CHANNELS)
        if self.field is _Field.ROLE and _ROLE.startswith(word):
            return True
        if self.recipient is None and self._may_be_recipient(word):
            return True
        if self.field is _Field.TYPE:
            return self.content_type is None and _is_name(word)
        return self._may_be_type(word, whole=False)

    def _may_be_recipient(self, word: str) -> bool:
        beginnings = (_TO,) if self.field is _Field.ROLE else (_TO, _FUNCTIONS)
        return any(b.startswith(word) for b in beginnings) or (
            word.startswith(beginnings) and _is_name(word.removeprefix(_TO))
        )

    def _may_be_type(self, word: str, *, whole: bool) -> bool:
        if self.field is not _Field.CHANNEL or self.perhaps is not None:
            return False
        if self.recipient is not None:
            return _is_name(word)
        return word in _TYPES if whole else any(name.startswith(word) for name in _TYPES)


def _is_name(text: str) -> bool:
    return text.isascii() and all(c.isalnum() or c in _PUNCTUATION for c in text)


class HarmonyScanner:
    """Reads one answer, which follows a prompt that ends with `<|start|>assistant`.

    A call gives text of at most one message.
    """

    current: Message | None  # whose text is being read; None: in a header

    def __init__(self) -> None:
        self.current = None
        self._header = _Header()

    def text(self, text: str) -> Segment | None:
        """Ordinary text. What is now certain to be text of a message."""
        if self.current is not None:
            return Segment(self.current, text)
        read = self._header.read(text)
        return None if read is None else self._give_up(text[read:])

    def control(self, control: Control) -> Segment | None:
        """A control token. What was read of a header turns out to be text, or has no message."""
        told = None
        if self.current is None:
            if self._header.complete():
                return self._in_header(control)
            told = self._give_up("")
        self._in_message(control)
        return told

    def finish(self) -> Segment | None:
        """The answer is over. The beginning of a header is text only if nothing proved it one."""
        if self.current is not None or self._header.marked:
            return None
        return self._close()

    def _in_message(self, control: Control) -> None:
        """An end may be missing; <|message|> and <|constrain|> mean nothing here."""
        if control in (Control.MESSAGE, Control.CONSTRAIN):
            return
        interrupted, self.current = self.current, None
        self._header = _Header()
        if control is Control.CHANNEL:
            self._header.interrupted = interrupted
            self._header.mark(control, _Field.CHANNEL)
        elif control is Control.START:
            self._header.mark(control, _Field.ROLE)

    def _in_header(self, control: Control) -> Segment | None:
        header = self._header
        if control is Control.MESSAGE:
            self.current = header.opened()
            return Segment(self.current, "")
        if control is Control.CONSTRAIN:
            misplaced = header.field is _Field.CHANNEL and header.channel is None
            if misplaced or header.field is _Field.TYPE:
                return self._give_up("")
            header.mark(control, _Field.TYPE)
            return None
        if control is Control.CHANNEL and header.field is _Field.ROLE:
            header.mark(control, _Field.CHANNEL)
            return None
        told = self._close()
        self._in_message(control)
        self._header.interrupted = header.interrupted if control is Control.CHANNEL else None
        return told

    def _close(self) -> Segment | None:
        """A header without message: what else could stand in one is text."""
        header, self._header = self._header, _Header()
        text = header.rest() if header.rest().strip() else ""
        return Segment(header.message(), text) if text or header.kept else None

    def _give_up(self, more: str) -> Segment:
        """From here on this is no header: what was not understood of it, and `more`, are text."""
        header, self._header = self._header, _Header()
        understood = header.channel is not None or header.recipient is not None
        self.current = header.message()
        if header.interrupted is not None and not understood:
            self.current = header.interrupted
        return Segment(self.current, header.rest() + more)


class HarmonyStream:
    """Bytes and control tokens of one answer to text of messages; see `TextStream`.

    Stop strings are looked for in content only: reasoning restates the question and calls are data, and
    callers want to cut neither. They do not match across messages, nor characters across control tokens.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scanner = HarmonyScanner()
        self._stop = StopStrings(stop)
        self._matched: tuple[Message, StopMatcher] | None = None  # the message whose content is being read
        self._stopped: str | None = None

    def text(self, token: bytes) -> Delta:
        """An ordinary token."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        segment = self._scanner.text(self._decoder.decode(token))
        return self._told([segment], self._scanner.current)

    def control(self, control: Control | None) -> Delta:
        """A control token; None: one that means nothing here."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        current = self._scanner.current
        segments = [self._scanner.text(self._decoder.decode(b"", final=True))]
        if control is not None:
            segments.append(self._scanner.control(control))
        return self._told(segments, current)

    def finish(self) -> Delta:
        """What was held back. Nothing comes after it."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        current = self._scanner.current
        segments = [self._scanner.text(self._decoder.decode(b"", final=True)), self._scanner.finish()]
        self._scanner = HarmonyScanner()
        return self._told(segments, current)

    def _told(self, segments: Sequence[Segment | None], message: Message | None) -> Delta:
        """The text that is certain, all of one message, and what was held back of a message that is over."""
        texts: list[str] = []
        for segment in segments:
            if segment is not None and segment.text:
                message = segment.message
                texts.append(self._match(message, segment.text))
        if self._matched is not None and self._matched[0] is not self._scanner.current:
            texts.append(self._matched[1].finish().text)
            self._matched = None
        return Delta("".join(texts), self._stopped, message)

    def _match(self, message: Message, text: str) -> str:
        if message.kind != "content":
            return text
        if self._matched is None:
            self._matched = (message, self._stop.matcher())
        delta = self._matched[1].push(text)
        self._stopped = delta.stopped
        return delta.text
