"""Runs seeds and tells which broke a promise, and how to see it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sim_plan import draw_plan
from sim_world import Violation, World


@dataclass(frozen=True)
class Outcome:
    """What came of one seed."""

    seed: int
    num_events: int
    num_jobs: int
    num_steps: int
    digest: int  # of everything that happened: equal for equal seeds
    broken: str | None = None
    tail: tuple[str, ...] = ()  # the last events, where a promise was broken

    def told(self, num_events: int) -> str:
        """What broke, what happened before, and the command that shows all of it."""
        command = f"python benchmarks/simulate.py --seed {self.seed} --events {num_events} --trace"
        return "\n".join([*self.tail, f"seed {self.seed}: {self.broken}", f"to see it again: {command}"])


def simulate(seed: int, num_events: int, show: Callable[[str], None] | None = None) -> Outcome:
    """Play a seed to its end."""
    world = World(draw_plan(seed, num_events), show=show)
    broken = None
    try:
        world.run()
    except Violation as error:
        broken = str(error)
    return Outcome(
        seed,
        world.num_events,
        len(world.director.jobs),
        world.runner.num_steps,
        world.digest,
        broken,
        tuple(world.tail) if broken is not None else (),
    )


def first_broken(seeds: Iterable[int], num_events: int) -> Outcome | None:
    """The first seed that breaks a promise."""
    return next((found for found in _all(seeds, num_events) if found.broken is not None), None)


def _all(seeds: Iterable[int], num_events: int) -> Iterator[Outcome]:
    for seed in seeds:
        yield simulate(seed, num_events)
