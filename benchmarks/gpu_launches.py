"""
What a step launches on a GPU, kernel by kernel, on a machine that has none.

    python benchmarks/gpu_launches.py qwen2.5-0.5b          # a made-up file of this shape, a few layers
    python benchmarks/gpu_launches.py gpt-oss-20b MXFP4 --tokens 16
    python benchmarks/gpu_launches.py FILE.gguf

Needs torch and numpy. A line a launch: operation, kernel, programs, warps, and of products the weight.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cuda.backend import CudaBackend
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.executor import Executor
from worker_orcd.kernels.cuda.inputs import Bucket
from worker_orcd.kernels.cuda.program import Operation
from worker_orcd.kernels.cuda.step import CudaStep
from worker_orcd.model.architectures import configure
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import load_weights
from worker_orcd.runner.plan import make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.synth.shapes import SHAPES
from worker_orcd.synth.write import write_model

ENGINE = EngineConfig(max_num_seqs=256, max_num_batched_tokens=512, max_model_len=1024)
DEVICE = DeviceConfig(kv_cache_size_mb=64)
Launched = tuple[str, Kernel, Grid]


class Listing(Kernels):
    """Kernels that are written down and not launched."""

    def __init__(self, capability: int) -> None:
        super().__init__(torch.device("cpu"), capability)
        self.launched: list[tuple[Kernel, Grid]] = []

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        self.launched.append((kernel, grid))


def executor_of(path: Path, kernels: Kernels) -> Executor:
    """The file's program, placed in this machine's memory."""
    backend = CudaBackend(kernels)
    with GGUFFile(path) as file:
        config = configure(file)
        plan = make_plan(config, tensor_bytes(file), backend, ENGINE, DEVICE, 1 << 36)
        config = config.serving(plan.max_model_len)
        weights = load_weights(file, config, backend)
    step: Any = ModelRunner(Decoder(config, weights, backend), backend, plan, ENGINE)._compiled
    assert isinstance(step, CudaStep)
    return step.executor


def launches(executor: Executor, kernels: Listing, tokens: int) -> list[Launched]:
    """Of a step of `tokens` rows of a token each: operation, kernel, programs."""
    found: list[Launched] = []

    def run(name: str, launch: Any) -> None:
        kernels.launched.clear()
        launch()
        found.extend((name, *one) for one in kernels.launched)

    bucket = Bucket(tokens, tokens)
    for launch in executor._launcher.prepare(bucket):
        run("Plan", launch)
    for one in executor._operations:
        launch = executor._launcher.launch(one, lambda value: executor._arena.view(value, bucket), bucket)
        run(_name(one), launch)
    return found


def _name(one: Operation) -> str:
    parts = [type(one).__name__]
    for name in ("residual", "glu", "norm", "heads"):
        if getattr(one, name, None) is not None:
            parts.append(name)
    return "+".join(parts)


def line(name: str, kernel: Kernel, grid: Grid) -> str:
    constants = dict(kernel.constants)
    what = ""
    if "FORMAT" in constants:
        what = f"{constants['FORMAT']:5} K {constants['K']:5}"
        if "CHUNKS" in constants:
            what += f" S {constants['CHUNKS']}, {constants['ROWS']}x{constants['TOKENS']}"
            what += f" step {constants['STEP']} {constants['STAGES']} stages"
    programs = "x".join(map(str, grid))
    return (
        f"{name:24} {kernel.module + '.' + kernel.function:24} {programs:>12} {kernel.warps:2} warps {what}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a GGUF file, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("mixture", nargs="?", default="Q4_K_M")
    parser.add_argument("--layers", type=int, default=4, help="of a made-up file")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--capability", type=int, default=90)
    args = parser.parse_args()
    kernels = Listing(args.capability)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        path = Path(args.model)
        if args.model in SHAPES:
            path = Path(directory, "model.gguf")
            write_model(path, replace(SHAPES[args.model], num_layers=args.layers), args.model, args.mixture)
        found = launches(executor_of(path, kernels), kernels, args.tokens)
    for one in found:
        print(line(*one))
    print(len(found), "launches:", dict(Counter(kernel.function for _, kernel, _ in found)))


if __name__ == "__main__":
    main()
