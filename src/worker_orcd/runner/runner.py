"""
Runs steps: fills the inputs, computes the logits, draws the tokens. Owns the KV cache's tensors.

Used by one thread. A step is under way from `launch` to the end of its `wait`. A device that draws may have
two: the second waits for the first in the device's queue, and takes from there the tokens that the first
draws. A device without a queue of its own computes in `wait`, so that the engine publishes the tokens of the
step before first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from worker_orcd.config import EngineConfig
from worker_orcd.errors import EngineError, Internal, OutOfMemory
from worker_orcd.kernels.backend import Backend, BatchInputs, Counts, DrawingForward, Tensor
from worker_orcd.kernels.draw import Draw, Draws
from worker_orcd.model.decoder import Decoder
from worker_orcd.runner.batch import Batch
from worker_orcd.runner.kv_cache import allocate_kv_cache
from worker_orcd.runner.plan import MemoryPlan
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import PendingStep, RowResult, Step


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
        self._draws = Draws(config.vocab_size)
        self._sampler = Sampler(config.vocab_size)
        self.max_steps = 1 if self._drawing is None else 2
        self.max_draws = 1 if self._drawing is None else self._drawing.max_draws
        self._under_way: deque[_PendingStep] = deque()  # the oldest first

    def launch(self, step: Step) -> PendingStep:
        """Copy what the step needs; its sequences may change afterwards. Raises EngineError."""
        counts = self._fill(step, self.max_steps, every_logit=False)
        draws = (self._draws.of(row) if row.samples else None for row in step.rows)
        with _in_our_terms():
            if self._drawing is None:
                wait = partial(self._draw_here, counts, list(draws))
            else:
                wait = self._drawing.launch(counts, draws)
        pending = _PendingStep(self._under_way, wait)
        self._under_way.append(pending)
        return pending

    def logits(self, step: Step) -> NDArray[np.float32]:
        """(num_tokens, vocab_size): compute the step and return every token's logits, a copy.

        At most `limits.max_rows` tokens. Raises EngineError.
        """
        counts = self._fill(step, 1, every_logit=True)
        with _in_our_terms():
            return self._compiled(counts).numpy().copy()

    def _fill(self, step: Step, most: int, *, every_logit: bool) -> Counts:
        if len(self._under_way) >= most:
            raise Internal(f"a step was launched while {len(self._under_way)} were under way")
        counts = self._batch.fill(step, every_logit=every_logit)
        if counts.num_rounds > self.max_draws:
            raise Internal(f"a row draws {counts.num_rounds} tokens; at most {self.max_draws} are allowed")
        return counts

    def _draw_here(self, counts: Counts, draws: Sequence[Draw | None]) -> Sequence[RowResult]:
        logits = iter(self._compiled(counts).numpy())
        return [None if draw is None else self._sampler.sample(next(logits), draw) for draw in draws]


class _PendingStep:
    """Implements `sequence.PendingStep`."""

    def __init__(self, under_way: deque[_PendingStep], wait: Callable[[], Sequence[RowResult]]) -> None:
        self._under_way = under_way
        self._wait = wait

    def wait(self) -> Sequence[RowResult]:
        """What the device has computed. The step is over then, one way or the other."""
        if self not in self._under_way:
            raise Internal("a step was waited for twice")
        if self is not self._under_way[0]:
            raise Internal("a step was waited for before the one that was launched before it")
        self._under_way.popleft()
        with _in_our_terms():
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
