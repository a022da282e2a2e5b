"""Clients of the simulated worker: what they ask, what they must be told, and how they misbehave."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine_fakes import STOP, Windows, alone

if TYPE_CHECKING:
    from sim_network import Pipe
    from sim_world import World

EOS = 0
# What the 24 tokens of the fake device are: the end, letters, and characters in pieces.
TEXTS = (b"", *(bytes([c]) for c in b"abcdefghijklmno p"), b"\xc3", b"\xa4", b"\xe2", b"\x82", b"\xac", b"qr")
STOPS = ("a", "bc", "ef", "dd", "ä", "qrq")


@lru_cache(maxsize=4096)
def _alone(
    prompt: tuple[int, ...], most: int, seed: int, least: int, windows: Windows, penal: bool
) -> list[int]:
    return alone(list(prompt), most, seed=seed, min_tokens=least, windows=windows, penalises=penal)


@dataclass(kw_only=True)
class Question:
    """One sequence that is asked for, and its answer as it is given to nobody else."""

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    seed: int = 0
    penalises: bool = False
    stop: tuple[str, ...] = ()
    windows: Windows = (None,)
    tokens: list[int] = field(default_factory=list)  # as many as are delivered
    text: str = ""
    reason: str = "length"

    def __post_init__(self) -> None:
        drawn = _alone(
            self.prompt, self.max_tokens, self.seed, self.min_tokens, tuple(self.windows), self.penalises
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for number, token in enumerate(drawn):
            self.tokens.append(token)
            is_last = number == len(drawn) - 1
            ends = is_last and token in STOP and number >= self.min_tokens
            self.text += decoder.decode(b"" if ends else TEXTS[token], is_last)
            found = [self.text.index(stop) for stop in self.stop if stop in self.text]
            if found:
                self.text, self.reason = self.text[: min(found)], "stop"
                return
            if ends:
                self.reason = "eos" if token == EOS else "stop"

    def fields(self) -> dict[str, Any]:
        """Of the request."""
        asked: dict[str, Any] = {"max_tokens": self.max_tokens, "seed": self.seed, "stop_token_ids": [1]}
        if self.min_tokens:
            asked["min_tokens"] = self.min_tokens
        if self.penalises:
            asked["presence_penalty"] = 1.0
        if self.stop:
            asked["stop"] = list(self.stop)
        return asked


class Caller:
    """One request on one connection. Subclasses say what its answer must be."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.pipe: Pipe | None = None
        self.sent_at = 0.0
        self.status = 0
        self.body = bytearray()
        self.is_over = False  # whatever came of it
        self.is_complete = False  # it got a whole response
        self.is_gone = False  # it hung up
        self.was_slow = False
        self.is_bad = False  # it must be refused

    # what the connection tells

    def on_head(self, status: int) -> None:
        self.status = status
        self.world.event("answer", f"{self.name}: {status}")

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_complete(self) -> None:
        self.is_over = self.is_complete = True
        self.world.event("complete", self.name)
        with self.world.watched():
            self.check()

    def on_cut(self) -> None:
        self.is_over = True
        self.world.event("cut", self.name)
        if not (self.was_slow or (self.status == 0 and self.world.is_closing)):
            self.world.wrong(f"{self.name}: the connection was cut")

    def check(self) -> None:
        raise NotImplementedError

    def hang_up(self) -> None:
        self.is_over = self.is_gone = True
        self.world.event("hang up", self.name)
        if self.pipe is not None:
            self.pipe.hang_up()

    # what may be told

    def check_refusal(self, code: str, *, begun: bool) -> None:
        world = self.world
        known = {
            "INVALID_REQUEST": self.is_bad,
            "INVALID_VALUE": self.is_bad,
            "NOT_READY": not begun and (not world.was_ready_at(self.sent_at) or world.has_failed),
            "MODEL_LOAD_FAILED": world.plan.load_fails,
            "DRAINING": world.is_ending,
            "QUEUE_FULL": not begun and world.last_full >= self.sent_at,
            "CANCELLED": self.may_be_cancelled(),
            "DEADLINE_EXCEEDED": self.is_late(),
        }
        allowed = known.get(code, False) or code in self.failures()
        assert allowed, f"{self.name}: nobody has a reason for {code}"

    def may_be_cancelled(self) -> bool:
        return False

    def is_late(self) -> bool:
        return False

    def failures(self) -> set[str]:
        return self.world.collapse_codes

    def seeds(self) -> list[int]:
        return []


class Plain(Caller):
    """Asks something that costs nothing."""

    def __init__(self, world: World, path: str) -> None:
        super().__init__(world, path)
        self.path = path

    def check(self) -> None:
        world = self.world
        if self.path == "/health":
            told = json.loads(self.body)
            assert self.status == (503 if told["state"] == "failed" else 200)
            assert 0 <= told["running"] + told["waiting"] <= world.plan.max_queue
            if told["kv_blocks_total"] is not None:
                assert 0 <= told["kv_blocks_free"] <= told["kv_blocks_total"]
            assert told["state"] != "draining" or world.is_ending
        elif self.path == "/ready":
            if self.status == 200:
                assert world.was_ready_at(world.loop.now), "it is ready, and is not"
            else:
                self.check_refusal(json.loads(self.body)["error"]["code"], begun=False)
        elif self.path == "/metrics":
            assert self.status == 200 and b"worker_requests_total" in self.body
        else:
            assert self.status == 202


class Cancelling(Caller):
    def __init__(self, world: World, job_id: str) -> None:
        super().__init__(world, f"cancel {job_id}")
        self.job_id = job_id

    def check(self) -> None:
        assert self.status == 202
        assert json.loads(self.body)["job_id"] == self.job_id


class JobCaller(Caller):
    """Asks for answers to questions, under one job id."""

    def __init__(self, world: World, job_id: str, questions: list[Question], deadline_ms: int | None) -> None:
        super().__init__(world, job_id)
        self.job_id, self.questions = job_id, questions
        self.deadline_ms = deadline_ms
        self.outcome: str | None = None  # as /metrics counts it

    def may_be_cancelled(self) -> bool:
        return self.job_id in self.world.cancelled_jobs or self.was_slow

    def is_late(self) -> bool:
        if self.deadline_ms is None:
            return False
        return self.world.loop.now >= self.sent_at + self.deadline_ms / 1000

    def failures(self) -> set[str]:
        failed = (self.world.checks.may_fail_with(seed) for seed in self.seeds())
        return super().failures().union(*failed)

    def seeds(self) -> list[int]:
        return [question.seed for question in self.questions]

    def check_error(self, code: str, *, begun: bool) -> None:
        if self.job_id in self.world.duplicated and code == "INVALID_REQUEST" and self.status == 409:
            self.outcome = "rejected"
            return
        self.check_refusal(code, begun=begun)
        self.outcome = {
            "CANCELLED": "cancelled",
            "DRAINING": "cancelled" if begun else "any",
            "DEADLINE_EXCEEDED": "timeout",
            "INVALID_REQUEST": "rejected",
            "INVALID_VALUE": "rejected",
            "NOT_READY": "rejected",
            "QUEUE_FULL": "rejected",
            "MODEL_LOAD_FAILED": "rejected",
        }.get(code, "any")

    def check(self) -> None:
        if self.status != 200:
            self.check_error(json.loads(self.body)["error"]["code"].upper(), begun=False)
            return
        assert not self.is_bad, "what must be refused was done"
        closing_at = self.world.closing_at
        assert closing_at is None or self.sent_at <= closing_at, "a new job was taken at the end"


class Execute(JobCaller):
    """POST /execute: a stream of named events."""

    def __init__(self, world: World, job_id: str, question: Question, deadline_ms: int | None) -> None:
        super().__init__(world, job_id, [question], deadline_ms)
        self._events: list[str] = []  # but `metrics`
        self._text = ""
        self._tokens: list[int] = []

    def on_body(self, data: bytes) -> None:
        super().on_body(data)
        if self.status != 200:
            return
        *blocks, rest = bytes(self.body).split(b"\n\n")
        self.body = bytearray(rest)
        for block in blocks:
            if not block.startswith(b":"):
                name, told = block.split(b"\n")
                self.world.event("told", f"{self.job_id}: {name.decode()[7:]} {told.decode()[6:]}")
                with self.world.watched():
                    self._take(name.decode()[7:], json.loads(told[6:]))

    def _take(self, name: str, told: dict[str, Any]) -> None:
        (question,) = self.questions
        events = self._events
        assert "end" not in events and "error" not in events, "something was told after the last event"
        assert events or name == "started", "a stream does not begin with started"
        if name == "metrics":
            assert told["tokens_out"] == len(self._tokens)
            return
        events.append(name)
        match name:
            case "started":
                assert len(events) == 1, "a stream starts twice"
                assert (told["job_id"], told["seed"]) == (self.job_id, question.seed)
                assert told["prompt_tokens"] == len(question.prompt) > told["cached_tokens"] >= 0
            case "token":
                assert told["i"] == len(self._tokens), "a token is missing, or told twice"
                self._tokens.append(told["id"])
                assert self._tokens == question.tokens[: told["i"] + 1], "another token than alone"
                self._text += told["t"]
            case "end":
                assert self._tokens == question.tokens, "an answer is not whole"
                assert told["tokens_out"] == len(self._tokens)
                assert told["stop_reason"] == question.reason
                assert self._text == question.text, f"{self._text!r} instead of {question.text!r}"
                self.outcome = "success"
            case "error":
                self.check_error(told["code"], begun=True)
            case _:
                raise AssertionError(f"an event of no known name: {name}")

    def check(self) -> None:
        super().check()
        if self.status == 200:
            assert self._events[-1] in ("end", "error"), "a stream without a last event"


class Completion(JobCaller):
    """POST /v1/completions: n answers, streamed or not."""

    def __init__(self, world: World, name: str, questions: list[Question], deadline_ms: int | None) -> None:
        super().__init__(world, name, questions, deadline_ms)
        self.streams = False
        self._texts = [""] * len(questions)
        self._reasons: list[str | None] = [None] * len(questions)

    def check(self) -> None:
        super().check()
        if self.status != 200:
            return
        if not self.streams:
            for choice in json.loads(self.body)["choices"]:
                self._take(choice)
        else:
            *blocks, done, rest = bytes(self.body).split(b"\n\n")
            assert (done, rest) == (b"data: [DONE]", b""), "a stream without its end"
            told = [json.loads(block[6:]) for block in blocks if not block.startswith(b":")]
            if told and "error" in told[-1]:
                self.check_error(told.pop()["error"]["code"].upper(), begun=True)
            for chunk in told:
                for choice in chunk["choices"]:
                    self._take(choice)
        if self.outcome is None:
            assert None not in self._reasons, "an answer is not whole"
            self.outcome = "success"
        for text, reason, question in zip(self._texts, self._reasons, self.questions, strict=True):
            if reason is None:
                assert question.text.startswith(text), "another text than alone"
            else:
                assert text == question.text, f"{text!r} instead of {question.text!r}"
                assert reason == ("length" if question.reason == "length" else "stop")

    def _take(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        assert self._reasons[index] is None, "something was told after the last chunk"
        self._texts[index] += choice["text"]
        self._reasons[index] = choice["finish_reason"]
