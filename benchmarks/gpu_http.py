"""
A worker on a GPU over HTTP: how long until it is ready, to the first token, and what a crowd of streams gets.

    python benchmarks/gpu_http.py FILE… --sizes 64 256

Starts `worker-orcd serve` twice, the first time perhaps with kernels to compile, the second time with all of
them in its cache, and talks to the second one from this process, over `/execute`: prompts of 512 tokens one
at a time, then crowds of 128 tokens in and 128 out, greedy, beside what `gpu_engine.py` measures without
HTTP. Needs a GPU and the package's own requirements; no network. Tokens a second are of all tokens from the
first request sent to the last response read, and of those from when every stream has had one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_report import Session
from worker_client import Client, Exchange, WorkerProcess, require

ORDINARY = 30000  # token ids below this are ordinary in every vocabulary we know
MARK = b"event: token"
REPEATS = 3


def prompt(length: int, seed: str, vocabulary: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, vocabulary) for _ in range(length)]


async def start(client: Client, name: str, tokens: Sequence[int], max_tokens: int) -> Exchange:
    job = {
        "job_id": name, "prompt_token_ids": list(tokens), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    return await client.start("POST", "/execute", job)


async def first_token(client: Client, vocabulary: int) -> float:
    """Milliseconds to the first token of a prompt of 512 on an idle worker: the median of five."""
    found: list[float] = []
    for number in range(6):
        stream = await start(client, f"first-{number}", prompt(512, f"first {number}", vocabulary), 1)
        await stream.until_marks(1)
        found.append(1000 * (time.monotonic() - stream.sent_at))
        await stream.response()
    return statistics.median(found[1:])


def tokens_by(stream: Exchange, moment: float) -> int:
    """How many tokens had come then."""
    return stream.data.count(MARK, 0, sum(length for at, length in stream.arrivals if at <= moment))


def first_at(stream: Exchange) -> float:
    """When the first token came whole."""
    end = stream.data.find(MARK) + len(MARK)
    ends = itertools.accumulate(length for _at, length in stream.arrivals)
    return next(at for (at, _length), so_far in zip(stream.arrivals, ends, strict=True) if so_far >= end)


def decode_rate(streams: Sequence[Exchange]) -> float:
    """Tokens a second from when every stream has had one until the last has ended."""
    begun, ended = max(map(first_at, streams)), max(stream.ended_at for stream in streams)
    whole = sum(stream.data.count(MARK) for stream in streams)
    return (whole - sum(tokens_by(stream, begun) for stream in streams)) / (ended - begun)


async def crowd(client: Client, size: int, name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of one crowd: in all, from the first request to the last answer, and while decoding."""
    prompts = [prompt(args.prompt, f"{name} {number}", args.vocabulary) for number in range(size)]
    began = time.monotonic()
    streams = [await start(client, f"{name}-{i}", one, args.output) for i, one in enumerate(prompts)]
    for stream in streams:
        require((await stream.response()).status == 200, "a job was refused")
    ended = max(stream.ended_at for stream in streams)
    marks = [stream.data.count(MARK) for stream in streams]
    require(marks == [args.output] * size, f"streams of {sorted(set(marks))} tokens")
    return size * args.output / (ended - began), decode_rate(streams)


async def measure(session: Session, path: Path, worker: WorkerProcess) -> None:
    args, name = session.args, path.name
    async with Client(worker.port) as client:
        milliseconds = await first_token(client, args.vocabulary)
        session.keep(f"first token {name}", milliseconds)
        session.say(
            f"{name}: first token of 512 over HTTP after {milliseconds:.1f} ms", ok=milliseconds < args.first
        )
        for size in args.sizes:
            await crowd(client, size, f"warm-{size}", args)
            before = worker.cpu_seconds()
            began = time.monotonic()
            rates = [await crowd(client, size, f"crowd-{size}-{n}", args) for n in range(REPEATS)]
            spent = {key: value - before[key] for key, value in worker.cpu_seconds().items()}
            wall = time.monotonic() - began
            whole, decode = (statistics.median(of) for of in zip(*rates, strict=True))
            session.keep(f"crowd {name} {size}", {"tok/s, decode": rates, "cpu": spent, "wall": wall})
            shares = ", ".join(f"{key} {value / wall:.0%}" for key, value in spent.items())
            session.say(
                f"{name}: {size:4} streams over HTTP: {whole:8.0f} tok/s in all, {decode:8.0f} once all have"
                f" begun; of a core: {shares}"
            )


def serve(session: Session, path: Path) -> None:
    options = ("--device", session.args.device, "--max-num-seqs", "256", "--max-queue", "512")
    options += ("--max-model-len", "1024")
    for turn in ("first", "second"):
        began = time.monotonic()
        with WorkerProcess(str(path), *options) as worker:
            seconds = time.monotonic() - began
            session.keep(f"ready {path.name} {turn}", seconds)
            session.say(f"{path.name}: {turn} start, process to ready in {seconds:.1f} s")
            if turn == "second":
                asyncio.run(measure(session, path, worker))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=ORDINARY)
    parser.add_argument("--first", type=float, default=20.0, help="milliseconds allowed to the first token")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_http.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    for path in session.args.files:
        session.guarded(path.name, lambda path=path: serve(session, path))
    print("\n".join(session.lines))
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
