"""
Jobs that the clients of `soak.py` ask for, and what may come of each.

A subject is a job whose answer alone is known. It is asked for in every way that the worker has (streamed or
not, in three dialects), with priorities, deadlines and salts, none of which may change the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from crowd_checks import Job, make_jobs
from worker_client import Answer, Response, Wrong, encode_request, parse_answer, require

EXECUTE, COMPLETIONS, CHAT = "/execute", "/v1/completions", "/v1/chat/completions"
DEADLINES_MS = (1, 20, 300, 3000, 600_000)
LONG_TOKENS = 256  # of an answer that somebody means to break off
OUTCOMES = {  # as /metrics counts a request that ended with this code
    "QUEUE_FULL": "rejected",
    "INVALID_REQUEST": "rejected",
    "CANCELLED": "cancelled",
    "DEADLINE_EXCEEDED": "timeout",
}


@dataclass(frozen=True)
class Subject:
    """A job and its answer alone."""

    job: Job
    alone: Answer


def make_subjects_jobs(count: int) -> list[Job]:
    """Greedy and not. No token ids: not every vocabulary has them."""
    jobs = make_jobs(2 * count, words=(4, 12, 40, 90), tokens=(4, 48), longest=96)
    return [job for job in jobs if "prompt_token_ids" not in job][:count]


@dataclass
class Ask:
    """One request for a job. `id` is its correlation id, which the worker's log has too."""

    id: str
    path: str
    body: Job
    alone: Answer | None = None  # what must come, where that is known
    may: set[str] = field(default_factory=lambda: {"QUEUE_FULL"})  # codes that it may end with

    @property
    def mark(self) -> bytes:
        """What comes with each token, or so."""
        return b"event: token" if self.path == EXECUTE else b'"choices"'

    def encode(self, port: int) -> bytes:
        return encode_request(port, "POST", self.path, self.body, X_Correlation_Id=self.id)


def ask_subject(draw: random.Random, name: str, subject: Subject, *, path: str | None = None) -> Ask:
    """In a dialect that can tell it. With `path` /execute: in that one."""
    job = dict(subject.job)
    is_chat = "messages" in job
    path = path or draw.choice((EXECUTE, EXECUTE, CHAT if is_chat else COMPLETIONS))
    if path == EXECUTE:
        job["job_id"] = name
    else:
        job["stream"] = draw.random() < 0.5
        if is_chat:
            job.pop("logprobs", None)
    ask = Ask(name, path, job, subject.alone)
    _add_circumstances(draw, ask)
    return ask


def ask_anything(draw: random.Random, name: str, words: Sequence[str], *, path: str | None = None) -> Ask:
    """A job that nobody else has, with everything that makes answers large. Its answer is not known."""
    path = path or draw.choice((EXECUTE, COMPLETIONS))
    job: Job = {
        "prompt": " ".join(draw.choices(words, k=draw.choice((1, 10, 100, 250)))),
        "max_tokens": draw.choice((1, 8, 64, LONG_TOKENS)),
        "temperature": draw.choice((0.0, 0.7, 1.5)),
        "seed": draw.getrandbits(63),
        "logprobs": draw.choice((0, 3, 20)),
        "ignore_eos": draw.random() < 0.5,
    }
    if path == EXECUTE:
        job["job_id"] = name
    else:
        job |= {"stream": draw.random() < 0.5, "n": draw.choice((1, 2, 3))}
    ask = Ask(name, path, job)
    _add_circumstances(draw, ask)
    return ask


def ask_long(draw: random.Random, name: str, words: Sequence[str]) -> Ask:
    """A stream of /execute with hundreds of kilobytes, without a deadline."""
    prompt = " ".join(draw.choices(words, k=draw.choice((5, 50, 200))))
    job = {"job_id": name, "prompt": prompt, "max_tokens": LONG_TOKENS, "ignore_eos": True, "logprobs": 20}
    return Ask(name, EXECUTE, {**job, "seed": draw.getrandbits(63)})


def _add_circumstances(draw: random.Random, ask: Ask) -> None:
    """What must not change an answer."""
    if draw.random() < 0.5:  # a warm prefix cache for some, a cold one for others
        ask.body["cache_salt"] = draw.choice(("a", "b", ask.id))
    if draw.random() < 0.2:
        ask.body["priority"] = draw.randint(-3, 3)
    if draw.random() < 0.15:
        ask.body["deadline_ms"] = draw.choice(DEADLINES_MS)
        ask.may.add("DEADLINE_EXCEEDED")


# -- what came ---------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What an answer of OpenAI's dialects told, by choice."""

    texts: dict[int, str] = field(default_factory=dict[int, str])
    reasons: dict[int, str] = field(default_factory=dict[int, str])
    code: str | None = None  # of an error

    def take(self, choice: dict[str, Any]) -> None:
        index, reason = choice["index"], choice.get("finish_reason")
        require(index not in self.reasons, f"choice {index} goes on after its end")
        message = choice.get("delta", choice.get("message", {}))
        text = choice.get("text", message.get("content")) or ""
        self.texts[index] = self.texts.get(index, "") + text
        if reason is not None:
            self.reasons[index] = reason


def outcome_of(ask: Ask, response: Response) -> str:
    """As /metrics must have counted it. Raises Wrong unless it is what may come of this."""
    if response.status != 200:
        code = code_of(response)
        if code == "QUEUE_FULL":
            told = int(response.headers.get("retry-after", "0"))
            require(response.status == 503 and told > 0, "a full queue says 503 and when to come again")
        return _outcome_of_error(ask, code)
    if ask.path == EXECUTE:
        answer = parse_answer(response)
        if answer.error is not None:
            return _outcome_of_error(ask, answer.error["code"])
        same = ask.alone is None or ask.alone.outcome == answer.outcome
        require(same, f"{ask.id}: the answer is not the one alone: {answer.outcome!r:.300}")
        return "success"
    told = read_stream(response.body) if ask.body["stream"] else _read_whole(response)
    if told.code is not None:
        return _outcome_of_error(ask, told.code)
    num_choices = ask.body.get("n", 1)
    require(set(told.reasons) == set(range(num_choices)), f"{ask.id}: not all of {num_choices} answers ended")
    if ask.alone is not None:
        _compare(ask, ask.alone, told)
    return "success"


def code_of(response: Response) -> str:
    """Of an error, as /execute spells it."""
    code = response.json()["error"]["code"].upper()
    return "INVALID_REQUEST" if 400 <= response.status < 499 else code


def _outcome_of_error(ask: Ask, code: str) -> str:
    require(code in ask.may, f"{ask.id}: nobody has a reason for {code}")
    return OUTCOMES[code]


def _compare(ask: Ask, alone: Answer, told: Told) -> None:
    if any("channel" in token for token in alone.tokens):  # the text is told in fields of its own
        return
    reason = "length" if (alone.end or {})["stop_reason"] == "length" else "stop"
    same = (told.texts[0], told.reasons[0]) == (alone.text, reason)
    require(same, f"{ask.id}: the answer is not the one alone, which ended by {reason}")


def _read_whole(response: Response) -> Told:
    told = Told()
    for choice in response.json()["choices"]:
        told.take(choice)
    return told


def read_stream(body: bytes) -> Told:
    """Raises Wrong for a stream that is not whole."""
    told = Told()
    for chunk in _chunks(body):
        require(told.code is None, "a stream goes on after its error")
        if "error" in chunk:
            told.code = chunk["error"]["code"].upper()
        for choice in chunk.get("choices", ()):
            told.take(choice)
    return told


def _chunks(body: bytes) -> Iterator[dict[str, Any]]:
    *frames, done, rest = ("\n\n\n\n" + body.decode()).split("\n\n")
    require((done, rest) == ("data: [DONE]", ""), "a stream is not ended by [DONE]")
    for frame in frames:
        if frame and not frame.startswith(":"):
            if not frame.startswith("data: {"):
                raise Wrong(f"a malformed frame: {frame[:200]!r}")
            yield json.loads(frame[6:])
