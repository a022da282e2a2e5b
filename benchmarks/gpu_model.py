"""
Whole models on a GPU: right, the same bits whatever the batch, and how fast.

    python benchmarks/gpu_model.py --only tiny                       # every architecture, small and random
    python benchmarks/gpu_model.py FILE… --only real same fast       # real or `synth` files
    python benchmarks/gpu_model.py FILE… --kv fp8                    # with a KV cache of fp8

Needs a GPU, torch, triton, numpy and, for `tiny`, the gguf package; no network. `tiny` compares logits with
the reference backend's on the CPU, then every chunking and place in a batch with each other, bit for bit,
with and without graphs, and the bits with the digests in tests/data/gpu_goldens.json (`--update` writes
them). `real` compares a file's logits with the CPU's in float32. `same` does what `tiny` does for bits, with
up to 256 neighbours. `fast` times steps: of one sequence and many, and of prompts; `profile` says which
kernels a step of 1 and of 64 spends its time in. Results go to a JSON file as they come; a table is printed
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fp8_reference import RoundedReference
from gpu_goldens import GOLDENS, Goldens, digest
from gpu_report import Session
from gpu_timing import copy_bandwidth
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Backend, Counts
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.backend import CudaBackend
from worker_orcd.kernels.cuda.compiler import FULL_OVERLAP, Kernels
from worker_orcd.kernels.cuda.step import CudaStep
from worker_orcd.kernels.draw import Draws
from worker_orcd.model.architectures import configure
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import load_weights
from worker_orcd.runner.plan import make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.sampler import Sampler
from worker_orcd.runner.scoring import score
from worker_orcd.sequence import Row, SampledToken, SamplingParams, Sequence, Step

SMALL = EngineConfig(max_num_seqs=512, max_num_batched_tokens=512)
CHUNKS = (1, 7, 64, 333)
BATCHES = (2, 3, 8, 16, 17, 33, 64, 100, 128, 256)
DECODES = (1, 4, 16, 64, 128, 256)
TINY_ERROR = 0.02  # of the range of logits: operands are rounded to 8 or 11 bits
FP8_ERROR = 0.15  # a key between two numbers of three bits may become the other one
ROUTED_ERROR = 0.3  # where random routers choose other experts for a rounding


def cuda(kv: str, *, graphs: bool = True) -> CudaBackend:
    major, minor = torch.cuda.get_device_capability()
    kernels = Kernels(torch.device("cuda"), 10 * major + minor, overlap=FULL_OVERLAP)
    return CudaBackend(kernels, graphs=graphs, fp8_cache=kv == "fp8")


def load(path: Path, backend: Backend, engine: EngineConfig) -> ModelRunner:
    """As the worker does it, without a tokenizer."""
    device = DeviceConfig(memory_fraction=0.9)
    with GGUFFile(path) as file:
        config = configure(file)
        plan = make_plan(config, tensor_bytes(file), backend, engine, device, backend.available_memory())
        config = config.serving(plan.max_model_len)
        weights = load_weights(file, config, backend)
    return ModelRunner(Decoder(config, weights, backend), backend, plan, engine)


# -- right ---------------------------------------------------------------------------------------------------


def differing(a: NDArray[np.float32], b: NDArray[np.float32]) -> int:
    """Outputs whose bits differ."""
    return int((a.view(np.int32) != b.view(np.int32)).sum())


def check_tiny(session: Session) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model"))
    from tiny_models import MODELS
    from tiny_variants import VARIANTS, tiny_file

    prompt = np.random.default_rng(7).integers(0, 320, 300).tolist()
    args, stamp = session.args, session.results["stamp"]
    goldens = Goldens(args.goldens, stamp["device"], f"Triton {stamp['triton']}", update=args.update)
    with tempfile.TemporaryDirectory() as directory:
        for name, tiny in (MODELS | VARIANTS).items():
            if session.args.models and name not in session.args.models:
                continue
            path = tiny_file(tiny).write(Path(directory) / f"{name}.gguf")
            session.guarded(
                name, lambda name=name, path=path: check_one(session, name, path, prompt, goldens)
            )


def check_one(session: Session, name: str, path: Path, prompt: list[int], goldens: Goldens) -> None:
    kv, fp8 = session.args.kv, session.args.kv == "fp8"
    wanted = score(load(path, RoundedReference() if fp8 else ReferenceBackend(), SMALL), prompt)
    runner = load(path, cuda(kv), SMALL)
    found = score(runner, prompt)
    error = (np.abs(found - wanted).max(axis=1) / np.ptp(wanted, axis=1)).max()
    bits = {chunk: differing(score(runner, prompt, chunk), found) for chunk in CHUNKS}
    rows = in_batch(runner, [prompt[:5], prompt[40:57], prompt[90:91], prompt[100:240]])
    alone = np.concatenate(
        [in_batch(runner, [prompt[a:b]]) for a, b in ((0, 5), (40, 57), (90, 91), (100, 240))]
    )
    others = differing(rows, alone)
    eager = differing(score(load(path, cuda(kv, graphs=False), SMALL), prompt), found)
    name = f"{name} fp8" if fp8 else name
    session.keep(f"tiny {name}", {"error": float(error), "chunks": bits, "batch": others, "eager": eager})
    allowed = ROUTED_ERROR if name.startswith("gpt-oss") else FP8_ERROR if fp8 else TINY_ERROR
    clean = bool(np.isfinite(found).all()) and not any(bits.values()) and not others and not eager
    session.say(
        f"{name:14} error {error:.5f}; bits that differ: chunks {sum(bits.values())}, batch {others},"
        f" eager {eager} of {found.size}",
        ok=bool(error < allowed) and clean,
    )
    told, as_pinned = goldens.check(name, found)
    session.keep(f"golden {name}", {"sha256": digest(found), "as pinned": as_pinned, "told": told})
    session.say(f"{name:14} {told}", ok=as_pinned)


def in_batch(runner: ModelRunner, prompts: list[list[int]]) -> NDArray[np.float32]:
    """Logits of every token, all prompts in one step."""
    return runner.logits(
        Step(tuple(Row.of(one, len(one.token_ids)) for one in sequences_of(runner, prompts)))
    )


def sequences_of(runner: ModelRunner, prompts: list[list[int]], *, computed: bool = False) -> list[Sequence]:
    """One a prompt, with blocks of its own; `computed`: all tokens but the last are in the cache, or were and
    are behind the window.
    """
    size = runner.limits.block_size
    sequences = [
        Sequence(
            id=number, token_ids=prompt, max_tokens=1 << 20, stop_token_ids=frozenset(),
            sampling=SamplingParams(temperature=0.0),
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    for group in runner.plan.kv_groups:
        block = 1
        for one in sequences:
            length = len(one.token_ids)
            first = 0 if group.window is None or not computed else max(0, length - group.window) // size
            held = -(-length // size) - first
            one.block_tables.append([0] * first + list(range(block, block + held)))
            block += held
        if block > group.num_blocks:
            raise ValueError(f"{block} blocks of a group that has {group.num_blocks}")
    for one in sequences:
        one.num_computed_tokens = len(one.token_ids) - 1 if computed else 0
    return sequences


def check_real(session: Session, path: Path) -> None:
    ids = np.random.default_rng(3).integers(1000, 30000, 200).tolist()
    if session.args.ids is not None:
        ids = json.loads(session.args.ids.read_text())
    engine = EngineConfig(max_num_seqs=512, max_num_batched_tokens=512, max_model_len=1024)
    runner = load(path, cuda(session.args.kv), engine)
    found = score(runner, ids)
    wanted = (
        np.load(session.args.logits)
        if session.args.logits
        else score(load(path, ReferenceBackend(), engine), ids)
    )
    wanted, found = wanted.astype(np.float64), found[: len(wanted)]
    log_p = wanted - np.logaddexp.reduce(wanted, axis=1, keepdims=True)
    theirs = found.astype(np.float64)
    log_q = theirs - np.logaddexp.reduce(theirs, axis=1, keepdims=True)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    same_top = int((found.argmax(axis=1) == wanted.argmax(axis=1)).sum())
    session.keep(f"real {path.name}", {"kl": float(kl.mean()), "most": float(kl.max()), "top1": same_top})
    session.say(
        f"{path.name}: KL to the reference mean {kl.mean():.7f}, most {kl.max():.7f}; same top-1"
        f" {same_top}/{len(found)}",
        ok=bool(kl.mean() < (3e-2 if session.args.kv == "fp8" else 1e-3)),
    )


# -- the same bits -------------------------------------------------------------------------------------------


def check_same(session: Session, path: Path) -> None:
    engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=1024)
    runner = load(path, cuda(session.args.kv), engine)
    random = np.random.default_rng(5)
    vocabulary = min(runner.vocab_size, 30000)
    prompts = [random.integers(0, vocabulary, random.integers(2, 60)).tolist() for _ in range(max(BATCHES))]
    alone = [last_logits(runner, [prompt])[0] for prompt in prompts]
    compared = wrong = 0
    for size in BATCHES:
        order = random.permutation(len(prompts))[:size]
        together = last_logits(runner, [prompts[index] for index in order])
        for place, index in enumerate(order):
            wrong += differing(together[place], alone[index]) > 0
            compared += 1
    ids = random.integers(0, vocabulary, 256).tolist()
    whole = score(runner, ids)
    chunks = sum(differing(score(runner, ids, chunk), whole) for chunk in CHUNKS)
    session.keep(f"same {path.name}", {"rows": compared, "differ": wrong, "chunks": chunks})
    session.say(
        f"{path.name}: {wrong} of {compared} rows differ in a batch, {chunks} words under chunking",
        ok=not wrong and not chunks,
    )
    check_draws(session, path.name, runner, prompts)


DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 5},
    {"temperature": 1.2, "logit_bias": ((7, 5.0), (11, -100.0))},
)


def check_draws(session: Session, name: str, runner: ModelRunner, prompts: list[list[int]]) -> None:
    """What a step draws on the device, beside what the host draws from the same step's logits."""
    logits = last_logits(runner, prompts)
    sequences = sequences_of(runner, prompts, computed=True)
    for number, one in enumerate(sequences):
        one.sampling = SamplingParams(seed=number, **DRAWS[number % len(DRAWS)])
    drawn = runner.launch(Step(tuple(Row.of(one, 1) for one in sequences))).wait()
    host, draws = Sampler(runner.vocab_size), Draws(runner.vocab_size)
    wrong = sum(
        not isinstance(found, SampledToken)
        or not isinstance(wanted := host.sample(row, draws.of(Row.of(one, 1))), SampledToken)
        or found.token_id != wanted.token_id
        for found, row, one in zip(drawn, logits, sequences, strict=True)
    )
    session.keep(f"draws {name}", {"rows": len(drawn), "differ": wrong})
    session.say(f"{name}: {wrong} of {len(drawn)} tokens drawn by a step are not the host's", ok=not wrong)


def last_logits(runner: ModelRunner, prompts: list[list[int]]) -> NDArray[np.float32]:
    """Of the last token of each prompt: all but it in steps of their own, then one decode step of all."""
    sequences = sequences_of(runner, prompts)
    for some in grouped(sequences, runner.limits.max_tokens):
        runner.launch(Step(tuple(Row.of(one, len(one.token_ids) - 1) for one in some))).wait()
    for one in sequences:
        one.num_computed_tokens = len(one.token_ids) - 1
    return runner.logits(Step(tuple(Row.of(one, 1) for one in sequences)))


def grouped(sequences: list[Sequence], most: int) -> Iterator[list[Sequence]]:
    some: list[Sequence] = []
    for one in sequences:
        if some and sum(len(other.token_ids) for other in some) + len(one.token_ids) > most:
            yield some
            some = []
        some.append(one)
    yield some


# -- fast ----------------------------------------------------------------------------------------------------


def time_model(session: Session, path: Path) -> None:
    engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=1024)
    started = time.monotonic()
    backend = cuda(session.args.kv)
    runner = load(path, backend, engine)
    torch.cuda.synchronize()
    loaded = time.monotonic()
    step: CudaStep = runner._compiled
    session.say(
        f"{path.name}: {backend.description}, {runner.plan.kv_cache_bytes / 1e9:.2f} GB of it; ready in"
        f" {loaded - started:.1f} s, {torch.cuda.memory_allocated() / 1e9:.2f} GB"
    )
    context = session.args.context
    for rows in DECODES:
        if rows * (context + 16) > runner.plan.kv_cache_tokens:
            continue
        micro, whole, behind = time_decode(runner, step, rows, context)
        session.keep(f"decode {path.name} {rows}", {"graph": micro, "step": whole, "behind": behind})
        session.say(
            f"{path.name}: {rows:4} sequences at {context}: graph {micro:8.1f} us ="
            f" {1e6 * rows / micro:8.0f} tok/s; with host {whole:8.1f} us = {1e6 * rows / whole:8.0f} tok/s;"
            f" launched behind another {behind:8.1f} us = {1e6 * rows / behind:8.0f} tok/s"
        )
    for tokens in (128, 512, 2048):
        micro = time_prompt(runner, step, tokens)
        session.keep(f"prompt {path.name} {tokens}", micro)
        session.say(
            f"{path.name}: prompt step of {tokens:5}: {micro:9.1f} us = {1e6 * tokens / micro:8.0f} tok/s"
        )


def time_decode(runner: ModelRunner, step: CudaStep, rows: int, context: int) -> tuple[float, float, float]:
    """Microseconds of the graph alone, of a whole step, and of one that was launched while another was under
    way, as the engine does it.
    """
    random = np.random.default_rng(rows)
    prompts = random.integers(0, min(runner.vocab_size, 30000), (rows, context + 1)).tolist()
    whole = Step(tuple(Row.of(one, 1) for one in sequences_of(runner, prompts, computed=True)))
    for _ in range(3):
        runner.launch(whole).wait()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        runner.launch(whole).wait()
        times.append(time.perf_counter() - started)
    behind = []
    pending = runner.launch(whole)
    for _ in range(40):
        started = time.perf_counter()
        following = runner.launch(whole) if runner.max_steps > 1 else None
        pending.wait()
        pending = following or runner.launch(whole)
        behind.append(time.perf_counter() - started)
    pending.wait()
    alone = replay(step, Counts(rows, rows, rows))
    return alone, 1e6 * statistics.median(times), 1e6 * statistics.median(behind)


def profile_model(session: Session, path: Path) -> None:
    """Microseconds of a step in each kernel, the largest first."""
    engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=1024)
    runner = load(path, cuda(session.args.kv), engine)
    step: CudaStep = runner._compiled
    for rows in (1, 64):
        time_decode(runner, step, rows, session.args.context)
        say_kernels(session, f"{path.name}: {rows} sequences", step, Counts(rows, rows, rows))
    for tokens in (512, 2048):
        time_prompt(runner, step, tokens)
        rows = -(-tokens // 512)
        say_kernels(session, f"{path.name}: prompts of {tokens} in all", step, Counts(tokens, rows, rows))


def say_kernels(session: Session, what: str, step: CudaStep, counts: Counts) -> None:
    """Of the step that the inputs hold."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            step.executor.start(counts)
        torch.cuda.synchronize()
    events = [one for one in profile.key_averages() if one.self_device_time_total]
    total = sum(one.self_device_time_total for one in events)
    session.say(f"{what}, {total / 5:.0f} us in kernels")
    for one in sorted(events, key=lambda one: -one.self_device_time_total)[:12]:
        share, each = one.self_device_time_total / total, one.self_device_time_total / one.count
        session.say(f"    {one.key:32} {share:6.1%}  {each:7.2f} us each, {one.count // 5} a step")


def time_prompt(runner: ModelRunner, step: CudaStep, tokens: int) -> float:
    length = min(tokens, 512)
    random = np.random.default_rng(tokens)
    prompts = random.integers(0, min(runner.vocab_size, 30000), (tokens // length, length)).tolist()
    rows = [Row.of(one, length) for one in sequences_of(runner, prompts)]
    runner.launch(Step(tuple(rows))).wait()
    return replay(step, Counts(tokens, len(rows), len(rows)))


def replay(step: CudaStep, counts: Counts) -> float:
    """Median microseconds of the step that the inputs hold, copies included, queued back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start.record()
        for _ in range(10):
            step.executor.start(counts)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return 1000 * statistics.median(times)


WORK = (("real", check_real), ("same", check_same), ("fast", time_model), ("profile", profile_model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--only", nargs="+", default=["tiny", "real", "same", "fast"])
    parser.add_argument("--models", nargs="+", help="of the tiny ones")
    parser.add_argument("--ids", type=Path, help="JSON: the token ids of `real`")
    parser.add_argument("--logits", type=Path, help=".npy: the reference's logits for them")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--kv", choices=["float16", "fp8"], default="float16", help="what the KV cache is of")
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="digests that `tiny` compares with")
    parser.add_argument("--update", action="store_true", help="write `tiny`'s digests there")
    parser.add_argument("--out", type=Path, default=Path("gpu_model.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    if "tiny" in session.args.only:
        session.guarded("tiny", lambda: check_tiny(session))
    for path in session.args.files:
        for name, work in WORK:
            if name in session.args.only:
                session.guarded(f"{name} {path.name}", lambda work=work, path=path: work(session, path))
                torch.cuda.empty_cache()
    if "fast" in session.args.only:
        session.say(f"device copy: {copy_bandwidth():.0f} GB/s")
    print("\n".join(session.lines))
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
