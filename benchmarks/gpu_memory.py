"""
A GPU's memory under a model: where it lies, whether it is what was planned, what happens when it runs out.

    python benchmarks/gpu_memory.py FILE…
    python benchmarks/gpu_memory.py FILE --only residency plan
    python benchmarks/gpu_memory.py FILE --device cpu               # what a machine without a GPU can do

Needs torch, NumPy, psutil and, with a GPU, triton; NVML (nvidia-ml-py) where it is there; no network.
`residency`: the driver is asked about every weight and KV pointer; then memory of the host and managed memory
are planted among them and must be found. `plan`: the plan beside what allocator and driver say. `closed`:
requests of random shapes change nothing by a byte, and whoever wants more memory gets an error while the next
request works. `neighbour`: another process takes nearly all that is left while requests run. `oom`: a KV pool
of 40 blocks and 200 requests: each ends whole, with the bits it has alone, or with a structured error.
`release`: the model is given up, the device is free but for the process's context, and the model loaded again
gives the same answers. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine_client import GREEDY, Answer, Model, RunningEngine, load, random_prompt
from gpu_engine import memory_now, send_random, settled
from gpu_engine_same import Compared, Request, answers_alone, make_requests, send
from gpu_report import Session
from worker_orcd.config import EngineConfig
from worker_orcd.kernels.memory import DeviceMemory, Region
from worker_orcd.nvml import GpuSample, NvmlUnavailable, open_nvml
from worker_orcd.runner.residency import DriverProbe, check
from worker_orcd.sequence import FinishReason

ENGINE = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512)
LONGEST = 1024  # tokens of a sequence
SMALL = 64 << 10  # bytes that a rehearsal may miss: norms and tables that are no weight's
POOL_BLOCKS = 40  # of `oom`
OUTPUT = 24  # tokens of a request that is compared
SUBJECTS = 16
PLANTED = 1 << 20  # bytes
WANTED = 64 << 20  # that `closed` asks for in vain
LEFT_BY_NEIGHBOUR = 256 << 20
NEIGHBOUR_SECONDS = 120.0  # for it to take its memory
NEIGHBOUR = """
import sys, torch
device, left = int(sys.argv[1]), int(sys.argv[2])
torch.zeros(1, device=f"cuda:{device}")
free, _ = torch.cuda.mem_get_info(device)
held = torch.empty(max(1, free - left), dtype=torch.uint8, device=f"cuda:{device}")
print(held.nbytes, flush=True)
sys.stdin.read()
"""
STRUCTURED = {"VRAM_OOM", "INVALID_REQUEST"}  # codes that a request may end with when memory is short


def memory_of(model: Model) -> DeviceMemory:
    return model.backend.memory


def needs_gpu(session: Session, model: Model, what: str) -> bool:
    """Whether there is none, which is said."""
    if memory_of(model).counts:
        return False
    session.say(f"{model.path.name}: {what} needs a GPU")
    return True


# -- residency -----------------------------------------------------------------------------------------------


def check_residency(session: Session, model: Model) -> None:
    if needs_gpu(session, model, "residency"):
        return
    name, memory = model.path.name, memory_of(model)
    probe, index = DriverProbe(memory.facts), memory.facts.index or 0
    regions = list(memory.regions())
    started = time.perf_counter()
    found = check(regions, probe, index)
    seconds = time.perf_counter() - started
    uses = Counter(region.use for region in regions)
    told = ", ".join(f"{count} of {use}" for use, count in uses.items())
    session.keep(f"residency {name}", {"regions": len(regions), "ms": 1000 * seconds, "found": len(found)})
    session.say(
        f"{name}: {told}: {len(found)} are not in the GPU's memory; {1000 * seconds:.2f} ms",
        ok=not found and uses["weights"] > 0 and uses["KV cache"] == len(model.config.layers),
    )
    pinned = torch.empty(PLANTED, dtype=torch.uint8, pin_memory=True)
    plain = torch.empty(PLANTED, dtype=torch.uint8)
    with managed_memory(PLANTED) as managed:
        planted = {
            "pinned host memory": pinned.data_ptr(),
            "host memory": plain.data_ptr(),
            "managed memory": managed,
        }
        for what, address in planted.items():
            middle = len(regions) // 2
            among = [*regions[:middle], Region("KV cache", address, PLANTED), *regions[middle:]]
            violations = check(among, probe, index)
            session.say(
                f"{name}: {what} among them: {'; '.join(one.sentence for one in violations) or 'not found'}",
                ok=[one.region.address for one in violations] == [address],
            )


@contextlib.contextmanager
def managed_memory(num_bytes: int) -> Iterator[int]:
    """The address of memory that the driver moves between host and device."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.cuda.current_stream().synchronize()  # the context is this thread's
    address = ctypes.c_uint64()
    driver.cuMemAllocManaged.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    attach_global = 1
    if (result := driver.cuMemAllocManaged(ctypes.addressof(address), num_bytes, attach_global)) != 0:
        raise RuntimeError(f"cuMemAllocManaged: error {result}")
    try:
        yield address.value
    finally:
        driver.cuMemFree_v2.argtypes = [ctypes.c_uint64]
        driver.cuMemFree_v2(address.value)


# -- the plan ------------------------------------------------------------------------------------------------


def check_plan(session: Session, model: Model) -> None:
    name, plan, held = model.path.name, model.plan, model.held
    for row in plan.rows():
        session.say(f"{name}: planned {row.what:22} {row.num_bytes:>16,}  {row.flag:32} {row.remark}")
    if held is None:
        session.say(f"{name}: what is held needs a GPU")
        return
    session.keep(f"plan {name}", {"plan": plan.total_bytes, "held": asdict(held), "measured": plan.measured})
    for what, num_bytes in asdict(held).items():
        session.say(f"{name}: held    {what:22} {num_bytes:>16,}")
    driver = session.results[f"before {name}"] - torch.cuda.mem_get_info()[0]
    session.say(
        f"{name}: held {held.total_bytes:,} bytes, the driver misses {driver:,}",
        ok=held.total_bytes == driver,
    )
    workspace = plan.workspace_bytes + plan.sampler_bytes
    over = held.workspace_bytes - workspace
    session.say(
        f"{name}: buffers and sampler: {workspace:,} rehearsed, {held.workspace_bytes:,} taken ({over:+,})",
        ok=abs(over) <= SMALL,
    )
    session.say(
        f"{name}: KV cache: {plan.kv_cache_bytes:,} planned, {held.kv_cache_bytes:,} taken",
        ok=plan.kv_cache_bytes == held.kv_cache_bytes,
    )
    session.say(
        f"{name}: graphs and code: {held.driver_bytes:,} taken, at most {plan.graphs_bytes:,} planned",
        ok=held.driver_bytes <= plan.graphs_bytes,
    )
    session.say(
        f"{name}: {held.total_bytes:,} taken of {plan.usable_bytes:,} that may be used",
        ok=held.total_bytes <= plan.usable_bytes,
    )
    session.say(f"{name}: NVML: {nvml_words(model)}")


def nvml_words(model: Model) -> str:
    try:
        sample = open_nvml().gpu(model.backend.memory.facts.uuid or "").sample()
    except NvmlUnavailable as error:
        return f"not available: {error}"
    return words_of(sample)


def words_of(sample: GpuSample) -> str:
    told = {key: value for key, value in asdict(sample).items() if key not in ("processes", "xids")}
    processes = "not shown" if sample.processes is None else f"{len(sample.processes)} processes"
    return f"{processes}, {', '.join(f'{key} {value}' for key, value in told.items())}"


# -- closed --------------------------------------------------------------------------------------------------


def check_closed(session: Session, model: Model) -> None:
    """After a first wave, so that a CPU's kernels have all their threads' memory."""
    name, device, counts = model.path.name, session.args.device, memory_of(model).counts
    generator = random.Random("closed")
    ready: dict[str, int] = {}
    for wave in range(3):
        with RunningEngine(model) as engine:
            numbers = [send_random(model, engine, generator) for _ in range(session.args.requests // 3)]
            ends = Counter(engine.end_of(number).finish_reason for number in numbers)
            left = settled(engine)
        now = memory_now(device)
        ready = ready or now
        moved = {key: now[key] - ready[key] for key in now}
        told = ", ".join(f"{key} {value:+d} bytes" for key, value in moved.items())
        session.say(
            f"{name}: wave {wave}: {told}; {dict(ends)}",
            ok=not left and FinishReason.ERROR not in ends and (not counts or not any(moved.values())),
        )
    if not counts:
        session.say(f"{name}: whether memory is closed needs a GPU")
        return
    wanted, free = torch.Size((WANTED,)), torch.cuda.mem_get_info()[0]
    try:
        torch.empty(wanted, dtype=torch.uint8, device="cuda")
        refused = False
    except torch.cuda.OutOfMemoryError:
        refused = True
    session.say(
        f"{name}: {WANTED:,} bytes more, of {free:,} free: {'refused' if refused else 'given'}",
        ok=refused and free > 2 * WANTED,
    )
    with RunningEngine(model) as engine:
        answer = engine.answer(engine.send([5], GREEDY, max_tokens=4))
    session.say(f"{name}: and the next request gets {len(answer.tokens)} tokens", ok=len(answer.tokens) == 4)


# -- a neighbour ---------------------------------------------------------------------------------------------


def check_neighbour(session: Session, model: Model) -> None:
    if needs_gpu(session, model, "a neighbour"):
        return
    name, index = model.path.name, memory_of(model).facts.index or 0
    requests = make_requests(model, SUBJECTS, 200, OUTPUT, "neighbour")
    alone = answers_alone(model, requests)
    before = processes_on(model)
    line = [sys.executable, "-c", NEIGHBOUR, str(index), str(LEFT_BY_NEIGHBOUR)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            took, compared = run_until(session, model, requests, alone, process)
            free = torch.cuda.mem_get_info()[0]
            seen = processes_on(model)
            new = None if before is None or seen is None else len(seen - before)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(60)
    session.keep(f"neighbour {name}", {"took": took, "free": free, **asdict(compared)})
    session.say(
        f"{name}: a neighbour took {took:,} bytes and left {free:,}: {compared.differing} of {compared.rows}"
        f" rows differ; new processes that NVML shows: {'none are shown' if new is None else new}",
        ok=took > 0 and compared.rows > 0 and not compared.differing,
    )


def run_until(
    session: Session,
    model: Model,
    requests: list[Request],
    alone: list[Answer],
    process: subprocess.Popen[str],
) -> tuple[int, Compared]:
    """Waves of requests until the neighbour has its memory, and two more. What it took; how they compare."""
    compared, took, more = Compared(), 0, 2
    until = time.monotonic() + NEIGHBOUR_SECONDS
    told: list[str] = []
    reader = threading_reader(process, told)
    while more and time.monotonic() < until:
        with RunningEngine(model) as engine:
            numbers = [send(engine, request) for request in requests]
            for number, wanted in zip(numbers, alone, strict=True):
                compared.add(wanted.tokens, engine.end_of(number).tokens)
        if told and not took:
            took = int(told[0] or 0)
        more -= bool(told)
    reader.join(1.0)
    if not took:
        session.say("the neighbour took nothing", ok=False)
    return took, compared


def threading_reader(process: subprocess.Popen[str], told: list[str]) -> threading.Thread:
    def read() -> None:
        if process.stdout is not None:
            told.append(process.stdout.readline().strip())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def processes_on(model: Model) -> set[int] | None:
    try:
        sample = open_nvml().gpu(model.backend.memory.facts.uuid or "").sample()
    except NvmlUnavailable:
        return None
    return None if sample.processes is None else {process.pid for process in sample.processes}


# -- out of blocks -------------------------------------------------------------------------------------------


def check_oom(session: Session, model: Model) -> None:
    """Requests that fit the pool one by one, many at a time, among some that never will."""
    name, count = model.path.name, session.args.jobs
    size = model.engine.block_size
    longest = min(POOL_BLOCKS * size - OUTPUT - 1, model.max_len - OUTPUT - 1, 200)
    subjects = make_requests(model, SUBJECTS, longest, OUTPUT, "oom")
    alone = answers_alone(model, subjects)
    blocks = [POOL_BLOCKS] * len(model.plan.kv_groups)
    too_long = random_prompt(model, min(POOL_BLOCKS * size + 1, model.max_len - 2), "never")
    engine_config = replace(model.engine, max_num_seqs=model.engine.max_num_seqs)
    compared, ends = Compared(), Counter[str]()
    with RunningEngine(model, engine=engine_config, blocks=blocks) as engine:
        jobs = [(number % SUBJECTS, number % 20 == 19) for number in range(count)]
        numbers = [
            engine.send(too_long, GREEDY, max_tokens=2)
            if never
            else send(engine, subjects[subject], salt=str(turn).encode())
            for turn, (subject, never) in enumerate(jobs)
        ]
        for (subject, never), number in zip(jobs, numbers, strict=True):
            end = engine.end_of(number)
            ends[end.error_code or str(end.finish_reason and end.finish_reason.value)] += 1
            if end.finish_reason is FinishReason.LENGTH and not never:
                compared.add(alone[subject].tokens, end.tokens)
        left = settled(engine)
    preempted = sum(step.num_preempted for step in engine.steps)
    strange = set(ends) - STRUCTURED - {FinishReason.LENGTH.value}
    session.keep(f"oom {name}", {"ends": dict(ends), "preempted": preempted, **asdict(compared)})
    session.say(
        f"{name}: {count} requests on {POOL_BLOCKS} blocks: {dict(ends)}, {preempted} preemptions;"
        f" {compared.differing} of {compared.rows} rows differ" + "".join(f", left: {one}" for one in left),
        ok=not strange
        and not left
        and preempted > 0
        and not compared.differing
        and compared.rows == OUTPUT * sum(not never for _, never in jobs),
    )


# -- giving it back ------------------------------------------------------------------------------------------


def check_release(session: Session, model: Model) -> Model:
    """The model that is loaded afterwards; the first is given up."""
    name, memory = model.path.name, memory_of(model)
    requests = make_requests(model, 4, 100, OUTPUT, "release")
    wanted = [answer.tokens for answer in answers_alone(model, requests)]
    path = model.path
    model.backend.close()
    for field in ("runner", "backend", "config"):
        object.__setattr__(model, field, None)
    gc.unfreeze()
    gc.collect()
    left = memory.release()
    if left is not None:
        free, before = torch.cuda.mem_get_info()[0], session.results[f"before {name}"]
        session.say(
            f"{name}: given up: {left:,} bytes are still allocated; of {before:,} that were free"
            f" {free:,} are, {before - free:,} fewer (graphs and code that the driver keeps)",
            ok=left == 0,
        )
    again = load(path, session.args.device, ENGINE, LONGEST)
    compared = Compared()
    for one, other in zip(wanted, answers_alone(again, requests), strict=True):
        compared.add(one, other.tokens)
    session.say(
        f"{name}: loaded again in {again.seconds:.1f} s: {compared.differing} of {compared.rows} rows differ",
        ok=compared.rows > 0 and not compared.differing,
    )
    return again


# -- all of it -----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Session, Model], object]] = {
    "plan": check_plan,
    "residency": check_residency,
    "closed": check_closed,
    "neighbour": check_neighbour,
    "oom": check_oom,
    "release": check_release,
}


def run_file(session: Session, path: Path) -> None:
    if session.args.device == "cuda":
        torch.cuda.init()
        session.results[f"before {path.name}"] = torch.cuda.mem_get_info()[0]
    model = load(path, session.args.device, ENGINE, LONGEST)
    session.say(f"{path.name}: {model.backend.description}, ready in {model.seconds:.1f} s")
    for name, work in PARTS.items():
        if name in session.args.only:
            session.guarded(f"{path.name}: {name}", lambda work=work: work(session, model))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--requests", type=int, default=300, help="of `closed`")
    parser.add_argument("--jobs", type=int, default=200, help="of `oom`")
    parser.add_argument("--out", type=Path, default=Path("gpu_memory.json"))
    parser.add_argument("--commit", help="default: ask git")
    return parser.parse_args(given)


def main() -> None:
    session = Session(arguments())
    session.say(str(session.results["stamp"]))
    for path in session.args.files:
        session.guarded(path.name, lambda path=path: run_file(session, path))
        gc.unfreeze()
        gc.collect()
        if session.args.device == "cuda":
            torch.cuda.empty_cache()
    print("\n" + "\n".join(session.lines))
    print(f"{session.failed} failures; {session.args.out}")
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
