"""An engine on a fake device, what it says, and hands to hold its steps."""

from __future__ import annotations

import io
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from engine_fakes import STOP, FakeDevice, Gate

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.config import EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import Output, StepStats, Submit
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.errors import EngineError
from worker_orcd.narration import Narration
from worker_orcd.sequence import SamplingParams

SECONDS = 60.0  # more than anything here takes, on a busy machine too


class Bench:
    """An engine on a fake device, and everything it says."""

    def __init__(
        self,
        *,
        num_blocks: int = 200,
        max_seqs: int = 8,
        max_steps: int = 1,
        max_draws: int = 1,
        burst_seconds: float = 0.0,
        publish: Any = None,
        observer: Any = None,
    ):
        self.config = EngineConfig(max_num_seqs=max_seqs, max_num_batched_tokens=64, block_size=4)
        self.scheduler = Scheduler(self.config, [CacheGroup(BlockPool(num_blocks))])
        self.clock: Clock = MONOTONIC
        self.before_launch: Callable[[], None] = lambda: None
        self.before_wait: Callable[[], None] = lambda: None
        self.device = Gate(
            FakeDevice([(None, num_blocks)], 4),
            lambda: self.before_launch(),
            lambda: self.before_wait(),
            max_steps=max_steps,
            max_draws=max_draws,
        )
        self.log = io.StringIO()
        self.failures: list[EngineError] = []
        self.stats: list[StepStats] = []
        self.batches: list[list[Output]] = []
        self.outputs: dict[int, list[Output]] = defaultdict(list)
        self.news = threading.Condition()
        self.engine = Engine(
            self.scheduler,
            self.device,
            publish or self.publish,
            observer=observer or self,
            burst_seconds=burst_seconds,
            narration=Narration("json", stream=self.log),
            on_failure=self.fail,
            clock=lambda: self.clock(),
        )
        self.ids = itertools.count()

    def on_step(self, stats: StepStats) -> None:
        with self.news:
            self.stats.append(stats)
            self.news.notify_all()

    def fail(self, error: EngineError) -> None:
        with self.news:
            self.failures.append(error)
            self.news.notify_all()

    def publish(self, outputs: list[Output]) -> None:
        with self.news:
            self.batches.append(outputs)
            for output in outputs:
                self.outputs[output.id].append(output)
            self.news.notify_all()

    def submit(self, prompt: list[int], max_tokens: int, **fields: Any) -> int:
        number = next(self.ids)
        sampling = SamplingParams(seed=number)
        self.engine.send(
            Submit(
                id=number,
                prompt_token_ids=tuple(prompt),
                max_tokens=max_tokens,
                stop_token_ids=STOP,
                sampling=sampling,
                **fields,
            )
        )
        return number

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(condition, SECONDS), "it did not happen"

    def last(self, number: int) -> Output:
        """The sequence's last output, once it is there."""
        self.wait_for(
            lambda: bool(self.outputs[number]) and self.outputs[number][-1].finish_reason is not None
        )
        return self.outputs[number][-1]

    def tokens(self, number: int) -> list[int]:
        return [token.token_id for output in self.outputs[number] for token in output.tokens]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


class Hand:
    """A step that computes until it is let go, and then one step at a time or all of them."""

    def __init__(self, bench: Bench) -> None:
        self._arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._bench = bench
        self._error: Exception | None = None
        bench.before_wait = self._hold

    def _hold(self) -> None:
        self._arrived.release()
        assert self._go.acquire(timeout=SECONDS), "nobody let the step go"
        if self._error is not None:
            raise self._error

    def until_held(self) -> None:
        """Wait for a step to be launched; it computes until `step` or `open`."""
        assert self._arrived.acquire(timeout=SECONDS), "no step was launched"

    def step(self) -> None:
        """End the step that is held, and wait for the next."""
        self._go.release()
        self.until_held()

    def open(self, error: Exception | None = None) -> None:
        """End the step that is held, with an error if one is given; later ones are not held."""
        self._bench.before_wait = lambda: None
        self._error = error
        self._go.release()


def raises(error: BaseException, times: int = 1) -> Callable[[], None]:
    """A hook that fails the first `times` times."""
    left = [error] * times

    def hook() -> None:
        if left:
            raise left.pop()

    return hook


def check_last_outputs(bench: Bench, numbers: list[int]) -> None:
    for number in numbers:
        finals = [o for o in bench.outputs[number] if o.finish_reason is not None]
        assert len(finals) == 1 and bench.outputs[number][-1] is finals[0]
