"""The answers to one OpenAI request: n to each prompt, computed together, told apart by their index."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import msgspec
from fastapi import Request

from worker_orcd.errors import UnknownModel
from worker_orcd.server.answer import Answer, Piece
from worker_orcd.server.context import Context
from worker_orcd.server.edge import attached
from worker_orcd.server.failures import failure_of
from worker_orcd.server.jobs import Job, open_job
from worker_orcd.server.openai.fields import ignored_fields
from worker_orcd.server.openai.wire import OpenAIRequest
from worker_orcd.server.prompt import Plan, deadline_of
from worker_orcd.server.sse import EventStream, Frames, data
from worker_orcd.server.wire import MAX_DEADLINE_MS

DONE = b"data: [DONE]\n\n"
ANY_MODEL = "default"  # a name under which any worker's model may be asked for


@dataclass(slots=True)
class Choice:
    index: int
    plan: Plan
    answer: Answer
    pieces: list[Piece] = field(default_factory=list[Piece])  # all, when the answer is not streamed

    @property
    def finish_reason(self) -> str:
        return "length" if self.answer.stop_reason == "length" else "stop"


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | msgspec.UnsetType = msgspec.UNSET


@dataclass(slots=True)
class Call:
    """One admitted request: its job, the envelope of its response, and what headers it adds."""

    job: Job
    envelope: tuple[str, int, str, str]  # id, created (Unix seconds), model, system_fingerprint
    deadline: float | None
    headers: dict[str, str]


def open_call(
    context: Context, request: Request, body: OpenAIRequest, *, prefix: str, num_sequences: int
) -> Call:
    """Admit a request. Raises what `open_job` raises, InvalidParameter for refused fields, UnknownModel."""
    job = open_job(context, request, f"{prefix}-{uuid.uuid4().hex}", num_sequences=num_sequences)
    try:
        headers = ignored_fields(body.model_extra or {})
        deadline = deadline_of(
            body.deadline_ms, attached(request).header(b"x-deadline"), MAX_DEADLINE_MS, context.clock
        )
        require_model(body.model, job.serving.model_id)
    except Exception as error:
        job.failed(error)
        raise
    envelope = (job.job_id, int(time.time()), job.serving.model_id, job.serving.fingerprint)
    return Call(job, envelope, deadline, headers)


def require_model(asked: str | None, served: str) -> None:
    """Raises UnknownModel for any name but the served one and `default`."""
    if asked not in (None, served, ANY_MODEL):
        raise UnknownModel(
            f"The model {asked[:128]!r} does not exist here; this worker serves {served!r}", param="model"
        )


def choices_of(job: Job, plans: Sequence[Plan], n: int) -> list[Choice]:
    """All choices: n to each plan; choice k of a prompt has the prompt's seed plus k."""
    chosen = [plan.choice(k) for plan in plans for k in range(n)]
    tokenizer, clock = job.serving.tokenizer, job.context.clock
    return [Choice(index, plan, Answer(plan, tokenizer, clock)) for index, plan in enumerate(chosen)]


def streamed(call: Call, frames: Frames) -> EventStream:
    """The response of a call that streams."""
    context = call.job.context
    return EventStream(
        frames,
        keep_alive_seconds=context.config.keep_alive_seconds,
        headers=call.headers,
        clock=context.clock,
    )


async def complete(job: Job, choices: Sequence[Choice]) -> None:
    """Compute all choices to their ends. The first failure ends them all and is raised."""
    woken = asyncio.Event()
    with closing(stream(job, choices, woken.set)) as news:
        for item in news:
            if item is not None:
                item[0].pieces += item[1]
                continue
            await woken.wait()
            woken.clear()


News = tuple[Choice, list[Piece], bool]  # the last: these pieces complete the choice


def stream(
    job: Job, choices: Sequence[Choice], wake: Callable[[], None]
) -> Generator[News | None, None, None]:
    """Pieces of all choices as they come. The first failure ends them all and is raised.

    None: no more for now; `wake` is called when there is.
    """
    ready = deque(choices)

    def has_news(choice: Choice) -> None:
        ready.append(choice)
        wake()

    with ExitStack() as stack:
        runs = [
            stack.enter_context(closing(job.run(choice.plan, choice.answer, partial(has_news, choice))))
            for choice in choices
        ]
        unfinished = len(choices)
        while unfinished:
            while ready:
                choice = ready.popleft()
                for pieces in runs[choice.index]:
                    if pieces is None:
                        break
                    is_complete = choice.answer.stop_reason is not None
                    unfinished -= is_complete
                    yield choice, pieces, is_complete
            if unfinished:
                yield None


def usage_of(choices: Sequence[Choice], n: int) -> Usage:
    """Each prompt is counted once, however many answers it got."""
    firsts = [choice.answer for choice in choices[::n]]
    prompt = sum(answer.num_prompt_tokens for answer in firsts)
    completion = sum(choice.answer.num_tokens for choice in choices)
    cached = PromptDetails(sum(answer.num_cached_tokens for answer in firsts))
    usage = Usage(prompt, completion, prompt + completion, cached)
    if any(choice.answer.has_messages for choice in choices):
        reasoning = sum(choice.answer.num_reasoning_tokens for choice in choices)
        usage.completion_tokens_details = CompletionDetails(reasoning)
    return usage


def error_frames(job: Job, error: Exception) -> bytes:
    """How a stream ends that cannot be completed."""
    return data(failure_of(error, job.correlation_id).openai_body()) + DONE
