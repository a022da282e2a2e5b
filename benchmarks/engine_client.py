"""
The engine without a worker: a model on a device, requests of token ids in, answers out.

What a worker runs, but for HTTP and text: it imports neither, so it works where only torch, Triton, NumPy and
psutil are installed. Several engines may run on one model, one after the other, with settings of their own.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from worker_orcd.config import DeviceConfig, DeviceName, EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import Cancel, Output, StepStats, Submit
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.memory import Held
from worker_orcd.kernels.select import select_backend
from worker_orcd.model.architectures import configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import load_weights
from worker_orcd.narration import Event, Narration
from worker_orcd.runner.measure import seal, settled
from worker_orcd.runner.plan import MemoryPlan, make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.sequence import FinishReason, PendingStep, Runner, SampledToken, SamplingParams, Step

ANSWER_SECONDS = 300.0  # that the slowest answer takes at most; a device that hangs must not take the run
STOP_SECONDS = 30.0
ORDINARY = 30000  # ids below this are ordinary tokens of most vocabularies
GREEDY = SamplingParams(temperature=0.0)
SWITCH_SECONDS = 0.0005  # as in a worker: the engine's thread wants the interpreter back soon


class Told(Narration):
    """Prints what goes wrong; needs no library."""

    def __init__(self) -> None:
        self.is_pretty = False

    def tell(
        self, event: Event, sentence: str, *, trace: BaseException | None = None, **fields: object
    ) -> None:
        if event in ("warning", "error"):
            because = "" if trace is None else f" {type(trace).__name__}: {trace}"
            print(f"{event}: {sentence}{because}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Model:
    """A model on its device."""

    path: Path
    config: ModelConfig
    plan: MemoryPlan
    engine: EngineConfig  # with the `max_model_len` that there is memory for
    backend: Backend
    runner: ModelRunner
    seconds: float  # that loading took
    held: Held | None = None  # of a device whose memory is counted

    @property
    def max_len(self) -> int:
        return self.plan.max_model_len


def load(path: Path, device: DeviceName, engine: EngineConfig, longest: int, **more: Any) -> Model:
    """As a worker does it, without a tokenizer. `longest`: tokens of a sequence, if the model has so many;
    `more` settings of the device.
    """
    started = time.perf_counter()
    settings = DeviceConfig(device=device, **{"memory_fraction": 0.9 if device == "cuda" else 0.5, **more})
    backend = select_backend(settings, Told().warn)
    with GGUFFile(path) as file:
        config = configure(file)
        engine = replace(engine, max_model_len=min(longest, config.context_length))
        plan = make_plan(config, tensor_bytes(file), backend, engine, settings, backend.available_memory())
        weights = load_weights(file, config, backend)
        plan = settled(plan, config, weights, backend, engine, settings)
        config = config.serving(plan.max_model_len)
        runner = ModelRunner(Decoder(config, weights, backend), backend, plan, engine)
    held = seal(plan, backend, Told().warn)
    gc.collect()
    gc.freeze()  # as a worker does it
    return Model(path, config, plan, engine, backend, runner, time.perf_counter() - started, held)


def random_prompt(model: Model, length: int, seed: str) -> list[int]:
    """Ordinary tokens, whatever the vocabulary."""
    generator = random.Random(seed)
    return [generator.randrange(min(model.config.vocab_size, ORDINARY)) for _ in range(length)]


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are of `time.perf_counter`, as the engine published."""

    sent: float
    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    times: list[float] = field(default_factory=list[float])  # of each token
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_code: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


class OneAtATime:
    """A runner that never has two steps under way, nor draws two tokens of a sequence in one."""

    max_steps = max_draws = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def launch(self, step: Step) -> PendingStep:
        return self._runner.launch(step)


class QueueWatch:
    """A runner that counts how often the device went from a step to the next by itself.

    So it did where the next was in its queue before it had ended the one before. On a CPU it never does.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.max_steps, self.max_draws = runner.max_steps, runner.max_draws
        self._ends: list[torch.cuda.Event] | None = None
        if self.max_steps > 1:
            self._ends = [torch.cuda.Event() for _ in range(2)]  # of the steps launched last
        self.num_steps = self.num_queued = 0

    def launch(self, step: Step) -> PendingStep:
        pending = self._runner.launch(step)
        self.num_steps += 1
        if self._ends is not None:
            self.num_queued += self.num_steps > 1 and not self._ends[-1].query()
            self._ends.reverse()
            self._ends[-1].record()
        return pending


class RunningEngine(AbstractContextManager["RunningEngine"]):
    """An engine, from its start to its stop. `steps`: what it said of each of its steps."""

    def __init__(
        self,
        model: Model,
        *,
        engine: EngineConfig | None = None,
        blocks: Sequence[int] | None = None,
        runner: Runner | None = None,
    ) -> None:
        """`blocks`: usable ones of each cache group, at most those of the plan, which is also the default.

        `runner`: what stands before the model's.
        """
        self.steps: list[StepStats] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        planned = [group.num_blocks - 1 for group in model.plan.kv_groups]
        counts = planned if blocks is None else [min(pair) for pair in zip(blocks, planned, strict=True)]
        groups = [
            CacheGroup(BlockPool(1 + count), group.window)
            for count, group in zip(counts, model.plan.kv_groups, strict=True)
        ]
        self._engine = Engine(
            Scheduler(engine or model.engine, groups),
            runner or model.runner,
            self._publish,
            observer=self,
            narration=Told(),
            burst_seconds=(engine or model.engine).decode_burst_ms / 1000.0,
        )

    def __enter__(self) -> RunningEngine:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = self._engine.stop(STOP_SECONDS)
        sys.setswitchinterval(self._interval)
        if not stopped and error is None:
            raise TimeoutError(f"the engine did not stop within {STOP_SECONDS:.0f} s")

    def on_step(self, stats: StepStats) -> None:
        """On the engine's thread, as `_publish`."""
        self.steps.append(stats)

    def _publish(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            answer = self._answers[output.id]
            answer.tokens += output.tokens
            answer.times += [now] * len(output.tokens)
            answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
            if output.finish_reason is not None:
                answer.finish_reason, answer.error = output.finish_reason, output.error
                answer.error_code = output.error_code
                answer.done.set()

    def send(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        salt: bytes = b"",
        priority: int = 0,
    ) -> int:
        """Start a request, which nothing ends but `max_tokens`; its number."""
        number = next(self._ids)
        self._answers[number] = Answer(time.perf_counter())
        self._engine.send(
            Submit(
                id=number,
                prompt_token_ids=tuple(prompt),
                max_tokens=max_tokens,
                stop_token_ids=frozenset(),
                sampling=sampling,
                cache_salt=salt,
                priority=priority,
            )
        )
        return number

    def cancel(self, number: int) -> None:
        self._engine.send(Cancel(number))

    def answer(self, number: int) -> Answer:
        """The whole answer, when it is there. Raises TimeoutError; RuntimeError for one that failed."""
        answer = self.end_of(number)
        if answer.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"request {number}: {answer.error}")
        return answer

    def end_of(self, number: int) -> Answer:
        """As `answer`, but of one that failed too."""
        answer = self._answers[number]
        if not answer.done.wait(ANSWER_SECONDS):
            raise TimeoutError(f"request {number} has no answer after {ANSWER_SECONDS:.0f} s")
        return answer

    def busy(self, numbers: Sequence[int]) -> bool:
        """Whether one of these has no whole answer yet."""
        return not all(self._answers[number].done.is_set() for number in numbers)

    def leftovers(self) -> list[str]:
        """What an idle engine must not have: sequences, or blocks that are not free."""
        seen = self._engine.snapshot
        found = [f"{seen.num_running + seen.num_waiting} sequences"] * bool(
            seen.num_running + seen.num_waiting
        )
        return found + [f"{g.total - g.free} blocks" for g in seen.kv_groups if g.free != g.total]
