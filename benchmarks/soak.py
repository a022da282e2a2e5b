"""
A worker under more than it can do, for as long as you like: does it stay what it was?

    python benchmarks/soak.py                                     # 30 minutes on the demo model, CPU
    python benchmarks/soak.py --seconds 480 --device cuda --model FILE --out soak.json
    python benchmarks/soak.py --seconds 20 --model tiny           # a made-up model of a few kilobytes

Starts `worker-orcd serve` and sends it clients, each with a seed of its own, in waves that fill the queue and
leave it again. They stream and do not, in three dialects, with priorities, deadlines and shared prefixes;
cancel, hang up, read slowly or not at all, send in pieces, send nonsense and what is hardly HTTP. Another
process asks /health ten times a second, and an echo server beside it, and looks at the worker's process.

Promised, or the exit status is 1: every answer is the one that its job gets alone; every job has one end, the
same for client, log and /metrics; nothing crashes; when all is over no job, block, connection, file or thread
is left; resident memory is flat, and a GPU's the same to the byte; /health is answered soon; SIGTERM ends it
with 0. A table is printed each minute and at the end, the figures as JSON last. Needs the package's own
requirements and no network.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import soak_probe
import soak_verdict
from soak_asks import EXECUTE, Ask, Subject, make_subjects_jobs
from soak_clients import Ledger, Town, run_clients
from soak_probe import Sample, look
from soak_verdict import MIB, Limits, Log
from worker_client import Client, Response, WorkerProcess, Wrong, parse_answer, require
from worker_orcd.synth import shape_named, write_model

NUM_SUBJECTS = 40
WARM_UP = 16  # texts at a time, so that every thread that the worker may start has been started
OPTIONS = (  # little of everything, so that all of it runs out
    *("--max-num-seqs", "16", "--max-queue", "32", "--kv-cache-size-mb", "64"),
    *("--max-body-bytes", str(1 << 20), "--keep-alive-seconds", "1", "--shutdown-grace-seconds", "30"),
    *("--gpu-poll-seconds", "0.5"),
)
TINY_OPTIONS = ("--kv-cache-size-mb", "4")
IDLE_SECONDS = 60.0  # after the last answer
LAST_ENDS_SECONDS = 900.0  # for what the clients have begun
CLIENT_NICENESS = 10  # they would be on other machines
COUNTERS = ("worker_preemptions_total", "worker_tokens_in_total", "worker_tokens_generated_total")


@dataclass
class Found:
    """Everything that a soak has seen."""

    model: str = ""
    device: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    samples: list[Sample] = field(default_factory=list[Sample])
    counted: dict[str, int] = field(default_factory=dict[str, int])  # requests, by outcome
    counters: dict[str, float] = field(default_factory=dict[str, float])
    max_queue: int = 0
    broken: list[str] = field(default_factory=list[str])


# -- the worker's side ---------------------------------------------------------------------------------------


async def idle_body(port: int) -> dict[str, Any]:
    """/health once the worker has nothing to do, or has not come to that. Leaves no connection behind."""
    deadline = time.monotonic() + IDLE_SECONDS
    async with Client(port) as client:
        while True:
            body = await client.health()
            is_idle = body["state"] == "ready" and body["kv_blocks_free"] == body["kv_blocks_total"]
            if is_idle or time.monotonic() > deadline:
                return body
            await asyncio.sleep(0.05)


async def settled_look(pid: int) -> soak_probe.Look:
    """Once connections that have been closed are gone from the worker, too."""
    for _ in range(100):
        found = look(pid)
        if not found.connections:
            break
        await asyncio.sleep(0.1)
    return found


async def answers_alone(
    port: int, jobs: Sequence[dict[str, Any]], name: str, ledger: Ledger
) -> list[Subject]:
    """Each job by itself."""
    subjects: list[Subject] = []
    async with Client(port) as client:
        for number, job in enumerate(jobs):
            ask = Ask(f"{name}-{number}", EXECUTE, {**job, "job_id": f"{name}-{number}", "cache_salt": name})
            response = await (await client.send(ask.encode(port))).response()
            answer = parse_answer(response)
            require(answer.error is None, f"{ask.id} alone: {answer.error}")
            ledger.note(ask, "success")
            subjects.append(Subject(job, answer))
    return subjects


async def warm_up(port: int) -> None:
    """Long texts at once: all threads that read prompts have begun."""
    async with Client(port) as client:
        body = {"prompt": "rain " * 4_000}
        exchanges = [await client.start("POST", "/tokenize", body) for _ in range(WARM_UP)]
        for exchange in exchanges:
            require((await exchange.response()).status == 200, "a long text was not tokenised")


async def read_metrics(port: int, found: Found) -> None:
    async with Client(port) as client:
        response: Response = await client.fetch("GET", "/metrics")
    text = response.body.decode()
    outcomes = re.findall(r'^worker_requests_total\{outcome="(\w+)"\} (\S+)$', text, re.MULTILINE)
    found.counted = {name: int(float(value)) for name, value in outcomes}
    values = dict(re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE))
    found.counters = {name: float(values[name]) for name in COUNTERS}


def stop(worker: WorkerProcess, found: Found, limits: Limits) -> Log:
    """SIGTERM, and what the log says in the end."""
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    try:
        code = worker.process.wait(limits.grace_seconds + 60)
    except subprocess.TimeoutExpired:
        code = None
    log = soak_verdict.read_log(worker.log())
    found.broken += soak_verdict.bad_end(code, time.monotonic() - began, limits, log)
    return log


# -- the soak ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def probing(worker: WorkerProcess, samples: list[Sample]) -> AsyncIterator[asyncio.Task[None]]:
    """The probe runs, and its samples come, until the block ends. The task ends before that if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, soak_probe.__file__, str(worker.port), str(worker.process.pid)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )

    async def read() -> None:
        async for line in process.stdout or ():  # type: ignore[union-attr]
            samples.append(Sample(**json.loads(line)))

    reading = asyncio.create_task(read())
    try:
        yield reading
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        await process.wait()
        await reading


async def load(worker: WorkerProcess, town: Town, found: Found, probe: asyncio.Task[None]) -> None:
    """The clients, with a line of the table each minute. Raises Wrong if the worker dies."""
    clients = asyncio.create_task(run_clients(town))
    period = min(60.0, (town.until - town.began) / 3)
    next_line, told, from_sample = town.began + period, Counter[str](), 0
    print(HEAD, flush=True)
    while not clients.done():
        await asyncio.wait([clients], timeout=1.0)
        code = worker.process.poll()
        if code is not None:
            clients.cancel()
            raise Wrong(f"the worker died with status {code}:\n{worker.log()[-3000:]}")
        require(not probe.done(), "/health could not be asked any more: the probe has failed")
        require(time.monotonic() < town.until + LAST_ENDS_SECONDS, "some jobs have no end")
        if time.monotonic() >= next_line and (samples := found.samples[from_sample:]):
            counts = town.ledger.counts
            print(line_of((next_line - town.began) / 60, counts - told, samples, town.ledger), flush=True)
            next_line, told, from_sample = next_line + period, Counter(counts), len(found.samples)
    await clients


async def soak(worker: WorkerProcess, args: argparse.Namespace, found: Found) -> None:
    """From the first job to the last look; what is wrong goes into `found.broken`."""
    port, ledger = worker.port, found.ledger
    began = time.monotonic()
    jobs = make_subjects_jobs(NUM_SUBJECTS)
    subjects = await answers_alone(port, jobs, "alone", ledger)
    await warm_up(port)
    at_start = await idle_body(port)
    found.model, found.device, found.max_queue = at_start["model"], at_start["device"], at_start["max_queue"]
    before = await settled_look(worker.process.pid)
    print(f"{found.model} on {found.device}: {len(jobs)} jobs alone in {time.monotonic() - began:.1f} s\n")
    os.nice(CLIENT_NICENESS)
    now = time.monotonic()
    until, length = now + args.seconds, at_start["context_length"]
    town = Town(port, args.seed, args.clients, subjects, length, now, until, ledger)
    async with probing(worker, found.samples) as probe:
        await load(worker, town, found, probe)
    if found.samples:  # without those of the time in which the last clients went
        found.samples = [one for one in found.samples if one.at <= found.samples[0].at + args.seconds]
    at_end = await idle_body(port)
    after = await settled_look(worker.process.pid)
    again = await answers_alone(port, jobs, "again", ledger)
    if [one.alone.outcome for one in again] != [one.alone.outcome for one in subjects]:
        found.broken.append("a job gives another answer alone than before the soak")
    await idle_body(port)
    await read_metrics(port, found)
    found.broken += soak_verdict.leaks(at_start, at_end) + soak_verdict.left_open(before, after)
    if at_start["sm"] is not None:  # it is a GPU
        found.broken += soak_verdict.device_changes([at_start, at_end], found.samples)
    judge(found, limits_of(args))


def judge(found: Found, limits: Limits) -> None:
    """What happened during the load."""
    ledger, samples = found.ledger, found.samples
    found.broken += soak_verdict.wrong_answers(ledger)
    found.broken += soak_verdict.too_calm(samples, found.max_queue, ledger.counts["rejected"])
    found.broken += soak_verdict.growth(samples, limits.rss_percent)
    found.broken += soak_verdict.slow_health(samples, limits.health_p99_ms)


# -- telling -------------------------------------------------------------------------------------------------

COLUMNS = (
    *(("minute", 6), ("as alone", 8), ("refused", 7), ("cancelled", 9), ("deadline", 8), ("hung up", 7)),
    *(("garbage", 7), ("waiting", 7), ("blocks", 6), ("RSS MiB", 8)),
    *(("health p50", 10), ("p99", 6), ("max", 6), ("echo p99", 8), ("max ms", 6)),
)
HEAD = " ".join(f"{name:>{width}}" for name, width in COLUMNS)


def line_of(minute: float, counts: Counter[str], samples: Sequence[Sample], ledger: Ledger) -> str:
    """What happened since the line before: most of those waiting, least of the free blocks."""
    health, echo = soak_verdict.health_of(samples), soak_verdict.echo_of(samples)
    values = (
        f"{minute:.1f}",
        *(counts[name] for name in ("compared", "rejected", "cancelled", "timeout", "hung up")),
        counts["refused as nonsense"] + counts["refused as garbage"],
        max(one.waiting for one in samples),
        min(one.free for one in samples),
        f"{statistics.median(one.rss for one in samples) / MIB:.1f}",
        *(f"{health[name]:.1f}" for name in ("p50", "p99", "max")),
        *(f"{echo[name]:.1f}" for name in ("p99", "max")),
    )
    wrong = f"  WRONG: {ledger.num_wrong}" if ledger.num_wrong else ""
    return " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS, strict=True)) + wrong


def figures(found: Found, args: argparse.Namespace) -> dict[str, Any]:
    """For the table and the JSON."""
    samples = found.samples
    full = sum(one.running + one.waiting >= found.max_queue for one in samples)
    return {
        "model": found.model,
        "device": found.device,
        "seconds": args.seconds,
        "clients": args.clients,
        "seed": args.seed,
        "requests by outcome": found.counted,
        "as clients saw them": dict(sorted(found.ledger.counts.items())),
        "told wrong": found.ledger.num_wrong,
        **found.counters,
        "share of seconds with a full queue": round(full / max(1, len(samples)), 3),
        "RSS MiB by fifths": [round(v / MIB, 2) for v in soak_verdict.fifths(samples, lambda one: one.rss)],
        "of it no files": [
            round(v / MIB, 2) for v in soak_verdict.fifths(samples, lambda one: one.anonymous)
        ],
        "most threads and files": [max(s.threads for s in samples), max(s.files for s in samples)],
        "device bytes": sorted({(s.device_bytes, s.gpu_bytes) for s in samples}, key=str)[:8],
        "/health ms": soak_verdict.health_of(samples),
        "/health asked": sum(len(one.health) for one in samples),
        "echo ms": soak_verdict.echo_of(samples),
        "load average": round(os.getloadavg()[0], 1),
        "broken": found.broken,
    }


def report(found: Found, args: argparse.Namespace) -> None:
    told = figures(found, args) if len(found.samples) >= 5 else {"broken": found.broken}
    print()
    for name, value in told.items():
        if name != "broken":
            parts = value.items() if isinstance(value, dict) else ()
            print(f"{name:36}{', '.join(f'{key} {part}' for key, part in parts) or value}")
    if args.out is not None:
        whole = told | {"samples": [asdict(one) for one in found.samples]}
        args.out.write_text(json.dumps(whole))
    for what in found.broken:
        print(f"BROKEN: {what}")
    print("broken" if found.broken else "everything as promised")
    print(json.dumps(told), flush=True)


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(health_p99_ms=args.health_ms, rss_percent=args.rss_percent)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a GGUF file, demo (default), or tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of load (default: 1800)")
    parser.add_argument("--clients", type=int, default=64, help="in crowded times (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--health-ms", type=float, default=10.0, help="that /health's p99 stays below")
    parser.add_argument("--rss-percent", type=float, default=5.0, help="that memory may change by")
    parser.add_argument("--out", type=Path, help="a file for all figures and samples, as JSON")
    parser.add_argument(
        "--option", action="append", default=[], help="of the worker, as --option=--max-queue=9"
    )
    return parser.parse_args(given)


def make_tiny(directory: Path) -> Path:
    shape = shape_named("llama", "tiny")
    require(shape, "synth has no tiny llama")
    path = directory / "tiny.gguf"
    write_model(path, shape, "tiny llama", "Q4_K_M")  # type: ignore[arg-type]
    return path


def main() -> int:
    args, found = arguments(), Found()
    with tempfile.TemporaryDirectory() as directory:
        model, options = args.model, ("--device", args.device, *OPTIONS)
        if model == "tiny":
            model, options = str(make_tiny(Path(directory))), (*options, *TINY_OPTIONS)
        try:
            with WorkerProcess(model, *options, *args.option) as worker:
                asyncio.run(soak(worker, args, found))
                log = stop(worker, found, limits_of(args))
                found.broken += soak_verdict.wrong_ends(found.ledger, log, found.counted)
        except Wrong as problem:
            found.broken += [str(problem), *soak_verdict.wrong_answers(found.ledger)]
    report(found, args)
    return int(bool(found.broken))


if __name__ == "__main__":
    sys.exit(main())
