"""
The engine on a GPU, as a worker runs it but without HTTP: how fast a crowd is served, whether a request gets
the same bits whatever happens around it, and whether memory stays as it is.

    python benchmarks/gpu_engine.py FILE…                             # all three
    python benchmarks/gpu_engine.py FILE --only crowd --sizes 64 256
    python benchmarks/gpu_engine.py FILE --only same memory --device cpu

Needs torch, NumPy, psutil and, with a GPU, triton; no network. `crowd`: requests of 128 tokens in and 128
out, greedy, sent at the same moment, and the time to the first token of a prompt alone; beside what others
do on the same kind of card. It tells how many steps were launched while one was under way, and how many were
in the device's queue before that one was done, so that it did not wait for the host. `same`: tokens and log
probabilities of requests alone, compared bit for bit with the same one step at a time, among random others,
in chunks, after preemption, and behind a cached prefix of every length.
`memory`: a thousand requests of random shapes, after which the device's memory is what it was before.
Results go to a JSON file as they come; the lines are printed again last. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from engine_client import GREEDY, Model, QueueWatch, RunningEngine, load, random_prompt
from gpu_engine_same import check_same
from gpu_peers import SOURCE, Peers, peers_of
from gpu_report import Session
from worker_orcd.config import EngineConfig
from worker_orcd.sequence import FinishReason, SamplingParams

ENGINE = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048)
LONGEST = 1024  # tokens of a sequence
FIRST_TOKEN_PROMPT = 512
REPEATS = 3


# -- a crowd -------------------------------------------------------------------------------------------------


def serve_crowd(session: Session, model: Model) -> None:
    peers, name = peers_of(model.config), model.path.name
    session.say(f"{name}: ratios to {SOURCE}" if peers else f"{name}: no figures of others")
    time_first_token(session, model, peers)
    args = session.args
    for size in args.sizes:
        if size > ENGINE.max_num_seqs or size * (args.prompt + args.output) > model.plan.kv_cache_tokens:
            session.say(f"{name}: {size} requests do not fit: seats or KV cache")
            continue
        run_crowd(model, size, args.prompt, 8, "warm")  # graphs are captured, pages are touched
        runs = [run_crowd(model, size, args.prompt, args.output, str(n)) for n in range(REPEATS)]
        found = sorted(runs, key=lambda run: run["seconds"])[REPEATS // 2]
        found |= ratios(found, size, peers)
        session.keep(f"crowd {name} {size}", found)
        beside = ", ".join(f"{found[key]:.2f} x {key}" for key in PEER_KEYS if key in found)
        session.say(
            f"{name}: {size:4} requests: {found['output_rate']:8.0f} tok/s in all, decode"
            f" {found['decode_rate']:8.0f} ({1000 * found['round_seconds']:.2f} ms a round,"
            f" {found['rounds']:.0f} a step), first token after {found['first_token_ms']:.0f} ms;"
            f" {found['ahead']:.0%} of steps launched ahead,"
            f" {found['queued']:.0%} queued before the device was done{': ' if beside else ''}{beside}"
        )


PEER_KEYS = ("llama.cpp decode", "vLLM decode", "vLLM in all")


def ratios(found: dict[str, Any], size: int, peers: Peers | None) -> dict[str, float]:
    if peers is None:
        return {}
    tables = (
        (peers.llama_cpp, "decode_rate"),
        (peers.vllm, "decode_rate"),
        (peers.whole, "output_rate"),
    )
    return {
        key: found[rate] / table[size]
        for key, (table, rate) in zip(PEER_KEYS, tables, strict=True)
        if size in table
    }


def run_crowd(model: Model, size: int, length: int, output: int, seed: str) -> dict[str, Any]:
    """Requests sent at the same moment. Rates in tokens a second over all of them."""
    prompts = [random_prompt(model, length, f"{size} {seed} {number}") for number in range(size)]
    watch = QueueWatch(model.runner)
    with RunningEngine(model, runner=watch) as engine:
        sent = time.perf_counter()
        numbers = [engine.send(ids, GREEDY, max_tokens=output) for ids in prompts]
        answers = [engine.answer(number) for number in numbers]
    seconds = max(answer.times[-1] for answer in answers) - sent
    decode = [step for step in engine.steps if step.num_prompt_tokens == 0 and step.num_sampled]
    spent = sum(step.seconds for step in decode)
    return {
        "seconds": seconds,
        "output_rate": size * output / seconds,
        "decode_rate": sum(step.num_sampled for step in decode) / spent if decode else 0.0,
        "round_seconds": statistics.median([s.seconds / s.num_rounds for s in decode]) if decode else 0.0,
        "rounds": statistics.median([step.num_rounds for step in decode]) if decode else 0,
        "first_token_ms": 1000 * statistics.median([answer.times[0] - sent for answer in answers]),
        "preempted": sum(step.num_preempted for step in engine.steps),
        "ahead": sum(step.ahead for step in engine.steps) / len(engine.steps),
        "queued": watch.num_queued / watch.num_steps,
    }


def time_first_token(session: Session, model: Model, peers: Peers | None) -> None:
    """Of one prompt on an idle engine, sampling and the engine's thread included."""
    length = min(FIRST_TOKEN_PROMPT, model.max_len - 2)
    times: list[float] = []
    with RunningEngine(model) as engine:
        for repeat in range(-1, 2 * REPEATS):
            number = engine.send(random_prompt(model, length, f"first {repeat}"), GREEDY, max_tokens=2)
            answer = engine.answer(number)
            if repeat >= 0:
                times.append(answer.times[0] - answer.sent)
    seconds = statistics.median(times)
    rate, name = length / seconds, model.path.name
    found = {"tokens": length, "ms": 1000 * seconds, "rate": rate}
    if peers is not None:
        found["best peer"] = rate / peers.prompt
    session.keep(f"first token {name}", found)
    beside = f", {found['best peer']:.2f} x the best peer's" if peers is not None else ""
    session.say(
        f"{name}: first token of {length} after {1000 * seconds:.2f} ms = {rate:.0f} tok/s{beside};"
        f" ready in {model.seconds:.1f} s"
    )


# -- memory --------------------------------------------------------------------------------------------------


def memory_now(device: str) -> dict[str, int]:
    """Bytes that the process holds; on a GPU also what the driver has given out to all."""
    gc.collect()
    if device == "cpu":
        return {"resident": psutil.Process().memory_info().rss}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "in use": total - free,
    }


def check_memory(session: Session, model: Model, ready: dict[str, int]) -> None:
    """A CPU's resident memory is shown and may change; a GPU's may not, by a byte."""
    name, count, device = model.path.name, session.args.requests, session.args.device
    session.say(f"{name}: ready with {in_mb(ready)}")
    generator = random.Random("memory")
    ends: dict[FinishReason | None, int] = {}
    waves, preempted = 4, 0
    for wave in range(waves):
        with RunningEngine(model) as engine:
            numbers = [send_random(model, engine, generator) for _ in range(count // waves)]
            for number in numbers:
                reason = engine.answer(number).finish_reason
                ends[reason] = ends.get(reason, 0) + 1
            left = settled(engine)
        preempted += sum(step.num_preempted for step in engine.steps)
        now = memory_now(device)
        moved = {key: now[key] - ready[key] for key in ready}
        session.keep(f"memory {name} {wave}", {"ready": ready, "after": now, "left": left})
        session.say(
            f"{name}: after {(wave + 1) * (count // waves)} requests"
            f" {', '.join(f'{key} {value:+d} bytes' for key, value in moved.items())}"
            + "".join(f", left: {one}" for one in left),
            ok=not left and (device == "cpu" or not any(moved.values())),
        )
    told = ", ".join(f"{number} {reason.value}" for reason, number in ends.items() if reason is not None)
    session.say(f"{name}: {told}; {preempted} preemptions")


def in_mb(sizes: dict[str, int]) -> str:
    return ", ".join(f"{key} {value / 1e6:.1f} MB" for key, value in sizes.items())


def settled(engine: RunningEngine) -> list[str]:
    """What is left when the engine has had a moment to see that nothing is: its counts follow the answers."""
    for _ in range(100):
        if not (left := engine.leftovers()):
            break
        time.sleep(0.01)
    return left


def send_random(model: Model, engine: RunningEngine, generator: random.Random) -> int:
    """A request of random shape; one in ten is cancelled, three in ten begin like others."""
    ids = random_prompt(model, generator.randint(1, model.max_len // 2), str(generator.random()))
    if generator.random() < 0.3:
        begin = random_prompt(model, 100, "shared")[: len(ids) - 1]
        ids[: len(begin)] = begin
    sampling = SamplingParams(
        temperature=generator.choice((0.0, 0.7, 1.0)),
        top_p=generator.choice((1.0, 0.9)),
        top_k=generator.choice((0, 0, 40)),
        presence_penalty=generator.choice((0.0, 0.0, 0.3)),
        seed=generator.getrandbits(64),
        logprobs=generator.choice((None, None, 0, 5)),
    )
    number = engine.send(
        ids, sampling, max_tokens=generator.randint(1, 64), priority=generator.choice((0, 0, 0, 1))
    )
    if generator.random() < 0.1:
        engine.cancel(number)
    return number


# -- all of it -----------------------------------------------------------------------------------------------

PARTS = ("same", "memory", "crowd")


def run_file(session: Session, path: Path) -> None:
    model = load(path, session.args.device, ENGINE, LONGEST)
    ready = memory_now(session.args.device)
    session.say(f"{path.name}: {model.backend.description}, ready in {model.seconds:.1f} s")
    parts: dict[str, Callable[[], None]] = {
        "memory": lambda: check_memory(session, model, ready),
        "same": lambda: check_same(session, model),
        "crowd": lambda: serve_crowd(session, model),
    }
    try:
        for name, work in parts.items():
            if name in session.args.only:
                session.guarded(f"{path.name}: {name}", work)
    finally:
        model.backend.close()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 16, 64, 128, 256], help="of a crowd")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in, of a request in a crowd")
    parser.add_argument("--output", type=int, default=128, help="tokens out, of a request in a crowd")
    parser.add_argument(
        "--watched", type=int, default=48, help="tokens out, of a request that `same` watches"
    )
    parser.add_argument("--subjects", type=int, default=32, help="requests that `same` watches")
    parser.add_argument("--again", type=int, default=2, help="times that `same` asks them all, among others")
    parser.add_argument("--requests", type=int, default=1000, help="of `memory`")
    parser.add_argument("--out", type=Path, default=Path("gpu_engine.json"))
    parser.add_argument("--commit", help="default: ask git")
    return parser.parse_args(given)


def main() -> None:
    session = Session(arguments())
    session.say(str(session.results["stamp"]))
    for path in session.args.files:
        session.guarded(path.name, lambda path=path: run_file(session, path))
        gc.collect()
        if session.args.device == "cuda":
            torch.cuda.empty_cache()
    print("\n" + "\n".join(session.lines))
    print(f"{session.failed} failures; {session.args.out}")
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
