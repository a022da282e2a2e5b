"""One model in this process, asked from the shell: a blocking view of the engine, without HTTP."""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from worker_orcd.cli.terminal import progress_bar, warn
from worker_orcd.engine.messages import Cancel, Output, StepObserver, Submit
from worker_orcd.errors import Internal
from worker_orcd.sequence import FinishReason, SamplingParams

if TYPE_CHECKING:
    from worker_orcd.config import WorkerConfig
    from worker_orcd.engine.engine import Engine
    from worker_orcd.worker import LoadedModel

Arrived = tuple[float, Output]  # when the engine published it (time.perf_counter), and what
STOP_SECONDS = 10.0  # a step of the slowest model is shorter


class LocalEngine:
    """A loaded model and its running engine. Used by one thread; the engine has its own."""

    def __init__(
        self, loaded: LoadedModel, start: Callable[..., Engine], observer: StepObserver | None
    ) -> None:
        self.loaded = loaded
        self._ids = itertools.count(1)
        self._arrived: dict[int, queue.SimpleQueue[Arrived]] = {}
        self._engine = start(loaded, self._publish, observer)

    def _publish(self, outputs: list[Output]) -> None:
        """On the engine's thread. Nobody may be waiting any more for a sequence that was cancelled."""
        now = time.perf_counter()
        for output in outputs:
            waiting = self._arrived.get(output.id)
            if waiting is not None:
                waiting.put((now, output))

    def submit(
        self,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> int:
        """Start computing; the id to `outputs` of."""
        number = next(self._ids)
        self._arrived[number] = queue.SimpleQueue()
        self._engine.send(
            Submit(
                id=number,
                prompt_token_ids=prompt_token_ids,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                sampling=sampling,
            )
        )
        return number

    def outputs(self, number: int) -> Generator[Arrived]:
        """Until the last one. Closing the generator cancels the sequence. Raises Internal."""
        waiting = self._arrived[number]
        finished = False
        try:
            while not finished:
                when, output = waiting.get()
                finished = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise Internal(output.error or "the engine failed")
                yield when, output
        finally:
            del self._arrived[number]
            if not finished:
                self._engine.send(Cancel(number))

    def close(self) -> None:
        if self._engine.stop(STOP_SECONDS):
            self.loaded.close()


@contextlib.contextmanager
def local_engine(config: WorkerConfig, observer: StepObserver | None = None) -> Generator[LocalEngine]:
    """Load the model with a progress bar and run its engine. Raises LoadError."""
    from worker_orcd import worker  # a second of imports

    with progress_bar() as report:
        loaded = worker.load(config, warn=warn, on_progress=report)
    # Two Python threads share the interpreter here; the default switch interval would cost a step 5 ms.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    local = LocalEngine(loaded, worker.start_engine, observer)
    try:
        yield local
    finally:
        local.close()
        sys.setswitchinterval(interval)
