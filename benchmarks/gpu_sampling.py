"""
Drawing tokens on a GPU: the host sampler's tokens, the same whatever else is drawn, and how fast.

    python benchmarks/gpu_sampling.py                       # everything, about a minute and a half
    python benchmarks/gpu_sampling.py --only correct same
    python benchmarks/gpu_sampling.py --codegen             # what the compiler makes of it; needs no GPU
    python benchmarks/gpu_sampling.py --host                # what penalties cost the host; likewise

Needs a GPU, torch, triton and numpy, and no network. Checks come first: tens of thousands of draws, plain
and filtered, penalised and biased, with log probabilities, beside `runner.sampler.Sampler` on the same
logits, some behind tokens that only the device knows (`gpu_counted`); then rows alone against the same rows
among others, under every set of kernels. Then figures: microseconds of a step's draws in a CUDA graph, over
rotating logits, and what the host spends on a step. All of it goes to a JSON file as it comes; a short table
is printed last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import gpu_counted
from gpu_codegen import assembled
from gpu_timing import LARGER_THAN_L2, copy_bandwidth, graph_microseconds, stamp
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels, compile_kernel
from worker_orcd.kernels.cuda.draw_slab import MAX_DRAWS, Wanted
from worker_orcd.kernels.cuda.sampler import DeviceSampler, sampling_kernels
from worker_orcd.kernels.draw import Draw
from worker_orcd.kernels.entries import Entries
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import RowResult, SampledToken, SamplingParams

VOCAB = 201088
VOCABS = (VOCAB, 151936, 50257, 1000)
MAX_ROWS = 256
CHECKED_ROWS = 64
ROUNDS = 3  # of steps behind tokens that the host does not know
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "plain": ({}, {"temperature": 0.6}, {"temperature": 1.7}, {"temperature": 0.0}),
    "filtered": (
        {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"top_p": 0.95},
        {"top_p": 0.9, "temperature": 0.7},
        {"min_p": 0.05, "temperature": 1.4},
        {"top_k": 50},
        {"top_k": 300, "top_p": 0.8},
    ),
    "long lists": (
        {"top_p": 0.98, "temperature": 2.0},
        {"top_p": 0.999, "temperature": 1.5},
        {"top_k": 20_000},
        {"top_k": 5000, "top_p": 0.99, "temperature": 2.0},
        {"min_p": 1e-7, "temperature": 2.0},
    ),
    "adjusted": (
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1, "temperature": 0.8},
        {"repetition_penalty": 1.3, "top_k": 40, "top_p": 0.9},
        {"logit_bias": tuple((i, 4.0 - i % 9) for i in range(0, 900, 3))},
        {"repetition_penalty": 1.1, "temperature": 0.0, "logprobs": 2},
    ),
    "logprobs": ({"logprobs": 20}, {"logprobs": 0, "top_p": 0.9}, {"logprobs": 5, "temperature": 0.0}),
}
UNKNOWN = "and one that is unknown"
EVERY_SET = (
    Wanted(),
    Wanted(filters=True),
    Wanted(logprobs=True),
    Wanted(adjusts=True, counts=True),
    Wanted(adjusts=True, counts=True, filters=True, logprobs=True),
)


# -- what the compiler makes of it -------------------------------------------------------------------------


def faults(kernel: Kernel, capability: int) -> list[str]:
    """Why a kernel must not ship: it spills, keeps things in local memory, or the assembler warns."""
    log, sass = assembled(compile_kernel(kernel, capability), capability)
    found = [line for line in log.splitlines() if "warning" in line.lower()]
    for number, what in re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", log):
        if int(number):
            found.append(f"{number} bytes {what}")
    if local := len(re.findall(r"\b(?:LDL|STL)\b", sass)):
        found.append(f"{local} accesses to local memory")
    return found


def inspect_all() -> None:
    """For three kinds of GPU, vocabularies whose rows are aligned and not."""
    bad = 0
    for capability in (80, 89, 90):
        for vocab, aligned in ((VOCAB, True), (50257, False)):
            for name, kernel in sampling_kernels(vocab, MAX_ROWS, aligned=aligned).items():
                found = faults(kernel, capability)
                bad += bool(found)
                print(f"sm_{capability} {vocab} {name:20} {'; '.join(found) or 'no fault'}")
    sys.exit(1 if bad else 0)


# -- the session -------------------------------------------------------------------------------------------


class Session:
    """Results on their way to the file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, Any] = {"stamp": stamp(args.commit)}
        self.kernels = Kernels(torch.device("cuda"), self.results["stamp"]["capability"])
        self.lines: list[str] = []
        self.failures = 0
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {line}", flush=True)
        self.lines.append(line)

    def fail(self, line: str) -> None:
        self.failures += 1
        self.say(line)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self._start)

    def save(self, part: str, value: object) -> None:
        self.results[part] = value
        self.args.out.write_text(json.dumps(self.results, indent=1, default=str))

    def compile(self) -> None:
        start = time.monotonic()
        wanted = [
            kernel
            for vocab in VOCABS
            for kernel in sampling_kernels(vocab, MAX_ROWS, aligned=vocab % 16 == 0).values()
        ]
        with ProcessPoolExecutor(self.args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(_compile, capability=self.kernels.capability), wanted))
        self.say(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s")


def _compile(kernel: Kernel, capability: int) -> None:
    compile_kernel(kernel, capability)


def draw_of(params: dict[str, Any], seed: int, vocab: int, history: int = 200) -> Draw:
    """With a history where a penalty asks for one, every fifth with excluded tokens besides."""
    rng = np.random.default_rng(seed)
    penalised = "repetition_penalty" in params
    excluded = rng.integers(0, vocab, 3).tolist() if penalised and seed % 5 == 0 else ()
    bias = tuple((token, value) for token, value in params.get("logit_bias", ()) if token < vocab)
    made = SamplingParams(**(params | {"seed": int(rng.integers(2**63)), "logit_bias": bias}))
    position = int(rng.integers(1, 10_000))
    entries = Entries(made, history // 2, vocab)
    if penalised:
        entries.take_in(rng.integers(0, min(vocab, 3000), history).tolist())
    there = made.penalises or made.logit_bias
    return Draw(
        params=made,
        position=position,
        excluded=frozenset(excluded),
        entries=entries if there else None,
    )


def random_logits(vocab: int, rows: int, seed: int) -> NDArray[np.float32]:
    """Flat and peaked ones, ones with many ties, and ones with minus infinity among them."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, vocab), dtype=np.float32)
    logits *= np.linspace(0.2, 4.0, rows, dtype=np.float32)[:, None]
    logits[1::4] += (rng.random((len(logits[1::4]), vocab), dtype=np.float32) < 50 / vocab) * np.float32(9.0)
    logits[2::8] = np.round(4 * logits[2::8]) / 4
    logits[5::16, ::3] = -np.inf
    return logits


def step(
    sampler: DeviceSampler, logits: torch.Tensor, draws: Sequence[Draw | None], wanted: Wanted | None = None
) -> list[RowResult]:
    found = sampler.prepare(draws)
    sampler.upload()
    sampler.launch(logits, wanted or found)
    sampler.download()
    return sampler.results()


# -- the host's tokens -------------------------------------------------------------------------------------


def on_host(file: str, row: int, draws: Sequence[Draw]) -> list[RowResult]:
    """Of one row of the logits in `file`."""
    torch.set_num_threads(1)
    logits = np.load(file, mmap_mode="r")
    line = np.array(logits[row])
    sampler = Sampler(len(line))
    return [sampler.sample(line, draw) for draw in draws]


def on_host_behind(file: str, row: int, all_rows: Sequence[gpu_counted.Behind]) -> list[RowResult]:
    """As `on_host`, every draw of rows that lie behind others."""
    torch.set_num_threads(1)
    line = np.array(np.load(file, mmap_mode="r")[row])
    return [result for behind in all_rows for result in gpu_counted.on_host(line, behind)]


def difference(device: RowResult, host: RowResult) -> str | None:
    """What differs, beside log probabilities by rounding; None if nothing does."""
    if not isinstance(device, SampledToken) or not isinstance(host, SampledToken):
        return None if device == host else f"{device} for {host}"
    if device.token_id != host.token_id:
        return f"token {device.token_id} for {host.token_id}"
    if host.logprob is None or device.logprob is None:
        return None if host.logprob == device.logprob else "a log probability or none"
    if [token for token, _ in device.top_logprobs] != [token for token, _ in host.top_logprobs]:
        return "other tokens are most likely"
    pairs = [(device.logprob, host.logprob)]
    pairs += [(a, b) for (_, a), (_, b) in zip(device.top_logprobs, host.top_logprobs, strict=True)]
    worst = max(0.0 if a == b else abs(a - b) for a, b in pairs)
    return None if worst < 1e-8 else f"log probability off by {worst:.1e}"


def check_correct(session: Session) -> None:
    """Draws compared and how many differ, by vocabulary and kind. At most one in ten thousand may."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(session.args.jobs, mp_context=context) as pool,
    ):
        for vocab in VOCABS:
            file = str(Path(directory, f"{vocab}.npy"))
            logits = random_logits(vocab, CHECKED_ROWS, vocab)
            np.save(file, logits)
            on_device = torch.from_numpy(logits).cuda()
            sampler = DeviceSampler(session.kernels, vocab, MAX_ROWS)
            for kind, all_params in KINDS.items():
                steps = session.args.draws // CHECKED_ROWS
                draws = [
                    [
                        draw_of(all_params[(row + i) % len(all_params)], 1000 * row + i, vocab)
                        for i in range(steps)
                    ]
                    for row in range(CHECKED_ROWS)
                ]
                host = pool.map(on_host, [file] * CHECKED_ROWS, range(CHECKED_ROWS), draws)
                device = [step(sampler, on_device, [of[i] for of in draws]) for i in range(steps)]
                differences = [
                    what
                    for row, results in enumerate(host)
                    for i, result in enumerate(results)
                    if (what := difference(device[i][row], result)) is not None
                ]
                compared = steps * CHECKED_ROWS
                counts.setdefault(str(vocab), {})[kind] = (compared, len(differences))
                if len(differences) > compared / 10_000:
                    session.fail(
                        f"DIFFERS {vocab} {kind}: {len(differences)} of {compared}, {differences[:3]}"
                    )
                if not np.array_equal(on_device.cpu().numpy().view(np.int32), logits.view(np.int32)):
                    session.fail(f"DIFFERS {vocab} {kind}: the logits were changed")
                session.save("correct", counts)
            counts[str(vocab)]["unknown"] = check_unknown(session, sampler, on_device, file, pool)
            session.save("correct", counts)
            told = [f"{kind} {bad} of {of}" for kind, (of, bad) in counts[str(vocab)].items()]
            session.say(f"{vocab}: draws that differ: {', '.join(told)}")


def check_unknown(
    session: Session, sampler: DeviceSampler, logits: torch.Tensor, file: str, pool: ProcessPoolExecutor
) -> tuple[int, int]:
    """Draws in rounds, behind tokens that only the device knows: how many, and how many differ."""
    vocab, rows = sampler.vocab_size, len(logits)
    steps = max(1, session.args.draws // (rows * ROUNDS))
    behind = [gpu_counted.rows_behind(KINDS["adjusted"], rows, vocab, seed, ROUNDS) for seed in range(steps)]
    host = pool.map(on_host_behind, [file] * rows, range(rows), zip(*behind, strict=True))
    device = [
        gpu_counted.on_device(sampler, logits, of_step, ROUNDS, seed) for seed, of_step in enumerate(behind)
    ]
    compared, different = 0, list[str]()
    for row, results in enumerate(host):
        found = [one for step in device for one in step[row]]
        compared += len(found)
        different += [what for a, b in zip(found, results, strict=True) if (what := difference(a, b))]
    if different:
        session.fail(f"DIFFERS {vocab} unknown: {len(different)} of {compared}, {different[:3]}")
    return compared, len(different)


# -- the same tokens ---------------------------------------------------------------------------------------


def check_same(session: Session) -> None:
    """Rows alone, and at random places of steps of up to 256, with the kernels that the others need."""
    compared = differing = 0
    for vocab in (VOCAB, 50257):
        pool = random_logits(vocab, 48, 3)
        logits = torch.from_numpy(pool).cuda()
        sampler = DeviceSampler(session.kernels, vocab, MAX_ROWS)
        kinds = [params for kind in KINDS.values() for params in kind]
        draws = [draw_of(kinds[i % len(kinds)], i, vocab) for i in range(len(pool))]
        alone = [step(sampler, logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
        for batch in (1, 2, 17, 64, 255, 256):
            rng = np.random.default_rng(batch)
            order = rng.integers(0, len(pool), batch)
            found = step(sampler, logits[torch.from_numpy(order).cuda()], [draws[i] for i in order])
            compared += batch
            differing += sum(alone[i] != one for i, one in zip(order, found, strict=True))
        plain = [i for i, draw in enumerate(draws) if sampler.prepare([draw]) == Wanted()]
        for wanted in EVERY_SET:
            for repeat in range(20):
                seeds = [draw_of(kinds[i % len(kinds)], 100 * repeat + i, vocab) for i in plain]
                rows = logits[torch.tensor(plain, device="cuda")]
                expected = step(sampler, rows, seeds)
                compared += len(plain)
                found = step(sampler, rows, seeds, wanted)
                differing += sum(a != b for a, b in zip(found, expected, strict=True))
        behind = gpu_counted.rows_behind(kinds, len(pool), vocab, 9, MAX_DRAWS)
        apart = [
            gpu_counted.on_device(sampler, logits[i : i + 1], [row], MAX_DRAWS, i)[0]
            for i, row in enumerate(behind)
        ]
        for batch in (17, 64, 256):
            order = np.random.default_rng(batch).integers(0, len(pool), batch)
            rows = logits[torch.from_numpy(order).cuda()]
            found = gpu_counted.on_device(sampler, rows, [behind[i] for i in order], MAX_DRAWS, batch)
            for i, one in zip(order, found, strict=True):
                compared += len(one)
                differing += sum(a != b for a, b in zip(apart[i], one, strict=True))
    session.save("same", {"compared": compared, "differing": differing})
    session.say(f"{compared} draws alone and among others: {differing} differ")
    if differing:
        session.fail(f"DIFFERS: {differing} draws depend on other rows")


# -- fast --------------------------------------------------------------------------------------------------


def peaked(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Like a language model's: falling with the logarithm of the rank, at random places."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    noise = torch.rand(rows, vocab, generator=generator, device="cuda")
    return 12.0 - 1.6 * torch.log(noise * vocab + 1.0)


def measured() -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, parameters of every row, and the target at 256 rows, in microseconds."""
    yield "argmax", {"temperature": 0.0}, 150
    yield "temperature", {"temperature": 0.8}, 150
    yield "k 40, p 0.95, min-p", {"top_k": 40, "top_p": 0.95, "min_p": 0.02}, 600
    yield "p 0.95, T 0.8", {"top_p": 0.95, "temperature": 0.8}, 600
    yield "p 0.95, T 2: long lists", {"top_p": 0.95, "temperature": 2.0}, 0
    yield "k 5000, p 0.95: whole rows", {"top_k": 5000, "top_p": 0.95}, 0
    yield "5 log probabilities", {"logprobs": 5}, 0
    yield "penalties, 1000 ids", {"repetition_penalty": 1.1, "presence_penalty": 0.5}, 0
    yield UNKNOWN, {"repetition_penalty": 1.1, "presence_penalty": 0.5}, 0


def measure(session: Session) -> None:
    copy = copy_bandwidth()
    session.save("copy_gb_per_s", copy)
    session.say(
        f"device copy {copy:.0f} GB/s; µs of a step's draws from {VOCAB} logits at 1, 16, 64, 256 rows:"
    )
    table: list[dict[str, Any]] = []
    sampler = DeviceSampler(session.kernels, VOCAB, MAX_ROWS)
    for name, params, target in measured():
        if session.left() < 10:
            return session.say("out of time")
        times: dict[int, float] = {}
        for rows in (1, 16, 64, 256):
            # A single row's stay in the L2 cache, as those that a model has just computed do.
            copies = max(2, min(40, LARGER_THAN_L2 // (4 * rows * VOCAB)))
            logits = [peaked(rows, VOCAB, seed) for seed in range(copies)]
            draws = [draw_of(params, i, VOCAB, 1000) for i in range(rows)]
            if name == UNKNOWN:
                draws = [replace(draw, num_unknown=1) for draw in draws]
            wanted = sampler.prepare(draws)
            sampler.upload()
            torch.cuda.synchronize()
            times[rows] = graph_microseconds([partial(sampler.launch, one, wanted) for one in logits], 20.0)
        read = 4 * MAX_ROWS * VOCAB / 1000 / times[MAX_ROWS]
        table.append({"what": name, "microseconds": times, "target": target, "gb_per_s": read})
        session.save("fast", table)
        verdict = "" if not target else f" target {target}{'' if times[MAX_ROWS] <= target else ' MISSED'}"
        session.say(
            f"  {name:28} {' '.join(f'{micro:8.1f}' for micro in times.values())}"
            f"  one reading would be {read:.0f} GB/s ({read / copy:.0%} of copy){verdict}"
        )
    return measure_host(session, sampler)


def measure_host(session: Session, sampler: DeviceSampler) -> None:
    """What a step of 256 rows costs the host, in microseconds: the median of 50."""
    logits = peaked(MAX_ROWS, VOCAB, 0)
    found: dict[str, dict[str, float]] = {}
    for name, params in (
        ("plain", {}),
        ("filtered", {"top_k": 40, "top_p": 0.9}),
        ("penalties", {"repetition_penalty": 1.1}),
        ("logprobs", {"logprobs": 5}),
    ):
        draws = [draw_of(params, i, VOCAB, 1000) for i in range(MAX_ROWS)]
        parts: dict[str, list[float]] = {}
        for _ in range(50):
            wanted = timed(parts, "prepare", partial(sampler.prepare, draws))
            timed(parts, "upload", sampler.upload)
            timed(parts, "launch", partial(sampler.launch, logits, wanted))
            timed(parts, "download", sampler.download)
            torch.cuda.synchronize()
            timed(parts, "results", sampler.results)
        found[name] = {part: float(np.median(values)) for part, values in parts.items()}
        told = [f"{part} {value:.0f}" for part, value in found[name].items()]
        session.say(f"  host, 256 rows {name:10} {', '.join(told)} µs")
    session.save("host_microseconds", found)


def timed(parts: dict[str, list[float]], part: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = call()
    parts.setdefault(part, []).append(1e6 * (time.perf_counter() - start))
    return result


PARTS = {"correct": check_correct, "same": check_same, "fast": measure}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--codegen", action="store_true", help="compile and inspect, without a GPU")
    parser.add_argument("--host", action="store_true", help="what penalties cost the host, without a GPU")
    parser.add_argument("--draws", type=int, default=2048, help="of a kind and a vocabulary, compared")
    parser.add_argument("--out", type=Path, default=Path("gpu_sampling.json"))
    parser.add_argument("--commit", help="default: ask git")
    parser.add_argument("--seconds", type=float, default=100.0, help="stop before")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.codegen:
        inspect_all()
    if args.host:
        gpu_counted.tell_host()
        return
    session = Session(args)
    session.say(str(session.results["stamp"]))
    session.compile()
    for part in args.only:
        try:
            PARTS[part](session)
        except Exception:  # the other parts are still worth having
            traceback.print_exc()
            session.fail(f"{part} broke off")
    print("\n" + "\n".join(session.lines))
    print(f"{session.failures} failures; {args.out}")
    sys.exit(1 if session.failures else 0)


if __name__ == "__main__":
    main()
