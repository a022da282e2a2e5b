"""Log probabilities in the shapes of the two OpenAI endpoints. They are of the model's raw distribution.

A stop token ends the answer and is no part of it, so it has no entry. Probabilities too small for a number
are −9999, as OpenAI sends them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from worker_orcd.server.answer import Piece
from worker_orcd.text.tokenizer import Tokenizer

_UNLIKELY = -9999.0


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece], *, has_messages: bool) -> ChatLogprobs:
    """`choices[].logprobs` of a chat completion or of a chunk of one. Of messages, the tokens of content."""
    content: list[ContentLogprob] = []
    for piece in pieces:
        if piece.ends or (has_messages and not _is_content(tokenizer, piece)):
            continue
        own = _entry(tokenizer, piece.token.token_id, piece.token.logprob)
        top = [_entry(tokenizer, token_id, logprob) for token_id, logprob in piece.token.top_logprobs]
        content.append(ContentLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def _is_content(tokenizer: Tokenizer, piece: Piece) -> bool:
    spoken = piece.message is not None and piece.message.kind == "content"
    return spoken and tokenizer.is_text(piece.token.token_id)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> TokenLogprob:
    raw = _bytes(tokenizer, token_id)
    return TokenLogprob(raw.decode("utf-8", "replace"), _number(logprob), list(raw))


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def _number(logprob: float | None) -> float:
    return _UNLIKELY if logprob is None else max(logprob, _UNLIKELY)


class CompletionOffsets:
    """Makes `choices[].logprobs` of one completion; knows at which character each token begins."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def logprobs(self, pieces: Sequence[Piece]) -> CompletionLogprobs:
        """For the next pieces, in order."""
        told = CompletionLogprobs([], [], [], [])
        for piece in pieces:
            if piece.ends:
                continue
            token = piece.token
            text, own = self._text(token.token_id), _number(token.logprob)
            told.tokens.append(text)
            told.token_logprobs.append(own)
            top = {
                self._text(token_id): _number(logprob) for token_id, logprob in reversed(token.top_logprobs)
            }
            told.top_logprobs.append(top | {text: own})
            told.text_offset.append(self._num_chars)
            if self._tokenizer.is_text(token.token_id):
                self._num_chars += len(self._decoder.decode(self._tokenizer.token_bytes(token.token_id)))
        return told

    def _text(self, token_id: int) -> str:
        """A key that tells tokens apart: partial characters as OpenAI writes them, `bytes:\\xe2\\x80`."""
        raw = _bytes(self._tokenizer, token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
