"""POST /execute and POST /cancel: the worker's own way to run a job.

The stream is `started`, then `token`s with `metrics` among them, then exactly one of `end` and `error`. Until
`started` (the first token is known) only comments are sent. Whatever can be refused is refused before the
stream begins, as plain JSON with a status.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from worker_orcd.server.answer import Answer, Piece
from worker_orcd.server.auth import caller_of
from worker_orcd.server.body import describes, json_body
from worker_orcd.server.context import ContextOf
from worker_orcd.server.direct import DirectRoute
from worker_orcd.server.disconnect import unless_gone
from worker_orcd.server.edge import attached
from worker_orcd.server.failures import OF_JOBS, failure_of
from worker_orcd.server.jobs import Job, open_job
from worker_orcd.server.json import JSON
from worker_orcd.server.prompt import Plan, Prompt, deadline_of, is_quick, plan
from worker_orcd.server.sse import EventStream, event
from worker_orcd.server.status import Serving
from worker_orcd.server.wire import MAX_DEADLINE_MS, CancelRequest, ExecuteRequest
from worker_orcd.text.regions import Channel

router = APIRouter()

_read = json_body(ExecuteRequest, may_be_rejected_job=True)


class TopLogprob(msgspec.Struct):
    id: int
    t: str
    logprob: float


class TokenEvent(msgspec.Struct, omit_defaults=True):
    """The frame that is sent most: `t` is text that is now certain, `i` counts, `id` is the token.

    `channel` and `recipient` are of the message it belongs to, where the model answers in messages.
    """

    t: str
    i: int
    id: int
    logprob: float | msgspec.UnsetType = msgspec.UNSET
    top_logprobs: list[TopLogprob] | msgspec.UnsetType = msgspec.UNSET
    channel: Channel | msgspec.UnsetType = msgspec.UNSET
    recipient: str | msgspec.UnsetType = msgspec.UNSET


@router.post(
    "/execute",
    openapi_extra=describes(ExecuteRequest, *OF_JOBS),
    responses={200: {"content": {"text/event-stream": {}}, "description": "the events of the job"}},
)
async def execute(
    request: Request,
    context: ContextOf,
    body: Annotated[ExecuteRequest, Depends(_read)],
) -> Response:
    """Run a job and stream its events."""
    job = open_job(context, request, body.job_id)
    prompt = _prompt(body)

    async def prepare(deadline: float | None) -> Plan:
        (ids,) = await job.encode(prompt)
        planned = plan(
            job.serving,
            body,
            ids,
            identity=job.identity,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            deadline=deadline,
        )
        return planned if body.messages is None else planned.answering_messages()

    try:
        header = attached(request).header(b"x-deadline")
        deadline = deadline_of(body.deadline_ms, header, MAX_DEADLINE_MS, context.clock)
        work = partial(prepare, deadline)
        prepared = await (work() if is_quick([prompt]) else unless_gone(request, work))
    except Exception as error:
        job.failed(error)
        raise
    job.begin(prepared)
    events = partial(_events, job, prepared)
    return EventStream(events, keep_alive_seconds=context.config.keep_alive_seconds, clock=context.clock)


DIRECT = {"/execute": DirectRoute(_read, execute)}


@router.post("/cancel", status_code=202, openapi_extra=describes(CancelRequest))
async def cancel(
    request: Request, context: ContextOf, body: Annotated[CancelRequest, Depends(json_body(CancelRequest))]
) -> JSON:
    """End a job. Always 202: a job that is over, or never was, is as cancelled as can be.

    That of another key is one that never was, but for an admin.
    """
    serving, caller = context.status.serving, caller_of(request)
    owner = None if caller.is_admin else caller.identity
    found = serving is not None and serving.client.cancel(body.job_id, owner=owner)
    return JSON({"job_id": body.job_id, "running": found}, status=202)


def _prompt(body: ExecuteRequest) -> Prompt:
    if body.prompt is not None:
        return Prompt(param="prompt", text=body.prompt)
    if body.messages is not None:
        return Prompt(param="messages", messages=body.messages)
    return Prompt(param="prompt_token_ids", token_ids=body.prompt_token_ids)


def _events(job: Job, prepared: Plan, wake: Callable[[], None]) -> Generator[bytes, None, None]:
    serving = job.serving
    clock = job.context.clock
    answer = Answer(prepared, serving.tokenizer, clock)
    interval = job.context.config.metrics_interval_ms / 1000
    started, told_at = False, 0.0
    try:
        with closing(job.run(prepared, answer, wake)) as batches:
            for pieces in batches:
                if pieces is None:
                    yield b""
                    continue
                if not started:
                    started, told_at = True, clock()
                    yield _started(job, prepared, answer)
                if pieces:
                    yield b"".join([event("token", _token(serving, piece)) for piece in pieces])
                if clock() - told_at >= interval:
                    told_at = clock()
                    yield _metrics(job, answer)
        job.succeeded()
        yield _metrics(job, answer) + _end(job, answer)
    except Exception as error:
        job.failed(error)
        yield (b"" if started else _started(job, prepared, answer)) + _error(job, error)


def _started(job: Job, prepared: Plan, answer: Answer) -> bytes:
    return event(
        "started",
        {
            "job_id": job.job_id,
            "model": job.serving.model_id,
            "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seed": prepared.generation.sampling.seed,
            "prompt_tokens": answer.num_prompt_tokens,
            "cached_tokens": answer.num_cached_tokens,
            "correlation_id": job.correlation_id,
            "fingerprint": job.serving.fingerprint,
        },
    )


def _token(serving: Serving, piece: Piece) -> TokenEvent:
    token = piece.token
    told = TokenEvent(piece.text, piece.index, token.token_id)
    if token.logprob is not None:
        told.logprob = token.logprob
        if token.top_logprobs:
            told.top_logprobs = [
                TopLogprob(token_id, _text(serving, token_id), logprob)
                for token_id, logprob in token.top_logprobs
            ]
    if piece.message is not None:
        told.channel = piece.message.channel
        if piece.message.recipient is not None:
            told.recipient = piece.message.recipient
    return told


def _text(serving: Serving, token_id: int) -> str:
    return serving.tokenizer.token_text(token_id) if token_id < serving.tokenizer.vocab_size else ""


def _metrics(job: Job, answer: Answer) -> bytes:
    return event(
        "metrics",
        {
            "job_id": job.job_id,
            "tokens_out": answer.num_tokens,
            "decode_time_ms": round(answer.decode_ms, 3),
            "vram_bytes": job.serving.facts.memory_bytes_used,
            "queue_ms": round(answer.queue_seconds * 1000, 3),
            "ttft_ms": None if answer.ttft_ms is None else round(answer.ttft_ms, 3),
            "correlation_id": job.correlation_id,
        },
    )


def _end(job: Job, answer: Answer) -> bytes:
    return event(
        "end",
        {
            "job_id": job.job_id,
            "tokens_out": answer.num_tokens,
            "decode_time_ms": round(answer.decode_ms, 3),
            "stop_reason": answer.stop_reason,
            "matched_stop": answer.matched,
            "correlation_id": job.correlation_id,
        },
    )


def _error(job: Job, error: Exception) -> bytes:
    failure = failure_of(error, job.correlation_id)
    return event(
        "error",
        {
            "code": failure.code,
            "message": failure.message,
            "retriable": failure.retriable,
            "job_id": job.job_id,
            "correlation_id": job.correlation_id,
        },
    )
