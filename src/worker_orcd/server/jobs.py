"""A request that generates: admitted first, prepared in a thread, run, and accounted for however it ends.

A job holds its place in the queue from `open_job` until the request is over (its clean-up stack). Its outcome
is "cancelled" until somebody knows better: that is what it is when the client goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from types import TracebackType
from typing import Any, Self

from fastapi import Request

from worker_orcd.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    DuplicateJob,
    LoadError,
    Paused,
    RequestError,
    Unavailable,
    WorkerError,
)
from worker_orcd.narration import Event
from worker_orcd.server.answer import Answer, Piece
from worker_orcd.server.auth import caller_of
from worker_orcd.server.client import Admission
from worker_orcd.server.context import Context
from worker_orcd.server.edge import attached
from worker_orcd.server.failures import failure_of
from worker_orcd.server.metrics import Outcome
from worker_orcd.server.prompt import Plan, Prompt, encode, is_quick
from worker_orcd.server.status import Serving


class Job:
    """One admitted request. Use as a context manager; on the event loop."""

    def __init__(self, context: Context, serving: Serving, admission: Admission, correlation_id: str) -> None:
        self.context = context
        self.serving = serving
        self.job_id = admission.job_id
        self.correlation_id = correlation_id
        self.identity = admission.owner  # of the caller
        self._name = admission.job_id if admission.job_id.isprintable() else ascii(admission.job_id)
        self.received_at = context.clock()
        self._admission = admission
        self._outcome: Outcome = "cancelled"
        self._failure: str | None = None
        self._tokens_in = 0
        self._answers: list[Answer] = []
        self._told_prompt: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.__exit__(kind, error, trace)
        self.context.metrics.request_ended(self._outcome)
        events: dict[Outcome, Event] = {"cancelled": "cancel", "error": "error"}
        narration = self.context.narration
        completion: dict[str, Any] = narration.text_fields(
            "completion", "".join(text for answer in self._answers for text in answer.texts)
        )
        narration.tell(
            events.get(self._outcome, "execute_end"),
            f"Job {self._name} ended: {self._failure or self._outcome}.",
            job_id=self.job_id,
            correlation_id=self.correlation_id,
            outcome=self._outcome,
            tokens_in=self._tokens_in,
            tokens_out=sum(answer.num_tokens for answer in self._answers),
            duration_ms=round((self.context.clock() - self.received_at) * 1000),
            **completion,
        )

    def succeeded(self) -> None:
        self._outcome = "success"

    def failed(self, error: BaseException) -> None:
        """Take note of how the job failed; an exception that nobody raised on purpose is narrated."""
        self._outcome = _outcome(error)
        self._failure = failure_of(error, self.correlation_id).message
        if not isinstance(error, WorkerError):
            self.context.narration.tell(
                "error",
                f"Job {self._name} failed in an unexpected way: {type(error).__name__}.",
                trace=error,
                job_id=self.job_id,
                correlation_id=self.correlation_id,
            )

    async def encode(self, *prompts: Prompt) -> list[tuple[int, ...]]:
        """Token ids of each prompt, computed in a thread unless that `is_quick`.

        Raises what `prompt.encode` raises; Cancelled.
        """

        def work() -> list[tuple[int, ...]]:
            text = "\n".join(prompt.content for prompt in prompts)
            self._told_prompt = self.context.narration.text_fields("prompt", text)
            return [encode(self.context, self.serving, prompt) for prompt in prompts]

        ids = work() if is_quick(prompts) else await self.context.in_thread(work)
        if self._admission.failure is not None:
            raise self._admission.failure
        return ids

    def begin(self, *plans: Plan) -> None:
        """The prompts are known and about to be computed; each prompt is counted once."""
        self._tokens_in = sum(len(plan.generation.prompt_token_ids) for plan in plans)
        self.context.metrics.prompt_accepted(self._tokens_in)
        self.context.narration.tell(
            "execute_start",
            f"Job {self._name} starts with {self._tokens_in} prompt tokens.",
            job_id=self.job_id,
            correlation_id=self.correlation_id,
            tokens_in=self._tokens_in,
            max_tokens=plans[0].generation.max_tokens,
            **self._told_prompt,
        )

    def run(
        self, plan: Plan, answer: Answer, wake: Callable[[], None]
    ) -> Generator[list[Piece] | None, None, None]:
        """Pieces of one answer as they come; ends when the answer is complete. Close it to cancel.

        None: no more for now; `wake` is called when there is.
        """
        self._answers.append(answer)
        deadline = plan.generation.deadline
        if deadline is not None and deadline <= self.context.clock():
            raise DeadlineExceeded("the deadline of the job passed before it could start")
        metrics = self.context.metrics
        with closing(self.serving.client.follow(self._admission, plan.generation, wake)) as outputs:
            for output in outputs:
                if output is None:
                    yield None
                    continue
                previous, had_first = answer.last_at, answer.first_at is not None
                pieces = answer.push(output)
                if pieces:
                    if had_first:
                        metrics.next_tokens(len(pieces), answer.last_at - previous)
                    else:
                        metrics.first_tokens(
                            len(pieces),
                            queue_seconds=answer.queue_seconds,
                            ttft_seconds=answer.last_at - self.received_at,
                        )
                yield pieces
                if answer.stop_reason is not None:
                    break
        metrics.sequence_ended((answer.last_at - answer.submitted_at) * 1000)


def _outcome(error: BaseException) -> Outcome:
    match error:
        case Cancelled() | Draining() | Paused():  # once begun: what is refused at the door never gets here
            return "cancelled"
        case DeadlineExceeded():
            return "timeout"
        case RequestError() | Unavailable() | LoadError():
            return "rejected"
        case _:
            return "error"


def open_job(context: Context, request: Request, job_id: str, *, num_sequences: int = 1) -> Job:
    """Take a place in the queue, before anything expensive. It is given back when the request is over.

    Raises DuplicateJob, QueueFull, Draining, NotReady, InvalidParameter, LoadError.
    """
    known = attached(request)
    try:
        serving = context.status.require_serving()
        admission = serving.client.admit(
            job_id, owner=caller_of(request).identity, num_sequences=num_sequences
        )
    except (DuplicateJob, RequestError, Unavailable, LoadError):
        context.metrics.request_ended("rejected")
        raise
    return known.stack.enter_context(Job(context, serving, admission, known.correlation_id))
