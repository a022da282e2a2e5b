"""One answer as it grows: a sequence's outputs in, pieces of text out.

Every sampled token gives exactly one piece, so pieces and tokens correspond; a piece's text may be empty
while text is held back (a partial character, the possible beginning of a stop string), and what was held back
comes with the last piece. The concatenation of all texts is the answer. Control tokens have no text. Where a
model answers in messages (its reasoning, a call, what the user is told), a piece names its message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.engine.messages import Output
from worker_orcd.errors import Internal
from worker_orcd.sequence import FinishReason, SampledToken
from worker_orcd.server.prompt import Plan
from worker_orcd.text.detokenizer import detokenizer
from worker_orcd.text.regions import Message
from worker_orcd.text.stream import Delta
from worker_orcd.text.tokenizer import Tokenizer

StopReason = Literal["eos", "stop", "length"]


class Piece(msgspec.Struct, frozen=True):
    """What one token brings. Not a dataclass: there is one a token, and this takes a fifth of the time."""

    index: int  # of the token in the answer, from 0
    token: SampledToken
    text: str  # that is now certain
    ends: bool  # a stop token: it ends the answer and is no part of its text
    message: Message | None = None  # None: the answer has no messages, or the token belongs to a header


class Answer:
    """Text, counts and times of one sequence. Times are the clock's."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, clock: Clock = MONOTONIC) -> None:
        self.num_prompt_tokens = len(plan.generation.prompt_token_ids)
        self.num_cached_tokens = 0
        self.has_messages = plan.to_messages and tokenizer.speaks_harmony
        self.num_reasoning_tokens = 0
        self.num_tokens = 0  # sampled and delivered, a stop token included
        self.stop_reason: StopReason | None = None  # None: not finished
        self.matched: str | int | None = None  # the stop string, or the stop token that was asked for
        self.submitted_at = clock()
        self.first_at: float | None = None
        self.last_at = 0.0
        self.queue_seconds = 0.0
        self.texts: list[str] = []  # of the pieces so far
        self._plan = plan
        self._clock = clock
        self._tokenizer = tokenizer
        self._text = detokenizer(
            tokenizer, plan.generation.prompt_token_ids, stop=plan.stop, messages=plan.to_messages
        )

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def decode_ms(self) -> float:
        """From the first token to the last."""
        return 0.0 if self.first_at is None else (self.last_at - self.first_at) * 1000

    @property
    def ttft_ms(self) -> float | None:
        """From submission to the first token."""
        return None if self.first_at is None else (self.first_at - self.submitted_at) * 1000

    def push(self, output: Output) -> list[Piece]:
        """Take an output in. Once `stop_reason` is set the answer is complete."""
        tokens, finish = output.tokens, output.finish_reason
        if finish is not None and not tokens:
            raise Internal("the engine ended a sequence without its last token")
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        self.queue_seconds = output.queue_seconds
        if tokens:
            self.last_at = self._clock()
            self.first_at = self.first_at or self.last_at
        pieces: list[Piece] = []
        last = len(tokens) - 1
        for position, token in enumerate(tokens):
            if finish is None or position != last:
                delta = self._text.push(token.token_id)
                piece = Piece(self.num_tokens, token, delta.text, False, delta.message)
                if delta.stopped is not None:
                    self.stop_reason, self.matched = "stop", delta.stopped
            else:
                piece = self._last_piece(token, finish)
            self.num_tokens += 1
            pieces.append(piece)
            self.texts.append(piece.text)
            if piece.message is not None and piece.message.kind == "reasoning":
                self.num_reasoning_tokens += 1
            if self.stop_reason is not None:
                break
        return pieces

    def _last_piece(self, token: SampledToken, finish: FinishReason) -> Piece:
        ends = finish is FinishReason.STOP
        if ends:
            is_end = token.token_id in self._plan.end_ids
            self.stop_reason = "eos" if is_end else "stop"
            self.matched = None if is_end else token.token_id
        delta = Delta("")
        if not (ends and self._tokenizer.is_text(token.token_id)):  # a control token also ends a message
            delta = self._text.push(token.token_id)
        text, message = delta.text, delta.message
        if delta.stopped is None:
            delta = self._text.finish()
            text += delta.text
            message = delta.message or message
            self.stop_reason = self.stop_reason or "length"
        if delta.stopped is not None:
            self.stop_reason, self.matched = "stop", delta.stopped
        return Piece(self.num_tokens, token, text, ends, message)
