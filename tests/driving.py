"""Drives a scheduler and a runner without the engine's thread: the tests decide what is submitted when."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

from worker_orcd.config import EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.messages import Output, StepStats, Submit
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.sequence import FinishReason, PendingStep, Runner, SampledToken, SamplingParams, Step


@dataclass
class Result:
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass
class Drive:
    """The same blocks for any number of rounds of `run`: later ones may hit the prefixes of earlier ones."""

    runner: Runner
    config: EngineConfig
    groups: list[CacheGroup]
    steps: list[StepStats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, self.groups)
        self._launched: deque[tuple[Step, PendingStep]] = deque()  # the oldest first

    def run(self, submits: list[Submit], *, failing: bool = False) -> dict[int, Result]:
        """Submit all at once and step until everything has ended. With `failing` some may end with errors."""
        results = {submit.id: Result() for submit in submits}
        outputs: list[Output] = []
        for submit in submits:
            outputs += self.scheduler.submit(submit, time.monotonic())
        while self._launch():
            step, pending = self._launched.popleft()
            outputs += self.scheduler.update(step, pending.wait())
            self.steps.append(self.scheduler.stats(0.0))
        for output in outputs:
            result = results[output.id]
            result.tokens += output.tokens
            result.finish_reason = output.finish_reason
            result.num_cached_tokens = output.num_cached_tokens
            assert failing or output.error is None, output.error
        return results

    def _launch(self) -> bool:
        """As many steps as there are and the runner takes. Whether one is under way."""
        while len(self._launched) < self.runner.max_steps:
            step = self.scheduler.schedule(time.monotonic(), self.runner.max_draws)
            if step is None:
                break
            self._launched.append((step, self.runner.launch(step)))
        return bool(self._launched)

    @property
    def num_preempted(self) -> int:
        return sum(stats.num_preempted for stats in self.steps)


def submit(id: int, prompt: list[int], max_tokens: int, **sampling: object) -> Submit:
    """Greedy unless `sampling` says otherwise; nothing stops it but `max_tokens`."""
    params = replace(SamplingParams(temperature=0.0), **sampling)  # type: ignore[arg-type]
    return Submit(
        id=id,
        prompt_token_ids=tuple(prompt),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        sampling=params,
    )
