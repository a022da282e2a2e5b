"""
What one sequence's step takes on a GPU, by how its kernels overlap: whole graphs of real or `synth` files.

    python benchmarks/gpu_single.py FILE…                 # every way of overlapping
    python benchmarks/gpu_single.py FILE --only plain ask-1 --profile
    python benchmarks/gpu_single.py FILE --only ask-1 --chunks 896x896=7 --chunks 896x896=1,896x4864=2

Needs a GPU, torch, triton and numpy, no network. A way is checked first: logits of 4 and of 1 sequence, step
by step, bit for bit those of the first way. Then its step at context 512 is timed: the graph and the copies
of its inputs. `--profile` says what each launch takes where none overlap. `--chunks` cuts the columns of some
weights into other numbers of chunks, which changes bits, so these ways are compared with themselves,
overlapping and not.
Results go to a JSON file as they come.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
import zlib
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_model import sequences_of
from gpu_report import Session
from gpu_timing import copy_bandwidth
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Counts
from worker_orcd.kernels.cuda import backend as backend_module
from worker_orcd.kernels.cuda.backend import CudaBackend
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels, Overlap
from worker_orcd.kernels.cuda.expert_weights import PackedExperts
from worker_orcd.kernels.cuda.inputs import Bucket
from worker_orcd.kernels.cuda.step import CudaStep
from worker_orcd.kernels.cuda.weights import PackedMatrix
from worker_orcd.model.architectures import configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import Weights, load_weights
from worker_orcd.runner.plan import MemoryPlan, make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step

ROWS = (1, 4)
ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=4, max_model_len=1024)
DEVICE = DeviceConfig(kv_cache_size_mb=2048, memory_fraction=0.9)
WAYS: dict[str, Overlap] = {
    "plain": Overlap(),
    "small-1": Overlap(mode=1),
    "small-2": Overlap(mode=2),
    "all-1": Overlap(mode=1, product=1),
    "all-2": Overlap(mode=1, product=2),
}
STEPS = 160  # of 4 sequences, more than a split of attention; then as many of one
Log = list[tuple[Kernel, Grid]]


class Watched(Kernels):
    """Kernels whose launches can be written down, or only gathered to be compiled."""

    def __init__(self, overlap: Overlap, gather: list[Kernel] | None = None) -> None:
        major, minor = torch.cuda.get_device_capability()
        super().__init__(torch.device("cuda", 0), 10 * major + minor, overlap=overlap)
        self.log: Log | None = None
        self._gather = gather

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        if self.log is not None:
            self.log.append((kernel, grid))
        super().launch(kernel, grid, *arguments)

    def compile_all(self, kernels: SequenceABC[Kernel], on_progress: Any) -> None:
        if self._gather is not None:
            self._gather.extend(kernels)
            raise Gathered
        super().compile_all(kernels, on_progress)


class Gathered(Exception):
    """All kernels are known."""


@dataclass(frozen=True)
class Way:
    name: str
    overlap: Overlap
    chunks: tuple[tuple[int, int, int], ...] = ()  # n, k and how many

    def weights(self, weights: Weights) -> Weights:
        return rechunked(weights, {(n, k): count for n, k, count in self.chunks}) if self.chunks else weights


def rechunked(value: Any, chunks: dict[tuple[int, int], int]) -> Any:
    """Weights, whatever they are made of, with other chunks."""
    if isinstance(value, PackedMatrix):
        steps = -(-value.shape.k // value.shape.step)
        count = chunks.get((value.n, value.shape.k), value.shape.chunks)
        if steps % count:
            return value
        return replace(value, shape=replace(value.shape, chunks=count))
    if isinstance(value, tuple):
        return tuple(rechunked(one, chunks) for one in value)
    if is_dataclass(value) and not isinstance(value, PackedExperts | type):
        made = {one.name: rechunked(getattr(value, one.name), chunks) for one in fields(value) if one.init}
        return replace(value, **made)
    return value


def parsed(text: str) -> tuple[tuple[int, int, int], ...]:
    """896x4864=2,896x896=7"""
    found = [re.fullmatch(r"(\d+)x(\d+)=(\d+)", one) for one in text.split(",")]
    return tuple((int(one[1]), int(one[2]), int(one[3])) for one in found if one)


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    weights: Weights
    plan: MemoryPlan

    def runner(self, way: Way, kernels: Kernels) -> ModelRunner:
        backend = CudaBackend(kernels)
        decoder = Decoder(self.config, way.weights(self.weights), backend)
        return ModelRunner(decoder, backend, self.plan, ENGINE)


def load(path: Path) -> Model:
    backend = CudaBackend(Watched(Overlap()))
    with GGUFFile(path) as file:
        config = configure(file)
        plan = make_plan(config, tensor_bytes(file), backend, ENGINE, DEVICE, backend.available_memory())
        config = config.serving(plan.max_model_len)
        return Model(config, load_weights(file, config, backend), plan)


def compile_ways(session: Session, model: Model, ways: SequenceABC[Way]) -> None:
    """All kernels of all ways at once, a process a core."""
    found: list[Kernel] = []
    for way in ways:
        try:
            model.runner(way, Watched(way.overlap, found))
        except Gathered:
            torch.cuda.empty_cache()
    different = list(dict.fromkeys(found))
    started = time.monotonic()
    Watched(Overlap()).compile_all(different, lambda _done, _all: None)
    session.say(f"{len(different)} kernels in {time.monotonic() - started:.1f} s")


def sequence(number: int, token_ids: list[int], first_block: int, blocks: int, groups: int) -> Sequence:
    made = Sequence(
        id=number, token_ids=token_ids, max_tokens=1 << 20, stop_token_ids=frozenset(),
        sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    made.block_tables = [list(range(first_block, first_block + blocks)) for _ in range(groups)]
    return made


def trace(runner: ModelRunner) -> list[int]:
    """A checksum of every step's logits, of 4 sequences and then of one, all from the first token on."""
    sums: list[int] = []
    groups = len(runner.plan.kv_groups)
    for rows in (4, 1):
        random = np.random.default_rng(rows)
        ids = random.integers(0, min(runner.vocab_size, 30000), (rows, STEPS)).tolist()
        blocks = -(-STEPS // runner.limits.block_size)
        some = [sequence(i, ids[i], 1 + i * blocks, blocks, groups) for i in range(rows)]
        for step in range(STEPS):
            for one in some:
                one.num_computed_tokens = step
            logits = runner.logits(Step(tuple(Row.of(one, 1) for one in some)))
            if not np.isfinite(logits).all():
                raise ValueError("logits that are no numbers")
            sums.append(zlib.crc32(logits.tobytes()))
    return sums


def timed(runner: ModelRunner, rows: int, context: int) -> float:
    """Microseconds of a step's graph and the copies of its inputs."""
    random = np.random.default_rng(rows)
    prompts = random.integers(0, min(runner.vocab_size, 30000), (rows, context + 1)).tolist()
    runner.logits(Step(tuple(Row.of(one, 1) for one in sequences_of(runner, prompts, computed=True))))
    executor, counts = step_of(runner).executor, Counts(rows, rows, rows)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start.record()
        for _ in range(20):
            executor.start(counts)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 20)
    return 1000 * statistics.median(times)


def step_of(runner: ModelRunner) -> CudaStep:
    step: Any = runner._compiled
    return step


def profile(session: Session, runner: ModelRunner, kernels: Watched) -> None:
    """What each kernel of a step of one sequence takes, by what it is; the mean over layers and replays."""
    executor = step_of(runner).executor
    bucket = executor.buckets[0]
    kernels.log = []
    executor.forget_launches()  # which are written down once
    for launch in executor._of(Bucket(bucket.tokens, bucket.logits)):
        launch()
    log, kernels.log = kernels.log, None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
        for _ in range(5):
            executor.start(Counts(1, 1, 1))
        torch.cuda.synchronize()
    names = {kernel.function for kernel, _ in log}
    events = sorted(
        (one for one in watched.events() if one.name in names), key=lambda one: one.time_range.start
    )
    if len(events) != 5 * len(log):
        session.say(f"{len(events)} kernels seen, {len(log)} launched a step")
        return
    took: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for index, one in enumerate(events):
        kernel, grid = log[index % len(log)]
        constants = dict(kernel.constants)
        name = f"{kernel.function} {grid} {constants.get('FORMAT', '')} {constants.get('K', '')}"
        took.setdefault(name, []).append(one.time_range.elapsed_us())
        if index % len(log):
            gap = one.time_range.start - events[index - 1].time_range.end
            gaps.setdefault(name, []).append(gap)
    session.say(f"    {'mean us':>8} {'gap':>6} {'a step':>6}")
    for name, times in took.items():
        mean, gap = statistics.mean(times), statistics.mean(gaps.get(name, [0.0]))
        session.say(f"    {mean:8.2f} {gap:6.2f} {len(times) // 5:6}  {name}")


def try_way(session: Session, model: Model, way: Way, firsts: dict[Any, list[int]], file: str) -> None:
    args, name = session.args, way.name
    kernels = Watched(way.overlap)
    runner = model.runner(way, kernels)
    sums = [] if args.unchecked else trace(runner)
    first = firsts.setdefault(way.chunks, sums)
    differ = sum(a != b for a, b in zip(first, sums, strict=True))
    micros = {rows: timed(runner, rows, args.context) for rows in ROWS}
    session.keep(f"{file} {name}", {"differ": differ, "steps": len(sums), "us": micros})
    times = ", ".join(
        f"{rows}: {micro:8.1f} us = {1e6 * rows / micro:7.0f}" for rows, micro in micros.items()
    )
    session.say(f"{file} {name:24} {times} tok/s; {differ} of {len(sums)} steps differ", ok=not differ)
    if args.profile and not (way.overlap.mode or way.overlap.product):
        profile(session, runner, kernels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--chunks", action="append", default=[], help="NxK=CHUNKS,… (twice: two more ways)")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="time only")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("gpu_single.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    backend_module.MAX_VOCAB = 0  # tokens are not drawn here
    for path in session.args.files:

        def whole(path: Path = path) -> None:
            model = load(path)
            ways = [Way(name, WAYS[name]) for name in session.args.only]
            ways += [
                Way(f"{name} {text}", WAYS[name], parsed(text))
                for text in session.args.chunks
                for name in ("plain", session.args.only[-1])
            ]
            compile_ways(session, model, ways)
            firsts: dict[Any, list[int]] = {}
            for way in ways:
                session.guarded(
                    f"{path.name} {way.name}",
                    lambda way=way: try_way(session, model, way, firsts, path.name),
                )
                torch.cuda.empty_cache()

        session.guarded(path.name, whole)
        torch.cuda.empty_cache()
    session.say(f"device copy: {copy_bandwidth():.0f} GB/s")
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
