"""Products without a GPU: what would be launched, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_weights import random_rows
from worker_orcd import quant
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.weights import PackedMatrix, pack, upload


def packed(name: str, n: int, k: int, **flags: Any) -> PackedMatrix:
    """Random weights on the CPU."""
    fmt = quant.BY_NAME[name]
    shape, data = pack(Matrix("w", fmt, n, k, random_rows(fmt, n, k)))
    return upload(shape, n, torch.from_numpy(data), **flags)


@dataclass
class Launch:
    """Takes the place of a compiled kernel."""

    kernel: Kernel
    capability: int
    calls: list[tuple[Grid, tuple[object, ...]]] = field(default_factory=list)
    function: object = None
    packed_metadata: object = None

    def run(self, x: int, y: int, z: int, *arguments: object) -> None:
        self.calls.append(((x, y, z), arguments[6:]))  # behind what Triton is told of the launch

    def arguments(self, call: int = 0) -> dict[str, Any]:
        """By name; None for compile-time parameters is not among them."""
        names = [name for name, _ in self.kernel.arguments]
        return dict(zip(names, self.calls[call][1], strict=False))


class Recorder:
    """Compiles nothing: `made` has a `Launch` for each kernel, in the order of their first launches."""

    def __init__(self) -> None:
        self.made: list[Launch] = []

    def compile(self, kernel: Kernel, capability: int) -> Launch:
        self.made.append(Launch(kernel, capability))
        return self.made[-1]

    def kernels(self, capability: int = 90) -> Kernels:
        return Kernels(torch.device("cpu"), capability, self.compile)
