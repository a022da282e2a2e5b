"""POST /v1/completions, streaming and not."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from worker_orcd.server.body import describes, json_body
from worker_orcd.server.context import ContextOf
from worker_orcd.server.direct import DirectRoute
from worker_orcd.server.disconnect import unless_gone
from worker_orcd.server.failures import OF_JOBS
from worker_orcd.server.json import JSON
from worker_orcd.server.openai.choices import (
    DONE,
    Call,
    Choice,
    Usage,
    choices_of,
    complete,
    error_frames,
    open_call,
    stream,
    streamed,
    usage_of,
)
from worker_orcd.server.openai.logprobs import CompletionLogprobs, CompletionOffsets
from worker_orcd.server.openai.wire import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from worker_orcd.server.prompt import Prompt, plan
from worker_orcd.server.sse import data

router = APIRouter(prefix="/v1")

_read = json_body(CompletionRequest, may_be_rejected_job=True)


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET  # vLLM's: what matched


class Completion(msgspec.Struct):
    """The whole answer, and each chunk of a streamed one."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"


@router.post("/completions", openapi_extra=describes(CompletionRequest, 404, *OF_JOBS))
async def completions(
    request: Request,
    context: ContextOf,
    body: Annotated[CompletionRequest, Depends(_read)],
) -> Response:
    """Continue one or more prompts."""
    call = open_call(context, request, body, prefix="cmpl", num_sequences=body.n * len(body.prompt))
    job = call.job

    async def prepare() -> list[Choice]:
        plans = [
            plan(
                job.serving,
                body.sampling,
                ids,
                identity=job.identity,
                max_tokens=body.max_tokens,
                default_max_tokens=DEFAULT_COMPLETION_TOKENS,
                logprobs=body.logprobs,
                deadline=call.deadline,
            )
            for ids in await job.encode(*map(_prompt, body.prompt))
        ]
        job.begin(*plans)
        return choices_of(job, plans, body.n)

    async def answer() -> JSON:
        choices = await prepare()
        await complete(job, choices)
        return JSON(_completion(call, body, choices), headers=call.headers)

    try:
        if body.stream:
            frames = partial(_frames, call, body, await unless_gone(request, prepare))
            return streamed(call, frames)
        response = await unless_gone(request, answer)
    except Exception as error:
        job.failed(error)
        raise
    job.succeeded()
    return response


DIRECT = {"/v1/completions": DirectRoute(_read, completions)}


def _prompt(prompt: str | tuple[int, ...]) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(param="prompt", text=prompt)
    return Prompt(param="prompt", token_ids=prompt)


def _echo(call: Call, body: CompletionRequest, choice: Choice) -> str:
    """The prompt as text, when it is to be repeated before the answer."""
    if not body.echo:
        return ""
    prompt = body.prompt[choice.index // body.n]
    return prompt if isinstance(prompt, str) else call.job.serving.tokenizer.decode(prompt)


def _completion(call: Call, body: CompletionRequest, choices: list[Choice]) -> Completion:
    told: list[CompletionChoice] = []
    for choice in choices:
        logprobs = None
        if body.logprobs is not None:
            logprobs = CompletionOffsets(call.job.serving.tokenizer).logprobs(choice.pieces)
        text = _echo(call, body, choice) + choice.answer.text
        matched = choice.answer.matched
        told.append(CompletionChoice(choice.index, text, logprobs, choice.finish_reason, matched))
    return Completion(*call.envelope, told, usage_of(choices, body.n))


def _frames(
    call: Call, body: CompletionRequest, choices: list[Choice], wake: Callable[[], None]
) -> Generator[bytes, None, None]:
    options = body.stream_options
    told_usage = None if options is not None and options.include_usage else msgspec.UNSET
    continuous = options is not None and options.continuous_usage_stats

    def chunk(*parts: CompletionChoice) -> bytes:
        usage = usage_of(choices, body.n) if continuous else told_usage
        return data(Completion(*call.envelope, list(parts), usage))

    tokenizer = call.job.serving.tokenizer
    offsets = [CompletionOffsets(tokenizer) if body.logprobs is not None else None for _ in choices]
    echoed: set[int] = set()
    try:
        with closing(stream(call.job, choices, wake)) as news:
            for item in news:
                if item is None:
                    yield b""
                    continue
                choice, pieces, complete_now = item
                text = "".join([piece.text for piece in pieces])
                if choice.index not in echoed:
                    echoed.add(choice.index)
                    text = _echo(call, body, choice) + text
                counter = offsets[choice.index]
                logprobs = counter.logprobs(pieces) if counter is not None else None
                if text or (logprobs is not None and logprobs.tokens):
                    yield chunk(CompletionChoice(choice.index, text, logprobs))
                if complete_now:
                    matched = choice.answer.matched
                    yield chunk(CompletionChoice(choice.index, "", None, choice.finish_reason, matched))
        call.job.succeeded()
        if told_usage is None:
            yield data(Completion(*call.envelope, [], usage_of(choices, body.n)))
        yield DONE
    except Exception as error:
        call.job.failed(error)
        yield error_frames(call.job, error)
