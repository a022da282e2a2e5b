"""
A crowd of streams on one worker: `python benchmarks/crowd.py`.

Starts a real worker on the demo model (CPU) and, from another process, runs jobs alone, then 64 at a time
with what a worker meets in life: other clients that send nonsense, fill the queue, cancel, or hang up. Checks
that every stream is well-formed and equal to the same job run alone, measures /health and how soon blocks
come back, and ends with SIGTERM while jobs run. Prints a table and the load average, because the machine
decides as much as the code; the exit status is 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from crowd_checks import (
    GRACE_SECONDS,
    SPARE_QUEUE,
    Crowd,
    Job,
    Round,
    drain,
    free_blocks,
    make_jobs,
    make_mischief,
    until_idle,
)
from worker_client import Client, HealthPoller, WorkerProcess, Wrong, require

CROWD = 64
WORKER_OPTIONS = (
    *("--max-queue", str(CROWD + SPARE_QUEUE)),
    *("--kv-cache-size-mb", "1500"),
    *("--shutdown-grace-seconds", str(GRACE_SECONDS)),
)
HEALTH_P99_MS = 10.0
FREED_MS = 100.0  # and one step


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> str:
    """Median, 99th percentile and maximum, in milliseconds."""
    p50, p99, most = (1000 * v for v in (percentile(values, 50), percentile(values, 99), max(values)))
    return f"{p50:8.1f} {p99:8.1f} {most:8.1f}"


def show(what: str, value: str) -> None:
    print(f"{what:<44}{value}", flush=True)


async def measure(worker: WorkerProcess, jobs: Sequence[Job], rounds: int, samples: int) -> list[str]:
    """Everything in order; prints as it goes. What was too slow."""
    slow: list[str] = []
    async with Client(worker.port) as client:
        at_start = await client.health()
        free = at_start["kv_blocks_free"]
        crowd = Crowd(client, jobs)
        print(f"{at_start['model']} on {at_start['device']}\n", flush=True)
        found = await crowd.run_alone()
        show("jobs alone, cold and warm: equal", f"{len(jobs):8} jobs, {found} tokens found in the cache")
        slow += await measure_rounds(worker, crowd, rounds)
        await until_idle(client, free)
        print(
            f"\n{'blocks back after':<44}{'median':>8} {'p99':>8} {'max':>8}   ms; beyond the step",
            flush=True,
        )
        for freed in await free_blocks(crowd, samples):
            show(
                f"  {freed.way.name} ({len(freed.seconds)})",
                f"{spread(freed.seconds)}   {spread(freed.late)}",
            )
            if max(freed.late) > FREED_MS / 1000:
                slow.append(f"{freed.way.name}: blocks came back later than {FREED_MS:g} ms after the step")
        await until_idle(client, free)
        require((await client.health())["vram_bytes_used"] == at_start["vram_bytes_used"], "memory has grown")
        show("\nblocks free at the end, as at the start", f"{free:8}")
        show("SIGTERM with 16 jobs running, to exit 0", f"{1000 * await drain(crowd, worker, 16):8.0f} ms")
    return slow


async def measure_rounds(worker: WorkerProcess, crowd: Crowd, rounds: int) -> list[str]:
    """The crowd, while /health is polled and others make mischief in every other round."""
    cpu, own, began = worker.cpu_seconds(), time.process_time(), time.monotonic()
    poller = HealthPoller(worker.port)
    done: list[Round] = []
    for number in range(rounds):
        salt = f"crowd-{number // 2}"  # cold, then warm
        among: list[asyncio.Task[Any]] = []
        if number % 2:
            among.append(asyncio.create_task(make_mischief(crowd.client)))
        done.append(await crowd.run_together(salt, among=among))
    seconds = time.monotonic() - began
    health = poller.stop()
    gaps = [gap for each in done for gap in each.gaps]
    rate = statistics.median(each.tokens_per_second for each in done)
    show(f"{rounds} rounds of {len(crowd.jobs)} streams: equal to alone", f"{rate:8.0f} tok/s")
    print(f"{'':<44}{'median':>8} {'p99':>8} {'max':>8}   ms")
    show("  between tokens", spread(gaps))
    show(f"  /health at 50 Hz ({len(health)})", spread(health))
    used = {name: 100 * (after - cpu[name]) / seconds for name, after in worker.cpu_seconds().items()}
    used["client"] = 100 * (time.process_time() - own) / seconds
    show("  share of a core", ", ".join(f"{name} {share:.0f} %" for name, share in used.items()))
    p99 = 1000 * percentile(health, 99)
    return [f"/health p99 is {p99:.1f} ms, not below {HEALTH_P99_MS:g}"] if p99 >= HEALTH_P99_MS else []


def main() -> int:
    parser = argparse.ArgumentParser(description="64 streams on one worker: checks and measures")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=6, help="crowds (default: 6)")
    parser.add_argument(
        "--samples", type=int, default=20, help="of each way to end a job early (default: 20)"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="of the worker, as --option=--cpu-threads=1"
    )
    given = parser.parse_args()
    jobs = make_jobs(CROWD, words=(4, 24, 80, 240), tokens=(32, 128), longest=256)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
    try:
        with WorkerProcess(given.model, *WORKER_OPTIONS, *given.option) as worker:
            slow = asyncio.run(measure(worker, jobs, given.rounds, given.samples))
    except Wrong as problem:
        print(f"\nWRONG: {problem}", file=sys.stderr)
        return 1
    print(f"\nload average {os.getloadavg()[0]:.1f}")
    for what in slow:
        print(f"SLOW: {what}", file=sys.stderr)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
