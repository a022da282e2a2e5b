"""EngineClient: asyncio's view of the engine, and the only place that cancels.

Everything here runs on the event loop except `publish`, which the engine calls on its own thread once a step.
A request is admitted (counted) before anything expensive is done for it, and holds its place until the `with`
block of its `Admission` ends. A sequence is one `follow`: closing that generator cancels what is not
finished. Its reader is called when there is news and takes it at once, without a task that wakes up for it. A
reader that falls too far behind loses its own stream and disturbs no other.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from worker_orcd.engine.messages import Cancel, Command, Output, Submit
from worker_orcd.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    DeviceError,
    Draining,
    DuplicateJob,
    Internal,
    InvalidParameter,
    OutOfMemory,
    QueueFull,
    RequestError,
    WorkerError,
)
from worker_orcd.sequence import FinishReason, SamplingParams

MAX_BUFFERED_OUTPUTS = 4096  # of one stream: several seconds of decoding that nobody reads
_OUTPUTS_A_TURN = 8  # of the event loop: the streams that they wake keep it for a fraction of a millisecond


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What to compute: a Submit without the id, which the client makes."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    min_tokens: int = 0
    priority: int = 0
    deadline: float | None = None  # by the clock of server and engine
    cache_salt: bytes = b""


class _Stream:
    """Outputs of one sequence between the dispatcher and its reader."""

    __slots__ = ("failure", "finished", "id", "is_ready", "num_left", "outputs", "wake")

    def __init__(self, stream_id: int, wake: Callable[[], None]) -> None:
        self.id = stream_id
        self.outputs: deque[Output] = deque()
        self.wake = wake
        self.finished = False  # the last output has arrived: there is nothing left to cancel
        self.failure: WorkerError | None = None  # ends the stream in place of what is buffered
        self.is_ready = False  # in the line of those to be woken
        self.num_left = 0  # of the outputs that waited when it was last woken, those that still do


class Admission:
    """A request's place in the queue; give it back by leaving the `with` block."""

    def __init__(self, client: EngineClient, job_id: str, owner: bytes, num_sequences: int) -> None:
        self.job_id = job_id
        self.owner = owner
        self.num_sequences = num_sequences
        self.failure: WorkerError | None = None  # cancelled, perhaps before a sequence exists
        self.stream_ids: set[int] = set()
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.release(self)


class EngineClient:
    """Admission, streams by id, cancellation.

    `send` hands a command to the engine and must not block. `loop` is the loop that serves; `publish` may be
    called from any thread. `max_queue` counts sequences, waiting and running together.
    """

    def __init__(
        self,
        send: Callable[[Command], None],
        *,
        loop: asyncio.AbstractEventLoop,
        max_queue: int,
        max_buffered_outputs: int = MAX_BUFFERED_OUTPUTS,
    ) -> None:
        self._send = send
        self._loop = loop
        self._max_queue = max_queue
        self._max_buffered_outputs = max_buffered_outputs
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._ready: deque[_Stream] = deque()  # they have news and are to be woken
        self._is_waking = False  # somebody is at work on `_ready`, or will be in the next turn of the loop
        self._jobs: dict[tuple[bytes, str], Admission] = {}  # by owner and job_id
        self._num_admitted = 0
        self._draining = False
        self._failure: WorkerError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_admitted(self) -> int:
        """Sequences waiting or running, counted from admission."""
        return self._num_admitted

    @property
    def max_queue(self) -> int:
        return self._max_queue

    @property
    def is_full(self) -> bool:
        return self._num_admitted >= self._max_queue

    def admit(self, job_id: str, *, owner: bytes = b"", num_sequences: int = 1) -> Admission:
        """Take a place for a request that will run `num_sequences` sequences. Use as a context manager.
        `owner`: who asks; each has job_ids of its own.

        Raises DuplicateJob, QueueFull, Draining, the failure of the engine, or InvalidParameter when the
        request could never be admitted.
        """
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise Draining("the worker is shutting down and takes no new jobs", retry_after=5)
        if (owner, job_id) in self._jobs:
            raise DuplicateJob(f"job_id {job_id!r} is already waiting or running", param="job_id")
        if num_sequences > self._max_queue:
            raise InvalidParameter(
                f"the request asks for {num_sequences} sequences at once; at most {self._max_queue} are run",
                param="n",
            )
        if self._num_admitted + num_sequences > self._max_queue:
            raise QueueFull(
                f"the queue is full: {self._num_admitted} sequences waiting or running,"
                f" {num_sequences} more asked for, at most {self._max_queue} allowed"
            )
        admission = Admission(self, job_id, owner, num_sequences)
        self._jobs[owner, job_id] = admission
        self._num_admitted += num_sequences
        self._idle.clear()
        return admission

    def release(self, admission: Admission) -> None:
        """Give a place back. Called by the admission; a second call does nothing."""
        key = (admission.owner, admission.job_id)
        if self._jobs.get(key) is not admission:
            return
        self._fail_job(admission, Cancelled("the request is over"))
        del self._jobs[key]
        self._num_admitted -= admission.num_sequences
        if not self._jobs:
            self._idle.set()

    def follow(
        self, admission: Admission, request: Generation, wake: Callable[[], None]
    ) -> Generator[Output | None, None, None]:
        """Outputs of one sequence, the last with finish reason STOP or LENGTH; None: no more for now.

        After None, `wake` is called when there is more; it must not block or raise. Raises Cancelled,
        DeadlineExceeded or an EngineError in place of the other ways to finish. Close the generator to
        cancel.
        """
        if admission.failure is not None:
            raise admission.failure
        stream_id = next(self._ids)
        stream = _Stream(stream_id, wake)
        self._streams[stream_id] = stream
        admission.stream_ids.add(stream_id)
        try:
            self._send(_submit(stream_id, request))
            outputs = stream.outputs
            while True:
                if stream.failure is not None:
                    raise stream.failure
                if not outputs:
                    yield None
                    continue
                output = outputs.popleft()
                stream.num_left -= 1
                if output.tokens or output.finish_reason in (None, FinishReason.STOP, FinishReason.LENGTH):
                    yield output
                if output.finish_reason is not None:
                    _raise_unless_complete(output)
                    return
        finally:
            self._cancel_stream(stream_id)
            admission.stream_ids.discard(stream_id)

    def cancel(
        self, job_id: str, *, owner: bytes | None = None, reason: str = "the job was cancelled"
    ) -> bool:
        """End a job's streams with Cancelled. False when there is no such job: cancelling is idempotent.

        `owner` None: whose ever it is.
        """
        owners = [owner] if owner is not None else [key[0] for key in self._jobs if key[1] == job_id]
        found = [job for one in owners if (job := self._jobs.get((one, job_id))) is not None]
        for admission in found:
            self._fail_job(admission, Cancelled(reason))
        return bool(found)

    def cancel_all(self, *, reason: str = "the worker is shutting down") -> None:
        """End every job with Draining: nobody asked for its end, and another worker can do it."""
        for admission in tuple(self._jobs.values()):
            self._fail_job(admission, Draining(reason))

    def fail(self, error: WorkerError) -> None:
        """The engine is gone: end every job with this error and refuse new ones with it."""
        self._failure = error
        for admission in tuple(self._jobs.values()):
            self._fail_job(admission, error)

    def begin_drain(self) -> None:
        """Refuse new jobs; admitted ones go on."""
        self._draining = True

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until no job is admitted. False when that took longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def publish(self, outputs: Sequence[Output]) -> None:
        """Take a step's news from the engine's thread: one wake-up of the loop, however many outputs."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server is gone, nobody is left to tell
                raise

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is None or stream.finished:
                continue  # cancelled meanwhile
            if output.finish_reason is not None:
                stream.finished = True
            stream.outputs.append(output)
            if not stream.is_ready:
                self._line_up(stream)

    def _line_up(self, stream: _Stream) -> None:
        """To be woken in a later turn: what is published meanwhile comes with it."""
        stream.is_ready = True
        self._ready.append(stream)
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._wake_some)

    def _wake_some(self) -> None:
        """Wake a few streams, the others in later turns of the loop, so that other requests get theirs."""
        room = _OUTPUTS_A_TURN
        try:
            while self._ready and room > 0:
                stream = self._ready.popleft()
                stream.is_ready = False
                room -= max(1, len(stream.outputs))
                if stream.num_left >= self._max_buffered_outputs:  # a burst alone is no reason
                    unread = Cancelled("the client does not read its answer: too much of it is waiting")
                    self._fail_stream(stream, unread)
                stream.num_left = len(stream.outputs)
                stream.wake()
        finally:
            self._is_waking = bool(self._ready)
            if self._ready:
                self._loop.call_soon(self._wake_some)

    def _fail_job(self, admission: Admission, error: WorkerError) -> None:
        if admission.failure is None:
            admission.failure = error
        for stream_id in tuple(admission.stream_ids):
            if (stream := self._streams.get(stream_id)) is not None and not stream.finished:
                self._fail_stream(stream, error)

    def _fail_stream(self, stream: _Stream, error: WorkerError) -> None:
        stream.failure = error
        stream.outputs.clear()
        if not stream.finished:
            stream.finished = True
            self._send(Cancel(stream.id))
        if not stream.is_ready:
            self._line_up(stream)

    def _cancel_stream(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None and not stream.finished:
            stream.finished = True
            self._send(Cancel(stream_id))


def _submit(stream_id: int, request: Generation) -> Submit:
    return Submit(
        id=stream_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        sampling=request.sampling,
        min_tokens=request.min_tokens,
        priority=request.priority,
        deadline=request.deadline,
        cache_salt=request.cache_salt,
    )


_ERRORS: dict[str, type[WorkerError]] = {
    kind.code: kind for kind in (OutOfMemory, DeviceError, Internal, Cancelled, DeadlineExceeded, Draining)
}


def _raise_unless_complete(output: Output) -> None:
    """Raise what the last output of a sequence says went wrong, if anything did."""
    match output.finish_reason:
        case FinishReason.CANCELLED:
            raise Cancelled("the job was cancelled")
        case FinishReason.DEADLINE:
            raise DeadlineExceeded(output.error or "the deadline of the job passed before it was finished")
        case FinishReason.ERROR:
            message = output.error or "the engine failed"
            if output.error_code == RequestError.code:
                raise ContextLengthExceeded(message, param="prompt")
            raise _ERRORS.get(output.error_code or "", Internal)(message)
        case _:
            return
