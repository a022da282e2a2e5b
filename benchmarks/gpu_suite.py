"""
All GPU scripts, one after the other: `check` for what must be right, `bench` for how fast it is.

    python benchmarks/gpu_suite.py check                             # small made-up models
    python benchmarks/gpu_suite.py check FILE… --parts model engine
    python benchmarks/gpu_suite.py bench FILE… --out DIRECTORY

Needs what the scripts need, and no network. A script is a process of its own; one that fails or takes longer
than `--limit` does not keep the others from running. Their results are put together in one JSON file in the
output directory ($OUT where that is set), after each of them; a table is printed last. Ends with 1 if
something failed, with 2 if there is no GPU. Where no file is named small models are made, whose times say
nothing about real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
TINY = {
    "check": (("llama", "Q4_K_M"), ("gemma3", "Q4_0"), ("gpt-oss", "MXFP4")),
    "bench": (("llama", "Q4_K_M"),),
}
TAIL_LINES = 60  # that are kept of what a script printed


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a script, which takes --out and --commit. `files`: it is given the models' files."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    files: bool = False
    any_device: bool = False  # it takes --device


PARTS = {
    "check": (
        Part("linear", "gpu_linear.py", ("--only", "correct", "same", "--seconds", "380")),
        Part("operations", "gpu_operations.py", ("--only", "correct", "same")),
        Part("gated", "gpu_gated.py", ("--only", "correct", "same")),
        Part("wide", "gpu_wide.py", ("--only", "same")),
        Part("attention", "gpu_attention.py", ("--only", "correct", "same")),
        Part("experts", "gpu_experts.py", ("--only", "correct", "same")),
        Part("sampling", "gpu_sampling.py", ("--only", "correct", "same")),
        Part("tiny", "gpu_model.py", ("--only", "tiny")),
        Part("tiny fp8", "gpu_model.py", ("--only", "tiny", "--kv", "fp8")),
        Part("model", "gpu_model.py", ("--only", "same"), files=True),
        Part("engine", "gpu_engine.py", ("--only", "same", "memory"), files=True, any_device=True),
        Part("memory", "gpu_memory.py", files=True, any_device=True),
    ),
    "bench": (
        Part("linear", "gpu_linear.py", ("--only", "speed", "--seconds", "380")),
        Part("operations", "gpu_operations.py", ("--only", "fast")),
        Part("contract", "gpu_contract.py"),
        Part("gated", "gpu_gated.py", ("--only", "fast")),
        Part("wide", "gpu_wide.py", ("--only", "fast")),
        Part("attention", "gpu_attention.py", ("--only", "fast")),
        Part("experts", "gpu_experts.py", ("--only", "fast")),
        Part("sampling", "gpu_sampling.py", ("--only", "fast")),
        Part("model", "gpu_model.py", ("--only", "fast"), files=True),
        Part("engine", "gpu_engine.py", ("--only", "crowd"), files=True, any_device=True),
    ),
}


@dataclass(slots=True)
class Ran:
    """How a part went."""

    part: str
    code: int | None = None  # None: it was stopped at its limit
    seconds: float = 0.0
    results: Any = None  # the JSON that it wrote
    printed: list[str] = field(default_factory=list[str])  # its last lines

    @property
    def ok(self) -> bool:
        return self.code == 0

    def verdict(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return "ok" if self.ok else f"failed ({self.code})"


def command(part: Part, args: argparse.Namespace, files: Sequence[Path], out: Path) -> list[str]:
    line = [sys.executable, str(HERE / part.script), *(map(str, files) if part.files else ())]
    line += [*part.options, "--out", str(out)]
    if args.commit is not None:
        line += ["--commit", args.commit]
    if part.any_device:
        line += ["--device", args.device]
    if part.script == "gpu_engine.py":
        line += args.engine_options.split()
    return line


def run(part: Part, line: list[str], out: Path, limit: float) -> Ran:
    """In a process group of its own, so that what it started ends with it."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    ran, started = Ran(part.name), time.monotonic()
    out.unlink(missing_ok=True)
    late = threading.Event()
    with subprocess.Popen(
        line,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:

        def stop() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):  # it has ended this moment
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        for text in process.stdout or ():
            print(text, end="", flush=True)
            ran.printed = [*ran.printed[1 - TAIL_LINES :], text.rstrip("\n")]
        code = process.wait()
        timer.cancel()
    ran.code, ran.seconds = None if late.is_set() else code, time.monotonic() - started
    try:
        ran.results = json.loads(out.read_text()) if out.exists() else None
    except ValueError:  # it was stopped while it wrote
        ran.printed.append(f"{out.name} is not whole")
    return ran


def merge(path: Path, mode: str, all_ran: Sequence[Ran]) -> None:
    """One file of everything so far."""
    stamps = [ran.results["stamp"] for ran in all_ran if ran.results and "stamp" in ran.results]
    parts = {
        ran.part: {
            "verdict": ran.verdict(),
            "seconds": round(ran.seconds, 1),
            "results": ran.results,
            "printed": ran.printed if ran.results is None or not ran.ok else [],
        }
        for ran in all_ran
    }
    whole = {"mode": mode, "stamp": stamps[0] if stamps else None, "parts": parts}
    path.write_text(json.dumps(whole, indent=1))


def make_models(mode: str, directory: Path) -> list[Path]:
    """Small files of random weights, as `worker-orcd synth` writes them."""
    sys.path.insert(0, str(SOURCE))
    from worker_orcd.synth import shape_named, write_model

    made: list[Path] = []
    for architecture, mixture in TINY[mode]:
        shape = shape_named(architecture, "tiny")
        if shape is None:
            raise LookupError(f"synth has no tiny {architecture}")
        made.append(directory / f"tiny-{architecture}.gguf")
        write_model(made[-1], shape, f"tiny {architecture}", mixture)
    return made


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = dict.fromkeys(part.name for parts in PARTS.values() for part in parts)
    parser.add_argument("mode", choices=PARTS)
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files (default: small ones are made)")
    parser.add_argument("--parts", nargs="+", choices=names, help="default: all of the mode")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the engine alone")
    parser.add_argument("--engine-options", default="", help="more options of gpu_engine.py, in one string")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for a script")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    parser.add_argument("--commit", help="default: the scripts ask git")
    return parser.parse_args(given)


def chosen(args: argparse.Namespace) -> list[Part]:
    return [
        part
        for part in PARTS[args.mode]
        if (args.parts is None or part.name in args.parts) and (args.device == "cuda" or part.any_device)
    ]


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not has_gpu():
        print("there is no GPU that torch can use", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    merged = args.out / f"gpu_{args.mode}.json"
    all_ran: list[Ran] = []
    with tempfile.TemporaryDirectory() as directory:
        files = args.files or make_models(args.mode, Path(directory))
        for part in chosen(args):
            print(f"== {part.name}: {part.script} {' '.join(part.options)}", flush=True)
            out = args.out / f"gpu_{args.mode}_{part.name}.json"
            all_ran.append(run(part, command(part, args, files, out), out, args.limit))
            merge(merged, args.mode, all_ran)
    print(f"\n{'part':12} {'seconds':>8}  verdict")
    for ran in all_ran:
        print(f"{ran.part:12} {ran.seconds:8.1f}  {ran.verdict()}")
    failed = sum(not ran.ok for ran in all_ran)
    print(f"{len(all_ran)} parts, {failed} failed; {merged}")
    sys.exit(1 if failed or not all_ran else 0)


if __name__ == "__main__":
    main()
