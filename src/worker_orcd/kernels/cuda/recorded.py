"""
Launches that are written down once and then made again and again.

To find out what a step launches (tiles, kernels, addresses) takes Python some ten times as long as to launch
it, and a start launches the same steps several times: outside of a graph, in it, in graphs of many rounds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels

Start = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Box:
    """A matrix of 16-bit numbers, of which a kernel moves `rows` x 64 at a time."""

    matrix: torch.Tensor
    rows: int

    def descriptor(self) -> Any:
        """What a launch is given."""
        layouts = importlib.import_module("triton.experimental.gluon.language._layouts")
        hopper = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
        layout = layouts.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return hopper.TensorDescriptor.from_tensor(self.matrix, [self.rows, 64], layout)


@dataclass(eq=False, slots=True)
class Launched:
    """A launch with all that it is given: memory by its address, which must stay."""

    kernel: Kernel
    grid: Grid
    values: Sequence[Any]
    start: Start | None = None  # on a stream, once the kernel is compiled


class Recorded:
    """What `work` launches, which must not depend on when it is called. It is called once."""

    def __init__(self, kernels: Kernels, work: Callable[[], object]) -> None:
        self._kernels = kernels
        self._work: Callable[[], object] | None = work
        self._launches: Sequence[Launched] = ()

    @property
    def launches(self) -> Sequence[Launched]:
        if self._work is not None:
            self._launches = self._kernels.written_down(self._work)
            self._work = None  # and what it holds, views of memory among it
        return self._launches

    def __call__(self) -> None:
        self._kernels.repeat(self.launches)


def starter(compiled: Any, one: Launched) -> Start:
    """Starts it on a stream as Triton does, but for looking for the stream and for those who watch launches.

    The kernel is loaded onto the device here.
    """
    given = [value.descriptor() if isinstance(value, Box) else value for value in one.values]
    values = *given, *[None] * len(one.kernel.constants)
    run, (x, y, z) = compiled.run, one.grid
    function, metadata = compiled.function, compiled.packed_metadata
    return lambda stream: run(x, y, z, stream, function, metadata, None, None, None, *values)
