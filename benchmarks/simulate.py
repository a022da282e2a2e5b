"""
Simulates whole workers in virtual time, a seed each, and checks every promise after every event.

    python benchmarks/simulate.py --seeds 10000 --events 500 --jobs 2
    python benchmarks/simulate.py --seed 4711 --trace

What is simulated and what is checked: docs/reliability.md. The exit code is 1 where a promise was broken;
then the command that shows it again is printed, with the events before it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS / "simulation"), str(TESTS / "engine")]

from sim_run import Outcome, simulate  # noqa: E402 (its directory is no package)

MAX_TOLD = 5  # seeds that broke a promise, told with their events


def main() -> int:
    parser = argparse.ArgumentParser(description="simulate whole workers in virtual time")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--events", type=int, default=500, help="of each, before the worker is told to end")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print its events as they happen")
    args = parser.parse_args()
    if args.seed is not None:
        return run_one(args.seed, args.events, trace=args.trace)
    return run_many(range(args.first, args.first + args.seeds), args.events, args.jobs)


def run_one(seed: int, num_events: int, *, trace: bool) -> int:
    outcome = simulate(seed, num_events, print if trace else None)
    if outcome.broken is not None:
        print(f"seed {seed}: {outcome.broken}" if trace else outcome.told(num_events))
        return 1
    print(f"seed {seed}: {outcome.num_events} events, every promise kept, digest {outcome.digest:08x}")
    return 0


def run_many(seeds: range, num_events: int, num_jobs: int) -> int:
    begun = time.monotonic()
    totals, broken = Totals(), 0
    with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
        work = partial(simulate, num_events=num_events)
        for outcome in pool.imap_unordered(work, seeds, chunksize=8):
            totals.add(outcome)
            if outcome.broken is not None:
                broken += 1
                if broken <= MAX_TOLD:
                    print(outcome.told(num_events), flush=True)
    print(f"{totals} in {time.monotonic() - begun:.0f} s; {broken} seeds broke a promise")
    return 1 if broken else 0


class Totals:
    """What all seeds did."""

    def __init__(self) -> None:
        self.num_seeds = self.num_events = self.num_jobs = self.num_steps = 0
        self.fewest = sys.maxsize  # events of a seed

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        self.num_events += outcome.num_events
        self.num_jobs += outcome.num_jobs
        self.num_steps += outcome.num_steps
        self.fewest = min(self.fewest, outcome.num_events)

    def __str__(self) -> str:
        return (
            f"{self.num_seeds} seeds: {self.num_events} events (a seed has {self.fewest} or more),"
            f" {self.num_jobs} jobs, {self.num_steps} steps"
        )


if __name__ == "__main__":
    sys.exit(main())
