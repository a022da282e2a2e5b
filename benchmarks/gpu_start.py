"""
Where the time goes from the start of a worker's process until it is ready, with all that is kept being warm.

    python benchmarks/gpu_start.py FILE… --runs 5
    python benchmarks/gpu_start.py FILE --bytecode as-is      # as this machine's Python is set up
    python benchmarks/gpu_start.py FILE --device cpu

Starts `worker-orcd serve` once to fill the caches (kernels, bytecode, pages of the file), then `--runs`
times, and prints for each phase when it ended after the process began, how long it took, and how much of a
core its thread took meanwhile: much less means that it waited, for a device, a file, or another thread that
had the interpreter. Phases overlap. Imports are with all that they import in turn. Needs the package's own
requirements; no network.

Without bytecode Python compiles every module that it imports at every start, which takes as long again as
all else: images where PYTHONDONTWRITEBYTECODE is set, or whose packages were installed without compiling
them, start like that. `--bytecode kept` keeps it for all starts in a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import worker_orcd
from gpu_report import Session
from start_probe import SOURCES
from worker_client import START_SECONDS, require

PROBE = Path(__file__).with_name("start_probe.py")
EVENTS = {
    "startup": "listening",
    "model_load_start": "load begins",
    "memory_plan": "memory planned",
    "model_load_complete": "loaded",
    "ready": "ready",
}


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds, of one start. `count`: how often it came; then the first began and the last ended."""

    ended: float
    took: float = 0.0
    cpu: float = 0.0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Start:
    phases: dict[str, Phase]
    modules: int
    sources: int  # of them, without bytecode


def read_start(process_began: float, log: Iterable[str], narrated: Iterable[str]) -> Start:
    """From what `start_probe` wrote and what the worker narrated."""
    phases: dict[str, Phase] = {}
    modules = sources = 0
    for line in log:
        entry: dict[str, Any] = json.loads(line)
        name, began, ended = entry["what"], entry["began"], entry["ended"]
        if name == SOURCES:
            modules, sources = int(ended), int(began)
            continue
        before = phases.get(name, Phase(0.0, count=0))
        took = ended - (process_began if name == "interpreter" else began)
        phases[name] = Phase(
            ended - process_began, before.took + took, before.cpu + entry["cpu"], before.count + 1
        )
    for line in narrated:
        if not line.startswith("{"):
            continue
        event: dict[str, Any] = json.loads(line)
        name = EVENTS.get(event["event"])
        if name is not None:
            at = datetime.fromisoformat(event["timestamp"]).timestamp()
            phases[name] = Phase(at - process_began)
    return Start(phases, modules, sources)


def environment(bytecode: Path | None) -> dict[str, str]:
    """A worker's; `bytecode`: where it is kept."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("WORKER_ORCD_")}
    paths = str(Path(worker_orcd.__file__).parents[1]), found.get("PYTHONPATH")
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if bytecode is not None:
        found["PYTHONPYCACHEPREFIX"] = str(bytecode)
        found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def start(command: Sequence[str], environ: dict[str, str], directory: Path) -> Start:
    """Start a worker, wait until it is ready, stop it."""
    log, narration = directory / "probe.log", directory / "worker.log"
    line = [sys.executable, str(PROBE), str(log), *command]
    with narration.open("w") as out:
        began = time.time()
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ)
        try:
            while '"event": "ready"' not in narration.read_text():
                require(process.poll() is None, f"the worker ended:\n{narration.read_text()}")
                require(time.time() - began < START_SECONDS, f"not ready:\n{narration.read_text()}")
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    require(code == 0, f"the worker ended with {code}:\n{narration.read_text()}")
    return read_start(began, log.read_text().splitlines(), narration.read_text().splitlines())


def table(starts: Sequence[Start]) -> list[str]:
    """Medians, in the order in which phases end."""
    rows: list[tuple[float, str]] = []
    for name in {name: None for one in starts for name in one.phases}:
        found = [one.phases[name] for one in starts if name in one.phases]
        ended, took, cpu = (
            statistics.median(getattr(one, of) for one in found) for of in ("ended", "took", "cpu")
        )
        ends = [one.ended for one in found]
        count = max(one.count for one in found)
        label = name if count == 1 else f"{name}, {count} times"
        rest = f"{took:8.2f} {cpu:8.2f}" if took else " " * 17
        rows.append((ended, f"  {label:32} {ended:8.2f} {rest}   ({min(ends):.2f} to {max(ends):.2f})"))
    head = f"  {'seconds':32} {'ended at':>8} {'took':>8} {'of a core':>9}"
    return [head, *(line for _ended, line in sorted(rows))]


def measure(session: Session, path: Path) -> None:
    args = session.args
    command = ["serve", str(path), "--device", args.device, "--host", "127.0.0.1", "--port", "0"]
    command += ["--narration", "json", *args.options.split()]
    with tempfile.TemporaryDirectory() as name:
        environ = environment(Path(name, "bytecode") if args.bytecode == "kept" else None)
        first = start(command, environ, Path(name))
        session.say(f"{path.name}: ready after {first.phases['ready'].ended:.2f} s, the first time")
        starts = [start(command, environ, Path(name)) for _ in range(args.runs)]
    for line in table(starts):
        session.say(line)
    ready = sorted(one.phases["ready"].ended for one in starts)
    last = starts[-1]
    session.keep(
        f"start {path.name}",
        [{name: [p.ended, p.took, p.cpu, p.count] for name, p in one.phases.items()} for one in starts],
    )
    session.say(
        f"{path.name}: ready after {statistics.median(ready):.2f} s ({ready[0]:.2f} to {ready[-1]:.2f},"
        f" {len(ready)} starts); {last.modules} modules, {last.sources} of them without bytecode",
        ok=args.limit is None or statistics.median(ready) < args.limit,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bytecode", choices=["kept", "as-is"], default="kept")
    parser.add_argument("--limit", type=float, help="fail unless ready within so many seconds")
    parser.add_argument("--options", default="--max-num-seqs 256 --max-model-len 1024", help="of serve")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_start.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    for path in session.args.files:
        session.guarded(path.name, lambda path=path: measure(session, path))
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
