"""
Kernels compiled ahead for one kind of GPU, and their launches.

A `Kernel` names a Triton function and all that its code depends on: types, compile-time parameters, warps and
stages. So nothing is specialised on the values of a launch, and all kernels of a model are known when it
loads. Importing this needs neither Triton nor a GPU; compiling needs Triton alone.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from worker_orcd.kernels.cuda.recorded import Box, Launched, starter

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How kernels of a step of few tokens start before those before them have ended. It changes no bits.

    Modes are those of `overlap`.
    """

    mode: int = 0  # of all kernels but products
    product: int = 0  # of products


NO_OVERLAP = Overlap()
# What was fastest for each of three models on an H100: see docs/perf/gpu.md.
FULL_OVERLAP = Overlap(mode=1, product=2)
OVERLAPPING_TOKENS = 64  # a step of more has no time to gain


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
    gluon: bool = False  # written in Gluon
    registers: int = 0  # of a thread at most, where its warps share them out; else as the compiler likes

    @property
    def aligned_arguments(self) -> tuple[int, ...]:
        return tuple(
            index
            for index, (name, kind) in enumerate(self.arguments)
            if (kind.startswith("*") and name not in self.loose) or name in self.aligned
        )


Argument = torch.Tensor | Box | int | float
FEW = 4  # kernels that are not worth a process
READING = 0.02  # seconds that a kernel in Triton's cache may take
PATIENCE = 1.0  # and that they may take in all beside
Compile = Callable[[Kernel, int], Any]


def compile_kernel(kernel: Kernel, capability: int) -> Any:
    """Triton's CompiledKernel, from its cache on disk if it is there. Needs Triton, and no GPU."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    module = importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
    source_type = compiler.ASTSource
    if kernel.gluon:
        source_type = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = source_type(
        fn=getattr(module, kernel.function),
        signature=dict(kernel.arguments) | {name: "constexpr" for name, _ in kernel.constants},
        constexprs=dict(kernel.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in kernel.aligned_arguments},
    )
    options: dict[str, Any] = {
        "num_warps": kernel.warps,
        "num_stages": kernel.stages,
        "enable_fp_fusion": kernel.fused,
        "launch_pdl": dict(kernel.constants).get("OVERLAP", 0) > 0,
    }
    if kernel.registers:
        options["maxnreg"] = kernel.registers
    return triton.compile(source, target=backend.GPUTarget("cuda", capability, 32), options=options)


# Of this package, those that nearly every model has kernels of.
_MODULES = ("advance", "attention", "elementwise", "embedding", "linear", "norms", "sampling")


def prepare_triton() -> None:
    """Import what `compile_kernel` does, and let Triton hash itself, which takes it half a second."""
    importlib.import_module("triton.backends.compiler")
    for name in _MODULES:
        importlib.import_module(f"worker_orcd.kernels.cuda.{name}")
    for name in ("triton.runtime.cache", "triton.compiler.compiler"):  # newer, older
        key = getattr(importlib.import_module(name), "triton_key", None)
        if key is not None:
            key()  # which Triton remembers: a part of every kernel's name in its cache
            return


class Preparation:
    """`work` on a thread of its own. What fails there fails again, and is told, where it is needed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(work,), name="prepare")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):
            work()

    def wait(self) -> None:
        self._thread.join()


class Kernels:
    """Compiled kernels of one device, launched on its current stream."""

    def __init__(
        self,
        device: torch.device,
        capability: int,
        compile: Compile = compile_kernel,
        overlap: Overlap = NO_OVERLAP,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._prepare = prepare
        self._preparation: Preparation | None = None
        self.device, self.capability = device, capability
        self.overlap = overlap if capability >= 90 else NO_OVERLAP
        self._compile = compile
        self._compiled: dict[Kernel, Any] = {}
        self._written: list[Launched] | None = None  # while `written_down` runs

    @property
    def multiprocessors(self) -> int:
        """Of the device; of an H100 where there is none."""
        if self.device.type != "cuda":
            return 132
        cuda: Any = torch.cuda
        return int(cuda.get_device_properties(self.device).multi_processor_count)

    def overlap_mode(self, tokens: int) -> int:
        """Of a kernel that is no product, in a step of `tokens`."""
        return self.overlap.mode if tokens <= OVERLAPPING_TOKENS else 0

    def prepare(self) -> None:
        """Kernels will be compiled: what that needs begins beside whatever comes before the first of them."""
        if self._prepare is not None and self._preparation is None:
            self._preparation = Preparation(self._prepare)

    def compiled(self, kernel: Kernel) -> Any:
        """Loaded onto the device at its first launch."""
        found = self._compiled.get(kernel)
        if found is None:
            if self._preparation is not None:
                self._preparation.wait()
            found = self._compiled[kernel] = self._compile(kernel, self.capability)
        return found

    def written_down(self, work: Callable[[], object]) -> list[Launched]:
        """What `work` would launch, in order. Nothing is launched, or compiled."""
        before, self._written = self._written, []
        try:
            work()
            return self._written
        finally:
            self._written = before

    def collect(self, work: Callable[[], object]) -> list[Kernel]:
        """The kernels that `work` would launch, each once, in order."""
        return list(dict.fromkeys(one.kernel for one in self.written_down(work)))

    def compile_all(self, kernels: Sequence[Kernel], on_progress: Callable[[int, int], None]) -> None:
        """Make all of them ready. `on_progress(done, all)`.

        First from Triton's cache on disk, one after the other; once that takes longer than reading can, they
        are not all there, and a process a core compiles the rest into it. The first does not count: it may
        be what imports Triton.
        """
        missing = [kernel for kernel in kernels if kernel not in self._compiled]
        started = time.monotonic()
        for done, kernel in enumerate(missing):
            if done == 1:
                started = time.monotonic()
            left = missing[done:]
            processes = min(len(left) // FEW, os.cpu_count() or 1)
            if processes > 1 and time.monotonic() - started > PATIENCE + done * READING:
                with contextlib.suppress(BrokenProcessPool):  # as where memory is short: one at a time, then
                    self._fill_cache(
                        left, processes, lambda more, of: on_progress(len(missing) - of + more, len(missing))
                    )
                for kernel in left:
                    self.compiled(kernel)
                return
            self.compiled(kernel)
            on_progress(done + 1, len(missing))

    def _fill_cache(
        self, kernels: Sequence[Kernel], processes: int, on_progress: Callable[[int, int], None]
    ) -> None:
        """Triton's, on disk: processes compile into it, this one reads it. Not forked: CUDA forbids that."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [
                pool.submit(_compile_for_cache, self._compile, kernel, self.capability) for kernel in kernels
            ]
            for done, job in enumerate(as_completed(jobs)):
                job.result()
                on_progress(done + 1, len(kernels))

    def launch(self, kernel: Kernel, grid: Grid, *arguments: Argument) -> None:
        """`arguments` as the kernel names them; tensors on this device.

        They start at multiples of 16 bytes, but for the kernel's `loose` ones.
        """
        values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        if len(values) != len(kernel.arguments):
            raise ValueError(f"{kernel.function} takes {len(kernel.arguments)} arguments, not {len(values)}")
        self.repeat([Launched(kernel, grid, values)])

    def repeat(self, launches: Sequence[Launched]) -> None:
        """Make launches that were written down, once more."""
        if self._written is not None:
            self._written += launches
            return
        stream = self._stream()
        for one in launches:
            if one.start is None:
                one.start = starter(self.compiled(one.kernel), one)
            one.start(stream)

    def _stream(self) -> int:
        """The current one of the current device, as the driver knows it."""
        if self.device.type != "cuda":
            return 0
        inside: Any = torch  # what Triton asks too; torch's own way takes ten times as long
        return inside._C._cuda_getCurrentRawStream(inside._C._cuda_getDevice())


def _compile_for_cache(compiler: Compile, kernel: Kernel, capability: int) -> None:
    compiler(kernel, capability)  # the result cannot leave the process; its file can
