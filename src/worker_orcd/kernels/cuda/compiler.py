"""
Kernels compiled ahead for one kind of GPU, and their launches.

A `Kernel` names a Triton function and all that its code depends on: types, compile-time parameters, warps and
stages. So nothing is specialised on the values of a launch, and all kernels of a model are known when it
loads. Importing this needs neither Triton nor a GPU; compiling needs Triton alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """All that compiled code depends on, beside the GPU."""

    module: str  # of this package
    function: str
    arguments: tuple[tuple[str, str], ...]  # given at a launch: name and Triton's type, in order
    constants: tuple[tuple[str, Any], ...]  # the compile-time parameters, which follow
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16, beside all pointers
    loose: tuple[str, ...] = ()  # pointers that may be no multiples of 16
    warps: int = 4
    stages: int = 3
    fused: bool = True  # products may be fused with the sums they go into, as the compiler likes

    @property
    def aligned_arguments(self) -> tuple[int, ...]:
        return tuple(
            index
            for index, (name, kind) in enumerate(self.arguments)
            if (kind.startswith("*") and name not in self.loose) or name in self.aligned
        )


Compile = Callable[[Kernel, int], Any]


def compile_kernel(kernel: Kernel, capability: int) -> Any:
    """Triton's CompiledKernel, from its cache on disk if it is there. Needs Triton, and no GPU."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    module = importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
    source = compiler.ASTSource(
        fn=getattr(module, kernel.function),
        signature=dict(kernel.arguments) | {name: "constexpr" for name, _ in kernel.constants},
        constexprs=dict(kernel.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in kernel.aligned_arguments},
    )
    options = {
        "num_warps": kernel.warps,
        "num_stages": kernel.stages,
        "enable_fp_fusion": kernel.fused,
    }
    return triton.compile(source, target=backend.GPUTarget("cuda", capability, 32), options=options)


class Kernels:
    """Compiled kernels of one device, launched on its current stream."""

    def __init__(self, device: torch.device, capability: int, compile: Compile = compile_kernel) -> None:
        self.device, self.capability = device, capability
        self._compile = compile
        self._compiled: dict[Kernel, Any] = {}

    def compiled(self, kernel: Kernel) -> Any:
        """Loaded onto the device at its first launch."""
        found = self._compiled.get(kernel)
        if found is None:
            found = self._compiled[kernel] = self._compile(kernel, self.capability)
        return found

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        """`arguments` as the kernel names them; tensors on this device.

        They start at multiples of 16 bytes, but for the kernel's `loose` ones.
        """
        values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        if len(values) != len(kernel.arguments):
            raise ValueError(f"{kernel.function} takes {len(kernel.arguments)} arguments, not {len(values)}")
        self.compiled(kernel)[grid](*values, *[None] * len(kernel.constants))
