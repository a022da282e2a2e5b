"""
Do `worker-orcd bench` and the metrics of a serving worker tell the same story?
`python benchmarks/bench_vs_server.py [--model demo] [--batch-sizes 1,4,16] [--rounds 5]`

The same requests (random prompts of 128 tokens, 64 greedy tokens each) go by turns to an engine in this
process, measured as `bench` measures it, and over HTTP to a worker in another, which is asked for its own
histograms before and after. Printed are means over a round, medians of the rounds; the ratio is what HTTP,
the event loop and the client's share of the cores add.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from dataclasses import dataclass

from worker_client import Client, WorkerProcess, require
from worker_orcd.cli.local import LocalEngine, local_engine
from worker_orcd.cli.measure import StepRecorder
from worker_orcd.config import WorkerConfig
from worker_orcd.sequence import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
Prompts = list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means of one round, in milliseconds."""

    step: float
    first_token: float
    between_tokens: float
    tokens: float  # generated


def make_prompts(number: int, seed: str) -> Prompts:
    generator = random.Random(seed)
    return [tuple(generator.randrange(100, 49000) for _ in range(PROMPT_TOKENS)) for _ in range(number)]


def by_engine(engine: LocalEngine, recorder: StepRecorder, prompts: Prompts) -> Figures:
    recorder.take()
    start = time.perf_counter()
    greedy = SamplingParams(temperature=0.0)
    numbers = [engine.submit(prompt, greedy, max_tokens=OUTPUT_TOKENS) for prompt in prompts]
    times = [[when for when, output in engine.outputs(number) for _ in output.tokens] for number in numbers]
    steps = [step.seconds for step in recorder.take() if step.num_rows]
    return Figures(
        step=1000 * statistics.fmean(steps),
        first_token=1000 * statistics.fmean(arrived[0] - start for arrived in times),
        between_tokens=1000
        * statistics.fmean((arrived[-1] - arrived[0]) / (len(arrived) - 1) for arrived in times),
        tokens=sum(len(arrived) for arrived in times),
    )


async def by_worker(client: Client, prompts: Prompts, name: str) -> Figures:
    before = await read_metrics(client)
    jobs = [
        {
            "job_id": f"{name}-{number}",
            "prompt_token_ids": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        for number, prompt in enumerate(prompts)
    ]
    streams = [await client.start("POST", "/execute", job) for job in jobs]
    for stream in streams:
        require((await stream.response()).status == 200, "a job was refused")
    after = await read_metrics(client)
    change = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def mean(histogram: str) -> float:
        return 1000 * change[f"{histogram}_sum"] / change[f"{histogram}_count"]

    return Figures(
        step=mean("worker_step_duration_seconds"),
        first_token=mean("worker_time_to_first_token_seconds"),
        between_tokens=mean("worker_inter_token_latency_seconds"),
        tokens=change["worker_tokens_generated_total"],
    )


async def read_metrics(client: Client) -> dict[str, float]:
    text = (await client.fetch("GET", "/metrics")).body.decode()
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def compare(model: str, sizes: list[int], rounds: int) -> None:
    recorder = StepRecorder()
    print(f"load average {os.getloadavg()[0]:.1f}; milliseconds, medians of {rounds} rounds")
    print(f"{'batch':>5} {'':16} {'bench':>9} {'worker':>9} {'worker / bench':>15}")
    with local_engine(WorkerConfig(model=model), recorder) as engine, WorkerProcess(model) as worker:
        for size in sizes:
            pairs = [one_round(engine, recorder, worker.port, size, number) for number in range(rounds + 1)][
                1:
            ]
            for ours, theirs in pairs:
                require(ours.tokens == theirs.tokens == size * OUTPUT_TOKENS, "tokens are missing")
            for field in ("step", "first_token", "between_tokens"):
                bench = [getattr(ours, field) for ours, _ in pairs]
                served = [getattr(theirs, field) for _, theirs in pairs]
                ratio = statistics.median(b / a for a, b in zip(bench, served, strict=True))
                middle = statistics.median(bench), statistics.median(served)
                print(
                    f"{size:>5} {field.replace('_', ' '):16} {middle[0]:9.2f} {middle[1]:9.2f} {ratio:15.2f}"
                )
    print(f"load average {os.getloadavg()[0]:.1f}")


def one_round(
    engine: LocalEngine, recorder: StepRecorder, port: int, size: int, number: int
) -> tuple[Figures, Figures]:
    prompts = make_prompts(size, f"{size}/{number}")

    async def ask() -> Figures:
        async with Client(port) as client:
            return await by_worker(client, prompts, f"{size}-{number}")

    return by_engine(engine, recorder, prompts), asyncio.run(ask())


def main() -> None:
    parser = argparse.ArgumentParser(description="bench against the metrics of a serving worker")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch-sizes", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    compare(options.model, [int(size) for size in options.batch_sizes.split(",")], options.rounds)


if __name__ == "__main__":
    main()
