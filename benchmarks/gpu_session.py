"""Runs the parts of a GPU script: kernels compiled ahead by many processes, results kept as they come.

A script has a table of parts, adds what is its own to `parser_of`, and ends with `run_parts`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_timing import copy_bandwidth, graph_microseconds, stamp
from worker_orcd.kernels.cuda.compiler import Kernels


class Session:
    """Results on their way to the file. Parts run twice, at first without launching: `recording`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, Any] = {"stamp": stamp(args.commit)}
        self.device = torch.device("cuda")
        self.capability: int = self.results["stamp"]["capability"]
        self.kernels = Kernels(self.device, self.capability)
        self.recording = False
        self.lines: list[str] = []
        self.failures = 0
        self._start = time.monotonic()
        self._weights: dict[object, Any] = {}

    def say(self, line: str) -> None:
        if not self.recording:
            print(f"[{time.monotonic() - self._start:5.1f} s] {line}", flush=True)
            self.lines.append(line)

    def save(self, part: str, value: object) -> None:
        if not self.recording:
            self.results[part] = value
            self.args.out.write_text(json.dumps(self.results, indent=1, default=str))

    def fail(self, line: str) -> None:
        self.failures += 1
        self.say(line)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """The same weights in both passes."""
        if key not in self._weights:
            self._weights[key] = make()
        return self._weights[key]

    def run(self, part: Callable[[Session], None]) -> None:
        """The part, its kernels compiled first. What goes wrong is said and does not hide the rest."""
        try:
            self.recording = True
            wanted = self.kernels.collect(partial(part, self))
            self.recording = False
            start = time.monotonic()
            self.kernels.compile_all(wanted, lambda done, total: None)
            self.say(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s")
            part(self)
            torch.cuda.synchronize()
        except Exception:
            self.recording = False
            self.fail(traceback.format_exc())
        self._weights.clear()

    def microseconds(self, runs: Sequence[Callable[[], object]]) -> float:
        if self.recording:
            for run in runs:
                run()
            return 1.0
        return graph_microseconds(runs, 4.0)

    def copy_bandwidth(self) -> float:
        """GB/s of a device copy, told and kept; 1 while recording."""
        if self.recording:
            return 1.0
        copy = copy_bandwidth()
        self.save("copy_gb_per_s", copy)
        self.say(f"device copy {copy:.0f} GB/s")
        return copy

    def random(self, *shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(device=self.device).manual_seed(seed + sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device)


Part = Callable[[Session], None]


def parser_of(
    description: str | None, parts: Mapping[str, Part], out: str, *, default: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """What every such script is told: which parts, by default all of them; where results go; the commit."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=parts, default=list(default or parts))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--commit", help="default: ask git")
    return parser


def run_parts(args: argparse.Namespace, parts: Mapping[str, Part]) -> None:
    """Those that `args.only` names; the lines once more; ends the process with 1 if a check failed."""
    session = Session(args)
    session.say(str(session.results["stamp"]))
    for part in args.only:
        session.run(parts[part])
    print("\n" + "\n".join(session.lines))
    print(f"{session.failures} failures; {args.out}")
    sys.exit(1 if session.failures else 0)
