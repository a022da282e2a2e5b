"""
Decode and prompt speed against llama.cpp on the CPU, interleaved in one run: `python
benchmarks/cpu_vs_llamacpp.py`.

Each implementation runs in a process of its own (two spinning thread pools in one process measure each
other) and does one job at a time on request, in turn. A job is the same work on both sides: compute a
prompt from an empty cache, or decode greedily after a short prompt, sampling included. Printed are medians
over the rounds, the median of the ratios of neighbouring samples, and the load average, because the machine
decides as much as the code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROMPT_IDS = [int(i) for i in np.random.default_rng(0).integers(1000, 40000, 2048)]
SHORT = 8  # tokens of prompt before a decode


class Ours:
    """Our runner, driven step by step as the engine does it."""

    def __init__(self, path: Path, threads: int, activations: str) -> None:
        from stepping import Stepper

        self._stepper = Stepper(path, threads=threads, activations=activations, max_tokens=512)

    def prompt(self, num_tokens: int) -> None:
        self._stepper.start(PROMPT_IDS[:num_tokens])

    def decode(self, num_tokens: int) -> float:
        sequence = self._stepper.start(PROMPT_IDS[:SHORT])
        began = time.perf_counter()
        for _ in range(num_tokens):
            self._stepper.step(sequence)
        return time.perf_counter() - began


class Peer:
    """llama.cpp with its default (repacked where it can) weights and its default KV cache."""

    def __init__(self, path: Path, threads: int) -> None:
        from llamacpp import LlamaCpp

        self._model = LlamaCpp(path, threads=threads)

    def prompt(self, num_tokens: int) -> None:
        self._model.clear()
        int(self._model.decode(PROMPT_IDS[:num_tokens], 0).argmax())

    def decode(self, num_tokens: int) -> float:
        self._model.clear()
        token = int(self._model.decode(PROMPT_IDS[:SHORT], 0).argmax())
        began = time.perf_counter()
        for i in range(num_tokens):
            token = int(self._model.decode([token], SHORT + i).argmax())
        return time.perf_counter() - began


def serve(kind: str, path: Path, threads: int) -> None:
    """Child process: one JSON job a line in, its seconds out."""
    model = Peer(path, threads) if kind == "llama.cpp" else Ours(path, threads, kind)
    print("ready", flush=True)
    for line in sys.stdin:
        job, count = json.loads(line)
        if job == "decode":
            seconds = model.decode(count)
        else:
            began = time.perf_counter()
            model.prompt(count)
            seconds = time.perf_counter() - began
        print(seconds, flush=True)


@dataclass(frozen=True)
class Child:
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, kind: str, path: Path, threads: int) -> Child:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", kind, str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"},
        )
        child = cls(process)
        if (line := child._read()) != "ready":
            raise RuntimeError(f"{kind} did not start: {line!r}")
        return child

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, job: str, count: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([job, count]) + "\n")
        self.process.stdin.flush()
        return float(self._read())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(
    path: Path, threads: int, kinds: list[str], jobs: dict[str, int], rounds: int
) -> list[dict[str, object]]:
    children = {kind: Child.start(kind, path, threads) for kind in (*kinds, "llama.cpp")}
    rows: list[dict[str, object]] = []
    try:
        for job, count in jobs.items():
            for child in children.values():
                child.run(job, count)  # warm up
            seconds: dict[str, list[float]] = {kind: [] for kind in children}
            for i in range(rounds):
                order = list(children) if i % 2 else list(reversed(children))
                for kind in order:
                    seconds[kind].append(children[kind].run(job, count))
            peer = seconds["llama.cpp"]
            for kind in kinds:
                ratios = [theirs / ours for theirs, ours in zip(peer, seconds[kind], strict=True)]
                rows.append(
                    {
                        "file": path.name,
                        "threads": threads,
                        "job": f"{job} {count}",
                        "activations": kind,
                        "ours_tok_s": round(count / statistics.median(seconds[kind]), 1),
                        "llamacpp_tok_s": round(count / statistics.median(peer), 1),
                        "ratio": round(statistics.median(ratios), 3),
                        "ratio_low": round(min(ratios), 3),
                        "ratio_high": round(max(ratios), 3),
                        "load": round(os.getloadavg()[0], 2),
                    }
                )
                print_row(rows[-1])
    finally:
        for child in children.values():
            child.stop()
    return rows


COLUMNS: list[tuple[str, str, Callable[[object], str]]] = [
    ("file", "file", lambda v: f"{v!s:<32}"),
    ("threads", "threads", lambda v: f"{v!s:>7}"),
    ("job", "job", lambda v: f"{v!s:<11}"),
    ("activations", "ours", lambda v: f"{v!s:<8}"),
    ("ours_tok_s", "tok/s", lambda v: f"{v!s:>8}"),
    ("llamacpp_tok_s", "llama.cpp", lambda v: f"{v!s:>9}"),
    ("ratio", "ratio", lambda v: f"{v!s:>6}"),
    ("ratio_low", "low", lambda v: f"{v!s:>6}"),
    ("ratio_high", "high", lambda v: f"{v!s:>6}"),
    ("load", "load", lambda v: f"{v!s:>5}"),
]


def print_row(row: dict[str, object]) -> None:
    print("| " + " | ".join(form(row[key]) for key, _title, form in COLUMNS) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, nargs="*", help="GGUF files; default: the demo model and its Q4_0"
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--activations", nargs="*", default=["int8"], choices=["int8", "int16", "float32"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.models or default_models(Path(folder))
        print(
            "| " + " | ".join(title for _key, title, _form in COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
        )
        for path in models:
            for threads in arguments.threads:
                jobs = {"decode": arguments.decode, "prompt": arguments.prompt}
                rows += compare(path, threads, arguments.activations, jobs, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def default_models(folder: Path) -> list[Path]:
    from requantize import requantize
    from worker_orcd.hub import resolve

    shipped = resolve("demo", None)
    q4_0 = folder / "SmolLM2-135M-Instruct.Q4_0.gguf"
    requantize(shipped, q4_0, "Q4_0")
    return [shipped, q4_0]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
