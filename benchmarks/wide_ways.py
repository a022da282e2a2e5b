"""
Ways to multiply many tokens by packed weights, beside the engine's: see `gpu_wide.py`.

Importing this needs neither Triton nor a GPU. Every way gives its kernels through `Kernels`, so `collect`
knows what a run will launch, with all that its code depends on, before there is a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import Shape, Tile
from worker_orcd.kernels.cuda.weights import PackedMatrix
from worker_orcd.quant.gpu_layout import TILE

STEP = 64  # columns that `wide_hopper` multiplies at a time
SLAB_BYTES = 32 << 20  # of a scratch matrix that stays in the L2 cache
SCRATCH_BYTES = 128 << 20  # of one for a whole weight
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = 226 << 10  # likewise, less a kilobyte for barriers
_NAMES = {torch.float16: "fp16", torch.float32: "fp32"}


def compile_wide(kernel: Kernel, capability: int) -> Any:
    """As `compiler.compile_kernel`, of modules that lie here; WARPS' registers are shared out if need be."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    own = kernel.module.startswith("wide_")
    module = importlib.import_module(kernel.module if own else f"worker_orcd.kernels.cuda.{kernel.module}")
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
        "launch_pdl": False,
    }
    if kernel.function in ("apart", "fused"):
        options["maxnreg"] = REGISTERS // (32 * (kernel.warps + 4)) // 8 * 8
    return triton.compile(source, target=backend.GPUTarget("cuda", capability, 32), options=options)


def descriptor_type(rows: int, columns: int = STEP, dtype: str = "fp16") -> str:
    """Triton's type of a matrix of which a box of so many rows and columns is moved."""
    layout = (
        f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={32 if dtype == 'fp32' else 16}, rank=2,"
        " transposed=False, fp4_padded=False, cga_layout=[])"
    )
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout}>"


def descriptor(matrix: torch.Tensor, rows: int, columns: int = STEP) -> Any:
    hopper = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    layouts = importlib.import_module("triton.experimental.gluon.language._layouts")
    layout = layouts.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2
    )
    return hopper.TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a kernel of `wide_hopper` cuts its work up."""

    function: str  # product, apart, fused
    rows: int
    tokens: int
    warps: int
    stages: int
    group: int = 8  # row tiles that are worked on side by side
    staged: bool = False  # results leave by TMA while the next tile is begun, not of `product`
    makers: int = 0  # warps that make weights, of `fused`
    registers: int = 0  # of each of their threads

    def __str__(self) -> str:
        text = f"{self.function} {self.rows}x{self.tokens} w{self.warps} s{self.stages} g{self.group}"
        return text + " staged" * self.staged

    def kernel(self, shape: Shape, out: torch.dtype) -> Kernel:
        own: dict[str, str]
        constants: dict[str, Any] = {"K": shape.k}
        if self.function == "fused":
            own = {"w": "*u16", "h": "*u16", "s": "*u32", "shifts": "*u16"}
            constants["FORMAT"] = shape.format
        else:
            own = {"w": descriptor_type(self.rows)}
        constants |= {
            "CHUNKS": shape.chunks, "ROWS": self.rows, "TOKENS": self.tokens,
            "STAGES": self._stages(out),
            "GROUP": self.group, "WARPS": self.warps,
        }  # fmt: skip
        if self.function != "product":
            constants["STAGED"] = self.staged
        if self.function == "fused":
            constants |= {"MAKERS": self.makers, "REGISTERS": self.registers}
        own |= {
            "x": descriptor_type(self.tokens),
            "y": self._out_type(out), "n": "i32", "tokens": "i32", "stride": "i32",
        }  # fmt: skip
        return Kernel(
            module="wide_hopper",
            function=self.function,
            arguments=tuple(own.items()),
            constants=tuple(constants.items()),
            aligned=("n", "stride"),
            warps=self.warps,
            gluon=True,
        )

    def _stages(self, out: torch.dtype) -> int:
        """As many as there is room for beside results."""
        results = self.rows * self.tokens * out.itemsize if self.staged else 0
        return min(self.stages, (SHARED_BYTES - results) // (2 * STEP * (self.rows + self.tokens)))

    def _out_type(self, out: torch.dtype) -> str:
        if not self.staged:
            return f"*{_NAMES[out]}"
        return descriptor_type(self.tokens, self.rows, _NAMES[out])

    def out(self, y: torch.Tensor) -> Any:
        """What the kernel is given to store to."""
        return descriptor(y, self.tokens, self.rows) if self.staged else y


def unpack_kernel(shape: Shape, *, tiled: bool, portable: bool = False) -> Kernel:
    layout = shape.layout
    return Kernel(
        module="wide_kernels",
        function="unpack",
        arguments=(
            ("w", "*u16"), ("h", "*u16"), ("s", "*u32"), ("shifts", "*u16"), ("out", "*fp16"), ("n", "i32"),
        ),
        constants=(
            ("K", shape.k), ("FORMAT", shape.format), ("BLOCK", len(layout.codes)), ("STEP", shape.step),
            ("PLANES", layout.planes), ("HIGH", layout.high_bits), ("SHARE", layout.share),
            ("HEADER", layout.header_bytes(shape.step)), ("TILED", tiled), ("STEPS_EACH", 1),
            ("PORTABLE", portable),
        ),
        aligned=("n",),
    )  # fmt: skip


def pieces_kernel(
    shape: Shape, tile: Tile, count: int, out: torch.dtype, *, portable: bool = False
) -> Kernel:
    return Kernel(
        module="wide_kernels",
        function="pieces",
        arguments=(
            ("w", "*u16"), ("s", "*u32"), ("x", "*fp16"), ("y", f"*{_NAMES[out]}"), ("n", "i32"),
            ("tokens", "i32"), ("stride", "i32"),
        ),
        constants=(
            ("K", shape.k), ("CHUNKS", shape.chunks), ("PIECES", count), ("ROWS", tile.rows),
            ("TOKENS", tile.tokens), ("STAGES", tile.stages), ("PORTABLE", portable),
        ),
        aligned=("n", "stride"),
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def rows_of(weight: PackedMatrix, start: int, stop: int) -> PackedMatrix:
    """Rows of a weight, in whole tiles: views."""
    layout, shape = weight.shape.layout, weight.shape
    stop = min(stop, weight.n)
    before, upto = (layout.sections(rows, shape.k, shape.step) for rows in (start, stop))
    return replace(
        weight,
        n=stop - start,
        words=weight.words[before.words : upto.words],
        high=weight.high[before.high : upto.high] if upto.high else weight.words,
        headers=weight.headers[before.headers : upto.headers] if upto.headers else weight.words,
    )


class Wide:
    """Products by every way that is tried, on one device. They share a scratch matrix: one at a time."""

    def __init__(self, kernels: Kernels, products: Products, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self.kernels, self.products = kernels, products
        self.scratch = torch.empty(scratch_bytes // 2, dtype=torch.float16, device=kernels.device)

    def unpack(self, weight: PackedMatrix, *, tiled: bool) -> torch.Tensor:
        """The weights, (n, k) float16, in scratch memory; with `tiled` a vector, as a packed matrix."""
        shape = weight.shape
        tiles = -(-weight.n // TILE)
        out = self.scratch[: tiles * TILE * shape.k]
        kernel = unpack_kernel(shape, tiled=tiled)
        self.kernels.launch(
            kernel, (tiles, shape.k // shape.step, 1),
            weight.words, weight.high, weight.headers, weight.shifts, out, weight.n,
        )  # fmt: skip
        return out if tiled else out.view(-1, shape.k)[: weight.n]

    def slabs(self, weight: PackedMatrix, slab_bytes: int) -> Iterator[tuple[int, PackedMatrix]]:
        """The first row of each slab of at most so many bytes as float16, and its rows. All tiles if 0."""
        rows = slab_bytes // (2 * weight.shape.k) // 256 * 256 if slab_bytes else weight.n
        if rows < weight.n:  # as equal as they can be in steps of a kernel's tiles
            count = -(-weight.n // rows)
            rows = -(-weight.n // count // 256) * 256
        for start in range(0, weight.n, rows):
            yield start, rows_of(weight, start, start + rows)

    def two_passes(
        self, x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor, tile: Tile, slab_bytes: int
    ) -> None:
        """Weights as float16 in scratch memory, then the engine's kernel for those."""
        for start, some in self.slabs(weight, slab_bytes):
            words = self.unpack(some, tiled=True)
            shape = Shape(
                format="F16", k=some.shape.k, step=STEP, chunks=some.shape.chunks, aligned=some.n % 16 == 0
            )
            plain = PackedMatrix(
                shape=shape, n=some.n, words=words, high=words, headers=words, shifts=weight.shifts
            )
            self.products.linear(x, plain, out[:, start : start + some.n], tile=tile)

    def by_tma(
        self, x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor, cut: Cut, slab_bytes: int
    ) -> None:
        """Likewise, then a kernel of `wide_hopper`."""
        for start, some in self.slabs(weight, slab_bytes):
            self.product(x, self.unpack(some, tiled=False), out[:, start : start + some.n], some.shape, cut)

    def product(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, shape: Shape, cut: Cut) -> None:
        """`out` (tokens, n) = x @ rows.T, of (n, k) float16; `shape` says in how many chunks."""
        tokens, n = out.shape
        self.kernels.launch(
            cut.kernel(shape, out.dtype), self._grid(cut, n, tokens),
            descriptor(rows, cut.rows), descriptor(x, cut.tokens), cut.out(out), n, tokens, out.stride(0),
        )  # fmt: skip

    def fused(self, x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor, cut: Cut) -> None:
        tokens, n = out.shape
        self.kernels.launch(
            cut.kernel(weight.shape, out.dtype), self._grid(cut, n, tokens),
            weight.words, weight.high, weight.headers, weight.shifts, descriptor(x, cut.tokens),
            cut.out(out), n, tokens, out.stride(0),
        )  # fmt: skip

    def pieces(
        self, x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor, tile: Tile, count: int
    ) -> None:
        tokens, n = out.shape
        self.kernels.launch(
            pieces_kernel(weight.shape, tile, count, out.dtype),
            (-(-n // tile.rows), -(-tokens // tile.tokens), 1),
            weight.words, weight.headers, x, out, n, tokens, out.stride(0),
        )  # fmt: skip

    def _grid(self, cut: Cut, n: int, tokens: int) -> tuple[int, int, int]:
        tiles = -(-n // cut.rows) * -(-tokens // cut.tokens)
        return (tiles if cut.function == "product" else min(tiles, self.kernels.multiprocessors)), 1, 1
