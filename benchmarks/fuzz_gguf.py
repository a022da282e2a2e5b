"""Feed mutated GGUF files to the reader and count what becomes of them.

    python benchmarks/fuzz_gguf.py --count 200000 --seed 1

Every file must give a model or a LoadError, within one second of processor time, in a process that may use
1 GiB of address space. InsufficientMemory counts as a failure: no file here has more than a few kilobytes. A
model that loads is used: every key through every getter, every tensor's first and last byte. Exits 1 if
anything failed. `--only INDEX` runs one case again and says what it is; `--self-check` proves that failures
are noticed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would eat the address space
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gguf"))

from gguf_mutations import Case, Mutator

from worker_orcd.errors import InsufficientMemory, InvalidModelFile, LoadError
from worker_orcd.gguf.kind import quant_kind, type_shares
from worker_orcd.gguf.reader import GGUFFile

CPU_SECONDS = 1.0  # a file may take
STALL_SECONDS = 30.0  # after which a process that makes no progress is killed
CHUNK = 20_000  # files a process

Opener = Callable[[Path], str]


class Hang(BaseException):
    """Raised by the timer; no `except Exception` may swallow it."""


@dataclass
class Tally:
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])
    crashes: int = 0
    hangs: int = 0
    slowest_ms: float = 0.0  # processor time
    peak_rss_mib: float = 0.0

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.outcomes += other.outcomes
        self.failures += other.failures
        self.crashes += other.crashes
        self.hangs += other.hangs
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.peak_rss_mib = max(self.peak_rss_mib, other.peak_rss_mib)


def open_and_use(path: Path) -> str:
    """Load a file and touch all of it. Returns "valid" or the name of the LoadError."""
    try:
        file = GGUFFile(path)
    except InsufficientMemory:
        raise
    except LoadError as error:
        return type(error).__name__
    with file:
        metadata = file.metadata
        getters: tuple[Callable[[str], object], ...] = (
            metadata.integer,
            metadata.boolean,
            metadata.string,
            metadata.strings,
            metadata.integers,
            metadata.numbers,
            lambda key: metadata.number(key, low=-1e300, high=1e300),
        )
        for key in metadata:
            for getter in getters:
                try:
                    getter(key)
                except InvalidModelFile:
                    continue
        for name, tensor in file.tensors.items():
            data = file.data(name)
            if len(data) != tensor.nbytes or file.rows(name).size != len(data):
                raise AssertionError(f"tensor {name!r} has {len(data)} bytes, not {tensor.nbytes}")
            _ = int(data[0]) + int(data[-1])
        quant_kind(file)
        type_shares(file)
    return "valid"


def on_timer(signum: int, frame: FrameType | None) -> None:
    raise Hang


def run_case(case: Case, directory: Path, opener: Opener, tally: Tally) -> None:
    for name, data in case.files.items():
        (directory / name).write_bytes(data)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        outcome = opener(directory / case.opened)
    except Hang:
        outcome = "hang"
        tally.hangs += 1
    except Exception as error:  # whatever it is, it is a finding
        outcome = f"unexpected {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    tally.slowest_ms = max(tally.slowest_ms, 1e3 * (time.process_time() - started))
    tally.tried += 1
    tally.outcomes[outcome] += 1
    if outcome == "hang" or outcome.startswith("unexpected"):
        tally.failures.append(f"{outcome}: {case.description}")


def work(
    start: int, stop: int, mutator: Mutator, opener: Opener, at: Synchronized[int], pipe: Connection
) -> None:
    """The child: cases start … stop - 1, in a bounded address space."""
    signal.signal(signal.SIGPROF, on_timer)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tally = Tally()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        for index in range(start, stop):
            at.value = index
            run_case(mutator.case(index), Path(name), opener, tally)
    tally.peak_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send(tally)


def run_chunk(start: int, stop: int, mutator: Mutator, opener: Opener) -> Tally:
    """Cases start … stop - 1 in a process of their own; one that kills it is counted and left out."""
    if start >= stop:
        return Tally()
    context = multiprocessing.get_context("fork")
    at = context.Value("q", start)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(start, stop, mutator, opener, at, send))
    child.start()
    send.close()
    seen = -1
    while not receive.poll(STALL_SECONDS) and at.value != seen:
        seen = at.value
    try:
        tally: Tally = receive.recv() if receive.poll() else Tally()
    except EOFError:  # the child died
        tally = Tally()
    if not tally.tried:
        child.kill()
    child.join()
    if tally.tried:
        return tally
    index = at.value
    how = "crash" if child.exitcode != -signal.SIGKILL else "stall"
    tally = Tally(tried=1, outcomes=Counter({how: 1}), crashes=how == "crash", hangs=how == "stall")
    tally.failures.append(f"{how} ({child.exitcode}) at index {index}: {mutator.case(index).description}")
    tally.add(run_chunk(start, index, mutator, opener))
    tally.add(run_chunk(index + 1, stop, mutator, opener))
    return tally


def fuzz(count: int, seed: int, opener: Opener = open_and_use, *, progress: bool = False) -> Tally:
    with tempfile.TemporaryDirectory() as name:
        mutator = Mutator(seed, Path(name))
    tally = Tally()
    for start in range(0, count, CHUNK):
        tally.add(run_chunk(start, min(start + CHUNK, count), mutator, opener))
        if progress:
            print(
                f"{tally.tried} of {count}: {dict(tally.outcomes.most_common())}", file=sys.stderr, flush=True
            )
    return tally


def self_check() -> None:
    """Readers that fail in each way, on one file in a hundred: every failure must be counted."""

    def faulty(fault: Callable[[], object]) -> Opener:
        calls = [0]

        def opener(path: Path) -> str:
            calls[0] += 1
            if calls[0] == 50:
                fault()
            return open_and_use(path)

        return opener

    def spin() -> None:
        while True:
            pass

    faults: dict[str, Callable[[], object]] = {
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": spin,
        "unexpected MemoryError": lambda: bytearray(2 << 30),
        "unexpected IndexError": lambda: [][0],
    }
    for outcome, fault in faults.items():
        tally = fuzz(60, 0, faulty(fault))
        if not tally.outcomes[outcome] or not tally.failures or tally.tried != 60:
            raise SystemExit(f"self-check: {outcome} went unnoticed: {tally}")
    print("self-check: crash, hang, memory and error were each noticed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed mutated GGUF files to the reader.")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="INDEX", help="run one case again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--self-check", action="store_true")
    options = parser.parse_args()
    if options.self_check:
        self_check()
        return
    if options.only is not None:
        with tempfile.TemporaryDirectory() as name:
            case = Mutator(options.seed, Path(name)).case(options.only)
            print(case.description)
            for part, data in case.files.items():
                (Path(name) / part).write_bytes(data)
            print(open_and_use(Path(name) / case.opened))
        return
    started = time.monotonic()
    tally = fuzz(options.count, options.seed, progress=not options.json)
    result = {
        "tried": tally.tried,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        "crashes": tally.crashes,
        "hangs": tally.hangs,
        "unexpected": len(tally.failures) - tally.crashes - tally.hangs,
        "outcomes": dict(tally.outcomes.most_common()),
        "slowest_ms_cpu": round(tally.slowest_ms, 1),
        "peak_rss_mib": round(tally.peak_rss_mib),
    }
    for failure in tally.failures[:20]:
        print(failure, file=sys.stderr)
    print(
        json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items())
    )
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
