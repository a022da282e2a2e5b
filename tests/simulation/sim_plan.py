"""What a seed stands for: the sizes of a worker, how often what goes wrong, and how it ends."""

from __future__ import annotations

import random
from dataclasses import dataclass

LONGEST = 44  # tokens of prompt and answer together
ANSWERS = (1, 2, 3, 5, 8, 8, 12, 16)  # lengths, in tokens


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Drawn from the seed before anything happens. Rates are probabilities, times are seconds."""

    seed: int
    num_events: int  # after which the worker is told to end
    # The engine.
    block_size: int
    groups: tuple[tuple[int | None, int], ...]  # (window, blocks with the null block)
    budget: int
    max_seqs: int
    caching: bool
    max_steps: int
    max_draws: int
    burst_ms: float
    # The server.
    max_queue: int
    max_buffered: int
    high_water: int
    keep_alive: float
    metrics_ms: int
    grace: float
    # The machine.
    step_seconds: float
    token_seconds: float
    hiccups: float  # of steps, which take a hundred times as long
    callback_seconds: float
    switches: float  # of chances to go on with the other thread
    # What goes wrong.
    load_fails: bool
    failing_steps: float
    failing_rows: float
    lost: float  # of steps, with which the device is lost
    # Who asks.
    gap: float  # between what clients do
    bursts: float
    cancels: float
    hang_ups: float
    slow: float
    oddities: float  # duplicates, requests that are refused, questions about health
    deadlines: float
    priorities: bool
    # How it ends.
    waits: bool  # until all jobs are over, before it is told to end
    ends_early: int | None  # at this event, in the middle of everything


def _groups(rng: random.Random, size: int) -> tuple[tuple[int | None, int], ...]:
    """A pool of everything that is hardly enough, and perhaps windows with pools of their own."""
    full = -(-LONGEST // size) + 1 + rng.choice((0, 0, 1, 3, 8, 30))
    windowed: list[tuple[int | None, int]] = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        window = rng.choice((1, 3, 5, 8, 13, 20))
        least = -(-(window - 1) // size) + 1
        windowed.append((window, 1 + least + rng.choice((0, 1, 2, 5, 20))))
    return ((None, full), *windowed)


def draw_plan(seed: int, num_events: int) -> Plan:
    rng = random.Random(seed)
    size = rng.choice((1, 2, 4, 4, 5))
    calm = rng.random() < 0.2  # nothing goes wrong
    step = rng.choice((0.0002, 0.001, 0.005, 0.02))
    max_seqs = rng.randint(1, 6)
    grace = rng.choice((0.0, 0.05, 1.0, 600.0, 600.0))

    def rate(*rates: float) -> float:
        return 0.0 if calm else rng.choice(rates)

    return Plan(
        seed=seed,
        num_events=num_events,
        block_size=size,
        groups=_groups(rng, size),
        budget=rng.randint(1, 24),
        max_seqs=max_seqs,
        caching=rng.random() < 0.8,
        max_steps=rng.choice((1, 2, 2)),
        max_draws=rng.choice((1, 1, 2, 3, 8)),
        burst_ms=rng.choice((0.0, 4.0, 16.0, 100.0)),
        max_queue=rng.choice((2, 4, 8, 16, 40)),
        max_buffered=rng.choice((1, 2, 4, 8, 4096)),
        high_water=rng.choice((64, 256, 1024, 65536)),
        keep_alive=rng.choice((0.01, 0.2, 5.0)),
        metrics_ms=rng.choice((1, 20, 500)),
        grace=grace,
        step_seconds=step,
        token_seconds=rng.choice((0.0, 0.0001)),
        hiccups=rate(0.0, 0.0, 0.01),
        callback_seconds=rng.choice((0.000001, 0.000005, 0.00005, 0.0005)),
        switches=rng.choice((0.0, 0.2, 0.7)),
        load_fails=not calm and rng.random() < 0.01,
        failing_steps=rate(0.0, 0.0, 0.02, 0.1, 0.3),
        failing_rows=rate(0.0, 0.0, 0.02),
        lost=rate(0.0, 0.0, 0.0, 0.0, 0.01),
        gap=step * rng.choice((0.3, 1.0, 3.0, 10.0)),
        bursts=rate(0.0, 0.05, 0.2),
        cancels=rate(0.0, 0.1, 0.3),
        hang_ups=rate(0.0, 0.1, 0.3),
        slow=rate(0.0, 0.0, 0.1, 0.3),
        oddities=rate(0.0, 0.1, 0.3),
        deadlines=rate(0.0, 0.1, 0.5),
        priorities=rng.random() < 0.5,
        waits=rng.random() < 0.6,
        ends_early=None if rng.random() < 0.7 else rng.randint(0, num_events),
    )
