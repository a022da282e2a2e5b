"""Whole workers in virtual time: every promise is kept, whatever the seed; see docs/reliability.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim_mutants import MUTANTS, Mutant, planted
from sim_plan import draw_plan
from sim_run import first_broken, simulate

ROOT = Path(__file__).parents[2]
EVENTS = 300
SEEDS_FOR_A_MUTANT = 150

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_promise_is_kept(first: int):
    found = first_broken(range(first, first + 50), EVENTS)
    assert found is None, found.told(EVENTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mistake_is_found(mutant: Mutant):
    with planted(mutant):
        assert first_broken(range(SEEDS_FOR_A_MUTANT), EVENTS) is not None, "the mutant survives"


def command(*options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/simulate.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


def test_a_seed_is_the_same_in_every_process():
    told = [command("--seed", "3", "--events", "200", hash_seed=seed) for seed in ("1", "2")]
    assert told[0].returncode == 0 and "every promise kept, digest" in told[0].stdout
    assert told[0].stdout == told[1].stdout


def test_the_command_runs_many_seeds_and_counts_them():
    done = command("--seeds", "3", "--events", "50", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 seeds: ") and done.stdout.endswith("; 0 seeds broke a promise\n")


def test_a_trace_shows_what_happens():
    lines: list[str] = []
    outcome = simulate(3, 200, lines.append)
    assert len(lines) == outcome.num_events >= 200
    assert {line.split()[1] for line in lines} >= {"ask", "answer", "launch", "step", "publish", "told"}


def test_a_broken_seed_says_how_to_see_it_again():
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "a failed job is told twice")
    with planted(mutant):
        found = first_broken(range(50), EVENTS)
        assert found is not None and found.broken is not None
        *events, broken, command = found.told(EVENTS).splitlines()
        assert broken == f"seed {found.seed}: {found.broken}" and "an output after the last one" in broken
        assert f"simulate.py --seed {found.seed} --events {EVENTS} --trace" in command
        again = simulate(found.seed, EVENTS)
    assert (again.broken, again.digest) == (found.broken, found.digest)
    assert len(events) == len(found.tail) > 0


def test_seeds_differ():
    plans = [draw_plan(seed, EVENTS) for seed in range(100)]
    for name in ("max_steps", "max_draws", "groups", "waits", "failing_steps", "grace", "switches"):
        assert len({getattr(plan, name) for plan in plans}) > 1, name
    assert draw_plan(5, EVENTS) == draw_plan(5, EVENTS)
