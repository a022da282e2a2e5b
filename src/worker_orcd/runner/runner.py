"""
Runs steps: fills the inputs, computes the logits, draws the tokens. Owns the KV cache's tensors.

Used by one thread. One step is under way at a time, from `launch` to the end of its `wait`. A device without
a queue of its own computes in `wait`, so that the engine publishes the tokens of the step before first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from worker_orcd.config import EngineConfig
from worker_orcd.errors import EngineError, Internal, OutOfMemory
from worker_orcd.kernels.backend import Backend, BatchInputs, Counts, DrawingForward, Tensor
from worker_orcd.kernels.draw import Draw
from worker_orcd.model.decoder import Decoder
from worker_orcd.runner.batch import Batch
from worker_orcd.runner.kv_cache import allocate_kv_cache
from worker_orcd.runner.plan import MemoryPlan
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import PendingStep, RowResult, Step

T = TypeVar("T")


class ModelRunner:
    """Implements `sequence.Runner` with a decoder on a backend. Raises InsufficientMemory when built."""

    def __init__(
        self, decoder: Decoder, backend: Backend, plan: MemoryPlan, engine_config: EngineConfig
    ) -> None:
        config = decoder.config
        self.config = config
        self.plan = plan
        self.vocab_size = config.vocab_size
        self.limits = plan.limits(engine_config)
        self.caches = allocate_kv_cache(backend, config, plan.kv_groups, plan.block_size)
        inputs = backend.allocate_inputs(self.limits)

        def forward(inputs: BatchInputs) -> Tensor:
            return decoder.forward(inputs, self.caches)

        self._batch = Batch(inputs, self.limits, plan.kv_groups, vocab_size=config.vocab_size)
        self._compiled = compiled = backend.compile(forward, inputs, self.limits)
        self._drawing = compiled if isinstance(compiled, DrawingForward) else None
        self._sampler = Sampler(config.vocab_size)
        self._busy = False

    def launch(self, step: Step) -> PendingStep:
        """Copy what the step needs; its sequences may change afterwards. Raises EngineError."""
        counts = self._begin(step, every_logit=False)
        draws = (Draw.of(row.sequence) if row.samples else None for row in step.rows)
        if self._drawing is None:
            made = list(draws)
            return _PendingStep(lambda: self._draw_here(counts, made))
        try:
            with _in_our_terms():
                results = self._drawing.launch(counts, draws)
        except EngineError:
            self._busy = False
            raise
        return _PendingStep(lambda: self._finish(results))

    def logits(self, step: Step) -> NDArray[np.float32]:
        """(num_tokens, vocab_size): compute the step and return every token's logits, a copy.

        At most `limits.max_rows` tokens. Raises EngineError.
        """
        counts = self._begin(step, every_logit=True)
        return self._finish(lambda: self._compiled(counts).numpy().copy())

    def _begin(self, step: Step, *, every_logit: bool) -> Counts:
        if self._busy:
            raise Internal("a step was launched while another was under way")
        counts = self._batch.fill(step, every_logit=every_logit)
        self._busy = True
        return counts

    def _draw_here(self, counts: Counts, draws: Sequence[Draw | None]) -> Sequence[RowResult]:
        logits = iter(self._finish(lambda: self._compiled(counts).numpy()))
        return [None if draw is None else self._sampler.sample(next(logits), draw) for draw in draws]

    def _finish(self, wait: Callable[[], T]) -> T:
        """What the device has computed. The step is over then, one way or the other."""
        try:
            with _in_our_terms():
                return wait()
        finally:
            self._busy = False


class _PendingStep:
    """Implements `sequence.PendingStep`."""

    def __init__(self, wait: Callable[[], Sequence[RowResult]]) -> None:
        self._wait = wait
        self._waited = False

    def wait(self) -> Sequence[RowResult]:
        if self._waited:
            raise Internal("a step was waited for twice")
        self._waited = True
        return self._wait()


@contextmanager
def _in_our_terms() -> Generator[None]:
    """Whatever a backend raises, the engine is told as an EngineError."""
    try:
        yield
    except EngineError:
        raise
    except MemoryError as error:
        raise OutOfMemory("the step ran out of memory") from error
    except Exception as error:
        raise Internal(f"the step failed with {type(error).__name__}") from error
