"""
The thread that turns commands into outputs, one step at a time.

A turn: schedule steps and launch them, until as many are under way as the runner takes; while the device
computes, take in new commands and publish the outputs of the step before; then wait for the oldest step and
update. With nothing to compute the thread sleeps on its inbox.

Ahead. Where the runner takes two steps, the second is launched while the first computes, so that the device
does not wait for the host; see `scheduler` for what is known then. Then the outputs of a step are published
when it is over. What a sequence gets is the same either way, but a command may take effect a step later.

Bursts. Where the runner draws several tokens a row in one step, a step of decodes has as many rounds as the
device computes in `burst_seconds`: what the host does once a step is done once for all of them. Commands wait
for as long, and tokens come as many at a time. Where the device waits for the host, so that nobody knows how
long a round takes it, rounds are doubled until it does not.

Faults. A step that fails ends its own sequences with ERROR and the engine goes on. A step that was launched
behind it is waited for and dropped: those of its sequences that are left compute it again. A lost device,
three failing steps in a row (those that ran out of memory do not count), or a fault in the engine itself end
everything: every sequence gets ERROR, `on_failure` is told once, and later submits are answered with the same
error. Callers see a reference number; the traceback is narrated.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.engine.messages import (
    Cancel,
    Command,
    EngineSnapshot,
    NullObserver,
    Output,
    StepObserver,
    Submit,
)
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.errors import DeviceError, Draining, EngineError, Internal, OutOfMemory
from worker_orcd.narration import Narration
from worker_orcd.sequence import FinishReason, PendingStep, RowResult, Runner, Step

_MAX_FAILING_STEPS = 3
_LATE = 0.05  # of a step's time: who waits for its results for less came when they were there

Publish = Callable[[list[Output]], None]


def ignore_failure(_error: EngineError) -> None:
    """The outputs say it too; only a worker that should exit needs to be told."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is under way, or what came of launching it: that is told after the steps before it."""

    step: Step
    begun: float  # by the engine's clock
    pending: PendingStep | Exception

    def wait(self) -> Sequence[RowResult]:
        """As `PendingStep.wait`."""
        if isinstance(self.pending, Exception):
            raise self.pending
        results = self.pending.wait()
        wanted = sum(row.num_draws or 1 for row in self.step.rows)
        if len(results) != wanted:
            raise Internal(f"the runner gave {len(results)} results instead of {wanted}")
        return results


class Engine:
    """Owns the thread, the scheduler and the runner. All state lives on the thread.

    What other threads may do: `send`, `stop`, and read `snapshot`, an immutable object replaced before a
    step is computed and after it. `publish`, `observer` and `on_failure` are called on the engine's thread
    and must not block. Outputs of one sequence are published in order, and after `stop` every sequence ever
    sent has had its last.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        publish: Publish,
        *,
        observer: StepObserver | None = None,
        narration: Narration | None = None,
        on_failure: Callable[[EngineError], None] = ignore_failure,
        burst_seconds: float = 0.0,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._publish = publish
        self._observer = observer or NullObserver()
        self._narration = narration or Narration()
        self._on_failure = on_failure
        self._clock = clock
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._closing = threading.Lock()  # so that the sentinel is the last thing in the inbox
        self._closed = False
        self._stopping = False
        self._outputs: list[Output] = []  # not yet published
        self._launched: deque[_Launched] = deque()  # the oldest first
        self._last_end = 0.0  # of a step, by the clock
        self._burst_seconds = burst_seconds
        self._round_seconds = 0.0  # of a round of decodes, lately; 0: unknown
        self._num_failing_steps = 0  # in a row
        self._failure: EngineError | None = None
        self.snapshot: EngineSnapshot = scheduler.snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def native_id(self) -> int | None:
        """The operating system's id of the thread; None before `start`."""
        return self._thread.native_id

    def send(self, command: Command) -> None:
        """Hand over a command. After `stop`, a Submit raises Draining and a Cancel has nothing to do."""
        with self._closing:
            if not self._closed:
                self._inbox.put(command)
            elif isinstance(command, Submit):
                raise Draining("the worker is shutting down")

    def stop(self, timeout: float | None = None) -> bool:
        """Finish the steps in flight, cancel what is left (CANCELLED outputs) and end the thread.

        Drains nothing: whoever wants running jobs to finish waits for them first. False if the thread has not
        ended after `timeout` seconds: the device hangs.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping or self._launched:
            try:
                if self._stopping:
                    self._end_oldest()
                elif self._failure is not None or (self._scheduler.is_idle and not self._launched):
                    self._look()
                    self._flush()
                    self._receive(wait=True)
                else:
                    self._receive(wait=False)
                    self._turn()
            except Exception as error:
                self._collapse(self._explain(error))
        self._outputs += self._scheduler.end_all(FinishReason.CANCELLED)
        self._look()
        self._flush()

    def _turn(self) -> None:
        while self._takes_more() and self._launch_next():
            pass
        if not self._launched:
            self._flush()
            return
        self._receive(wait=False)
        self._look()  # a step may take long: blocks given back before it must not be missed until it is over
        self._flush()
        self._end_oldest()

    def _takes_more(self) -> bool:
        """Nothing is launched behind a step that could not be."""
        is_broken = any(isinstance(launched.pending, Exception) for launched in self._launched)
        return len(self._launched) < self._runner.max_steps and not is_broken

    def _launch_next(self) -> bool:
        """Whether there was a step to launch."""
        now = self._clock()
        self._outputs += self._scheduler.expire(now)
        step = self._scheduler.schedule(now, self._max_draws())
        if step is None:
            return False
        try:
            pending = self._runner.launch(step)
        except Exception as error:  # raised again, and explained, when it is this step's turn
            pending = error
        self._launched.append(_Launched(step, now, pending))
        return True

    def _max_draws(self) -> int:
        if self._round_seconds <= 0.0:
            return 1
        return max(1, min(self._runner.max_draws, int(self._burst_seconds / self._round_seconds)))

    def _end_oldest(self) -> None:
        launched = self._launched.popleft()
        asked = self._clock()
        try:
            results = launched.wait()
        except Exception as error:
            self._fail(launched.step, self._explain(error))
            self._drop_launched()
        else:
            self._num_failing_steps = 0
            self._learn(launched, asked)
            self._outputs += self._scheduler.update(launched.step, results)
        self._look()
        now = self._clock()
        self._observe(now - max(launched.begun, self._last_end))
        self._last_end = now
        if self._launched:  # else the device waits for the next step, which goes first
            self._flush()

    def _learn(self, launched: _Launched, asked: float) -> None:
        """How long a round of decodes takes the device, by a step that is over; `asked`: since when it was
        waited for.
        """
        if launched.step.num_tokens > len(launched.step.rows):
            return
        now = self._clock()
        seconds = now - max(launched.begun, self._last_end)
        measured = seconds / launched.step.num_rounds
        if now - asked >= _LATE * seconds or self._round_seconds <= 0.0:
            self._round_seconds = measured
        elif self._max_draws() < self._runner.max_draws:  # it was over before: the host is what takes long
            self._round_seconds = min(self._round_seconds, measured) / 2

    def _receive(self, *, wait: bool) -> None:
        """Take in all commands there are; with `wait`, at least one."""
        while not self._stopping:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            match command:
                case Submit():
                    self._submit(command)
                case Cancel(id):
                    self._outputs += self._scheduler.cancel(id)
                case None:
                    self._stopping = True

    def _submit(self, command: Submit) -> None:
        if self._failure is not None:
            self._outputs.append(
                Output(
                    command.id,
                    finish_reason=FinishReason.ERROR,
                    error_code=self._failure.code,
                    error=self._failure.message,
                )
            )
            return
        try:
            self._outputs += self._scheduler.submit(command, self._clock())
        except Internal as error:  # no output: it would end the sequence that rightly has this id
            self._narration.tell("error", f"A submit was ignored: {error}.", code=error.code)

    def _look(self) -> None:
        self.snapshot = self._scheduler.snapshot(failed=self._failure is not None)

    def _flush(self) -> None:
        if not self._outputs:
            return
        outputs, self._outputs = self._outputs, []
        try:
            self._publish(outputs)
        except Exception as error:
            self._narration.tell("error", f"{len(outputs)} outputs could not be delivered.", trace=error)

    def _observe(self, seconds: float) -> None:
        try:
            self._observer.on_step(self._scheduler.stats(seconds))
        except Exception as error:
            self._narration.tell(
                "error", "The step observer failed; a step is missing in the metrics.", trace=error
            )

    # -- faults --------------------------------------------------------------------------------------------

    def _explain(self, error: Exception) -> EngineError:
        """What callers may know of a fault; the rest is narrated."""
        if isinstance(error, MemoryError):  # the interpreter's own, wherever it was
            error = OutOfMemory("there is not enough memory for the step")
        if isinstance(error, EngineError):
            self._narration.tell("error", f"A step failed: {error.message}.", code=error.code)
            return error
        reference = uuid.uuid4().hex[:12]
        self._narration.tell("error", "An unexpected fault in the engine.", trace=error, reference=reference)
        return Internal(f"internal error, reference {reference}")

    def _fail(self, step: Step, error: EngineError) -> None:
        # Memory that ran out says nothing about the next step, which computes something else.
        self._num_failing_steps += not isinstance(error, OutOfMemory)
        self._outputs += self._scheduler.fail(step, error.code, error.message)
        if isinstance(error, DeviceError) or self._num_failing_steps >= _MAX_FAILING_STEPS:
            self._collapse(error)

    def _collapse(self, error: EngineError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        self._outputs += self._scheduler.end_all(FinishReason.ERROR, error.code, error.message)
        self._look()
        self._flush()
        self._narration.tell("error", f"The engine has stopped for good: {error.message}.", code=error.code)
        self._on_failure(error)
        self._abandon()
        self._look()

    def _drop_launched(self) -> None:
        """What was launched behind a step that failed, however that went."""
        while self._launched:
            behind = self._launched.popleft()
            try:
                behind.wait()
            except Exception as error:
                explained = self._explain(error)
                if isinstance(explained, DeviceError):
                    self._collapse(explained)
            self._scheduler.drop(behind.step)

    def _abandon(self) -> None:
        """Wait for what the device still computes; all sequences have ended."""
        while self._launched:
            behind = self._launched.popleft()
            with suppress(Exception):  # the fault that ended the engine has been told
                behind.wait()
            with suppress(Exception):
                self._scheduler.drop(behind.step)
