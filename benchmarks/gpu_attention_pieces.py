"""
Ways to compute heads that are no power of two from fp8 keys and values, each in a process of its own.

An access outside of memory ends a process's work on a GPU; so no way hides another. The part `variants` of
gpu_attention.py starts all of them and prints for each how far off it is. What is shipped is one piece; two
pieces were wrong on an H100, and why is what the other ways are for.

    python benchmarks/gpu_attention_pieces.py 80 few "two pieces, 1 stage"     # one of them, alone
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

from gpu_attention_steps import exact, head_params, random_step
from gpu_session import Session
from worker_orcd.kernels.backend import AttentionParams
from worker_orcd.kernels.cuda.attend import Attention, Cut, Tile
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels

SECONDS = 75.0  # that all of them may take
HEADS = {80: head_params(4, 4, 80), 96: head_params(32, 32, 96)}
ROWS = {"few": [(100, 1), (900, 2), (0, 30)], "many": [(150, 2), (0, 400), (900, 1)]}  # tiles of 64, of 128


@dataclass(frozen=True, kw_only=True)
class Way:
    """How it departs from what is shipped."""

    padded: bool = False
    stages: int | None = None
    native: bool = True  # False: bytes are decoded by their bits
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


WAYS = {
    "one piece": Way(padded=True),
    "one piece, 1 stage": Way(padded=True, stages=1),
    "two pieces": Way(),
    "two pieces, 1 stage": Way(stages=1),
    "two pieces, 3 stages": Way(stages=3),
    "two pieces, by bits": Way(native=False),
    "two pieces, assembler does not optimise": Way(environment={"DISABLE_PTXAS_OPT": "1"}),
}


class _Kernels(Kernels):
    def __init__(self, device: torch.device, capability: int, way: Way) -> None:
        super().__init__(device, capability)
        self._way = way

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        if not self._way.native:
            constants = dict(kernel.constants)
            if "NATIVE" in constants:
                kernel = replace(kernel, constants=tuple((constants | {"NATIVE": False}).items()))
        super().launch(kernel, grid, *arguments)


class _Attention(Attention):
    way: Way

    def _cut(self, params: AttentionParams, tokens: int) -> tuple[Cut, Tile]:
        cut, tile = super()._cut(params, tokens)
        return replace(cut, padded=self.way.padded), replace(tile, stages=self.way.stages or tile.stages)


def try_one(head_dim: int, rows: str, way: Way) -> dict[str, float]:
    """In this process."""
    device = torch.device("cuda")
    step = random_step(HEADS[head_dim], ROWS[rows], device, fp8=True)
    major, minor = torch.cuda.get_device_capability()
    kernels = _Kernels(device, 10 * major + minor, way)
    attention = _Attention(kernels, step.limits, cache=step.cache.tensor.dtype)
    attention.way = way
    attention.reserve(step.params)
    out = step.run(attention, step.limits, sinks=False)
    wanted = exact(step, sinks=False)
    tokens = len(wanted)
    return {
        "error": float((out[:tokens].double() - wanted).norm() / wanted.norm()),
        "counters": int(attention._counters.abs().sum()),
        "touched": int((~out[tokens:].isnan()).sum()),
    }


def check_variants(session: Session) -> None:
    """All of them at once. Only what is shipped counts as a failure."""
    if session.recording:
        return
    found: dict[str, object] = {}
    deadline = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as folder:
        running = {
            (dim, rows, name): _start(dim, rows, name, Path(folder) / f"{number}")
            for number, (dim, rows, name) in enumerate(product(HEADS, ROWS, WAYS))
        }
        for (dim, rows, name), process in running.items():
            one, ok = _end(process, deadline)
            found[f"heads of {dim}, {rows} queries, {name}"] = one
            session.save("variants", found)
            line = f"{'' if ok else 'WRONG '}heads of {dim}, {rows:4} queries, {name:40} {one}"
            (session.fail if name == "one piece" and not ok else session.say)(line)


def _start(dim: int, rows: str, name: str, folder: Path) -> subprocess.Popen[str]:
    """What it compiles with other settings of the compiler must not come from the cache on disk."""
    environment = WAYS[name].environment
    own = {"TRITON_CACHE_DIR": str(folder)} if environment else {}
    return subprocess.Popen(
        [sys.executable, __file__, str(dim), rows, name],
        env=os.environ | environment | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _end(process: subprocess.Popen[str], deadline: float) -> tuple[object, bool]:
    """What came of it, and whether that is right."""
    try:
        text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"not done in {SECONDS:g} s", False
    lines = text.strip().splitlines() or ["nothing printed"]
    if process.returncode:
        told = [line for line in lines if "Error" in line]
        return (told or lines)[-1], False
    one: dict[str, float] = json.loads(lines[-1])
    return one, 0 < one["error"] < 1e-3 and not one["counters"] and not one["touched"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("head_dim", type=int, choices=HEADS)
    parser.add_argument("rows", choices=ROWS)
    parser.add_argument("way", choices=WAYS)
    args = parser.parse_args()
    print(json.dumps(try_one(args.head_dim, args.rows, WAYS[args.way])))
