"""POST /v1/chat/completions, streaming and not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from worker_orcd.server.answer import Piece
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
from worker_orcd.server.openai.logprobs import ChatLogprobs, chat_logprobs
from worker_orcd.server.openai.parts import Parts, Splitter
from worker_orcd.server.openai.wire import ChatRequest
from worker_orcd.server.prompt import Prompt, plan
from worker_orcd.server.sse import data

router = APIRouter(prefix="/v1")

_read = json_body(ChatRequest, may_be_rejected_job=True)


class ChatMessage(msgspec.Struct):
    content: str
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET  # unset: of a model without messages
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None  # vLLM's: what matched


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"


@router.post("/chat/completions", openapi_extra=describes(ChatRequest, 404, *OF_JOBS))
async def chat_completions(
    request: Request,
    context: ContextOf,
    body: Annotated[ChatRequest, Depends(_read)],
) -> Response:
    """Answer a conversation."""
    call = open_call(context, request, body, prefix="chatcmpl", num_sequences=body.n)
    job = call.job

    async def prepare() -> list[Choice]:
        prompt = Prompt(param="messages", messages=body.messages, template_fields=body.template_fields)
        (ids,) = await job.encode(prompt)
        planned = plan(
            job.serving,
            body.sampling,
            ids,
            identity=job.identity,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            default_max_tokens=None,
            logprobs=body.num_logprobs,
            deadline=call.deadline,
        )
        job.begin(planned)
        return choices_of(job, [planned.answering_messages()], body.n)

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


DIRECT = {"/v1/chat/completions": DirectRoute(_read, chat_completions)}


def _completion(call: Call, body: ChatRequest, choices: list[Choice]) -> ChatCompletion:
    told = [
        ChatChoice(
            choice.index,
            _message(choice),
            _logprobs(call, choice, choice.pieces) if body.logprobs else None,
            choice.finish_reason,
            choice.answer.matched,
        )
        for choice in choices
    ]
    return ChatCompletion(*call.envelope, told, usage_of(choices, body.n))


def _message(choice: Choice) -> ChatMessage:
    reasoning, content = Splitter().split(choice.pieces)
    message = ChatMessage(content)
    if choice.answer.has_messages:
        message.reasoning_content = reasoning or None
    return message


def _logprobs(call: Call, choice: Choice, pieces: Sequence[Piece]) -> ChatLogprobs:
    return chat_logprobs(call.job.serving.tokenizer, pieces, has_messages=choice.answer.has_messages)


def _delta(parts: Parts) -> Delta:
    """Reasoning comes first: it does so in an answer, and a chunk rarely has both."""
    if parts.reasoning and not parts.content:
        return Delta(reasoning_content=parts.reasoning)
    return Delta(reasoning_content=parts.reasoning or msgspec.UNSET, content=parts.content)


def _frames(
    call: Call, body: ChatRequest, choices: list[Choice], wake: Callable[[], None]
) -> Generator[bytes, None, None]:
    options = body.stream_options
    told_usage = None if options is not None and options.include_usage else msgspec.UNSET
    continuous = options is not None and options.continuous_usage_stats

    def chunk(part: ChunkChoice) -> bytes:
        usage = usage_of(choices, body.n) if continuous else told_usage
        return data(ChatChunk(*call.envelope, [part], usage))

    splitters: dict[int, Splitter] = {}
    try:
        with closing(stream(call.job, choices, wake)) as news:
            for item in news:
                if item is None:
                    yield b""
                    continue
                choice, pieces, complete_now = item
                if choice.index not in splitters:
                    splitters[choice.index] = Splitter()
                    yield chunk(ChunkChoice(choice.index, Delta(role="assistant", content="")))
                parts = splitters[choice.index].split(pieces)
                logprobs = _logprobs(call, choice, pieces) if body.logprobs else None
                if any(parts) or (logprobs is not None and logprobs.content):
                    yield chunk(ChunkChoice(choice.index, _delta(parts), logprobs))
                if complete_now:
                    matched = choice.answer.matched
                    yield chunk(ChunkChoice(choice.index, Delta(), None, choice.finish_reason, matched))
        call.job.succeeded()
        if told_usage is None:
            yield data(ChatChunk(*call.envelope, [], usage_of(choices, body.n)))
        yield DONE
    except Exception as error:
        call.job.failed(error)
        yield error_frames(call.job, error)
