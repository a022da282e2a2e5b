"""
What `bench` measures, through the real engine: requests in, times of outputs and steps out.

Prompts are random ordinary tokens, different for every request, so that nothing is found in the prefix cache;
answers ignore the end-of-answer tokens, so that each has its full length. Rates are medians over repeats.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from worker_orcd.cli.local import LocalEngine
from worker_orcd.engine.messages import StepStats
from worker_orcd.sequence import SamplingParams


class StepRecorder:
    """A StepObserver that keeps what the engine says of its steps."""

    def __init__(self) -> None:
        self._steps: list[StepStats] = []
        self._lock = threading.Lock()

    def on_step(self, stats: StepStats) -> None:
        with self._lock:
            self._steps.append(stats)

    def take(self) -> list[StepStats]:
        """The steps since the last call."""
        with self._lock:
            steps, self._steps = self._steps, []
        return steps


@dataclass(frozen=True, slots=True)
class Workload:
    prompt_tokens: int
    output_tokens: int
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """`batch_size` requests sent at the same moment. Times in milliseconds, rates in tokens a second."""

    batch_size: int
    seconds: float  # from sending to the last token
    output_rate: float  # over all requests and the whole time
    total_rate: float  # the same with the prompts' tokens
    first_token_ms: float  # median over requests
    first_token_ms_p95: float
    prompt_rate: float  # prompt tokens until the last first token
    decode_rate: float  # over all requests, from steps without prompt tokens
    between_tokens_ms: float  # median of a request
    between_tokens_ms_p95: float
    decode_step_ms: float  # median step without prompt tokens, as the engine timed it
    decode_steps: int  # how many those were


def warm_up(engine: LocalEngine, recorder: StepRecorder) -> None:
    """The first steps touch cold memory and are not measured."""
    _run_batch(engine, recorder, 1, Workload(prompt_tokens=16, output_tokens=4, repeats=1), seed=0)


def measure_batch(
    engine: LocalEngine, recorder: StepRecorder, batch_size: int, workload: Workload
) -> BatchResult:
    """The run with the median time of `workload.repeats` runs."""
    runs = [
        _run_batch(engine, recorder, batch_size, workload, seed=1000 * batch_size + repeat)
        for repeat in range(1, workload.repeats + 1)
    ]
    return sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]


def _run_batch(
    engine: LocalEngine, recorder: StepRecorder, batch_size: int, workload: Workload, seed: int
) -> BatchResult:
    prompts = [_prompt(engine, workload.prompt_tokens, seed, i) for i in range(batch_size)]
    recorder.take()
    sent = time.perf_counter()
    numbers = [
        engine.submit(prompt, SamplingParams(temperature=0.0), max_tokens=workload.output_tokens)
        for prompt in prompts
    ]
    times = [[when for when, output in engine.outputs(number) for _ in output.tokens] for number in numbers]
    return _summary(sent, times, recorder.take(), workload)


def _prompt(engine: LocalEngine, length: int, seed: int, index: int) -> tuple[int, ...]:
    tokenizer = engine.loaded.tokenizer
    generator = random.Random(f"{seed}/{index}")
    ids: list[int] = []
    while len(ids) < length:
        token = generator.randrange(tokenizer.vocab_size)
        if token not in tokenizer.control_ids:
            ids.append(token)
    return tuple(ids)


def _summary(
    sent: float, times: list[list[float]], steps: list[StepStats], workload: Workload
) -> BatchResult:
    last = max(request[-1] for request in times)
    firsts = [request[0] - sent for request in times]
    gaps = [later - earlier for request in times for earlier, later in pairwise(request)]
    decode = [step for step in steps if step.num_prompt_tokens == 0 and step.num_sampled]
    decode_seconds = sum(step.seconds for step in decode)
    produced = sum(len(request) for request in times)
    return BatchResult(
        batch_size=len(times),
        seconds=last - sent,
        output_rate=produced / (last - sent),
        total_rate=(produced + len(times) * workload.prompt_tokens) / (last - sent),
        first_token_ms=1000 * statistics.median(firsts),
        first_token_ms_p95=1000 * _p95(firsts),
        prompt_rate=len(times) * workload.prompt_tokens / max(firsts),
        decode_rate=sum(step.num_sampled for step in decode) / decode_seconds if decode else 0.0,
        between_tokens_ms=1000 * statistics.median(gaps) if gaps else 0.0,
        between_tokens_ms_p95=1000 * _p95(gaps) if gaps else 0.0,
        decode_step_ms=1000 * statistics.median([step.seconds / step.num_rounds for step in decode])
        if decode
        else 0.0,
        decode_steps=len(decode),
    )


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
