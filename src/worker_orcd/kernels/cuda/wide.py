"""
Products of many tokens where `linear_wide` can be had: which, how they are cut, and their launches.

Weights become float16 (MXFP4: bfloat16) in scratch memory, as many rows at a time as it has room for, and
are multiplied from there. It changes how long a product takes, never its bits. Importing this needs neither
Triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from worker_orcd.kernels.cuda.compiler import Box, Kernel, Kernels
from worker_orcd.kernels.cuda.streaming import can_stream
from worker_orcd.kernels.cuda.variants import Epilogue, Shape
from worker_orcd.kernels.cuda.weights import PackedMatrix
from worker_orcd.quant.gpu_layout import TILE

STEP = 64  # columns that are multiplied at a time
SCRATCH_BYTES = 128 << 20  # at most, of a weight as float16
ROWS = 128  # of weights, a program
_FEWEST = 512  # tokens, below which making operands costs more than it brings
# Where there is nothing to make, and formats whose operands `linear` makes quickly.
_FEWEST_OF = {"F16": 128, "BF16": 128, "MXFP4": 4096} | dict.fromkeys(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"), 1024
)
_SMALLEST = 1 << 21  # weights, of which two kernels would be no faster than one
_MULTIPROCESSORS = 132
_WIDER = 0.92  # of the time that two narrow tiles take, a wide one does
_WARPS, _GROUP = 8, 8
_LOADING = 4  # warps whose registers are set aside for the one that asks for operands
_REGISTERS = 65536  # of a multiprocessor
_PLAIN = frozenset({"F16", "BF16"})  # which lie as they are multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How the work of a wide product is cut up: tiles of `tokens` and 128 rows, `stages` steps under way."""

    tokens: int
    stages: int


WIDE, NARROW = Cut(tokens=256, stages=4), Cut(tokens=128, stages=6)  # 192 KiB of shared memory, both


def cut_for(shape: Shape, n: int, tokens: int, capability: int) -> Cut | None:
    """The cut for a step of `tokens`, or None where `linear` has to do it, or is faster.

    By what was fastest on an H200: `benchmarks/gpu_wide.py`.
    """
    if tokens < _FEWEST_OF.get(shape.format, _FEWEST) or n * shape.k < _SMALLEST:
        return None
    row_tiles = -(-n // ROWS)
    narrow, wide = (row_tiles * -(-tokens // cut.tokens) for cut in (NARROW, WIDE))
    # Of few tiles one multiprocessor has a whole sum, where `linear` has more programs; Q6_K's are slow.
    fewest_tiles = _MULTIPROCESSORS // (5 if shape.format == "Q6_K" else 1.5)
    if narrow < fewest_tiles or not can_be_wide(shape, capability):
        return None
    # Sums of several chunks are two, the chunk's and all before: registers have room for half as many.
    rounds = -(-narrow // _MULTIPROCESSORS), 2 * _WIDER * -(-wide // _MULTIPROCESSORS)
    return WIDE if shape.chunks == 1 and rounds[1] < rounds[0] else NARROW


def can_be_wide(shape: Shape, capability: int) -> bool:
    whole_steps = shape.k % shape.step == 0 and shape.k % (STEP * shape.chunks) == 0
    return can_stream(capability) and whole_steps and shape.aligned and shape.format != "F32"


class WideProducts:
    """On the current stream of one device. They share scratch memory: one at a time."""

    def __init__(self, kernels: Kernels, most_bytes: int = SCRATCH_BYTES) -> None:
        """`most_bytes` of scratch memory, or what two tiles of a weight take if that is more."""
        self._kernels, self._most_bytes = kernels, most_bytes
        self._scratch = torch.empty(0, dtype=torch.float16, device=kernels.device)

    @property
    def scratch_bytes(self) -> int:
        return self._scratch.nbytes

    def reserve(self, weight: PackedMatrix, tokens: int) -> None:
        """Room for `weight`, if steps of up to `tokens` want it. Before any graph is captured."""
        if cut_for(weight.shape, weight.n, tokens, self._kernels.capability) is not None:
            self.make_room(weight)

    def make_room(self, weight: PackedMatrix) -> None:
        shape = weight.shape
        if shape.format in _PLAIN:
            return
        tiles = -(-weight.n // TILE)
        size = min(tiles, self._most_tiles(shape)) * TILE * shape.k
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.float16, device=self._kernels.device)

    def _most_tiles(self, shape: Shape) -> int:
        """That scratch memory may have room for, in pairs, since a program takes two."""
        return max(2, self._most_bytes // (2 * TILE * shape.k) // 2 * 2)

    def run(
        self,
        x: torch.Tensor,
        weight: PackedMatrix,
        out: torch.Tensor,
        cut: Cut,
        epilogue: Epilogue,
        rest: Sequence[torch.Tensor | int],
    ) -> None:
        """As `Products.linear`. `rest`: the kernel's bias and residual, and what is behind its `stride`."""
        bias, residual, *ends = rest
        tokens, stride = len(x), out.stride(0)
        kernel = wide_kernel(weight.shape, cut, epilogue, odd_stride=stride % 16 != 0)
        for first, rows, operands in self._operands(weight):
            tiles = -(-rows // ROWS) * -(-tokens // cut.tokens)
            self._kernels.launch(
                kernel, (min(tiles, self._kernels.multiprocessors), 1, 1),
                Box(operands, TILE), Box(x, cut.tokens), out, bias, residual,
                first, rows, weight.n, tokens, stride, *ends,
            )  # fmt: skip

    def _operands(self, weight: PackedMatrix) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First row, number of rows, and their tiles, ([tile][step][64 rows], 64): valid until the next."""
        shape, tiles = weight.shape, -(-weight.n // TILE)
        if shape.format in _PLAIN:
            yield 0, weight.n, weight.words.view(-1, STEP)
            return
        rounds = -(-tiles // self._most_tiles(shape))
        each = -(-tiles // rounds // 2) * 2
        for begin in range(0, tiles, each):
            some = tiles_of(weight, begin, min(begin + each, tiles))
            yield begin * TILE, some.n, self._unpacked(some).view(-1, STEP)

    def _unpacked(self, weight: PackedMatrix) -> torch.Tensor:
        shape, tiles = weight.shape, -(-weight.n // TILE)
        size = tiles * TILE * shape.k
        if size > len(self._scratch):
            raise ValueError(f"a wide product of {weight.n} rows needs more scratch memory: see reserve")
        out = self._scratch[:size].view(weight.operand)
        self._kernels.launch(
            unpack_kernel(shape), (tiles, shape.k // shape.step, 1),
            weight.words, weight.high, weight.headers, weight.shifts, out,
        )  # fmt: skip
        return out


def tiles_of(weight: PackedMatrix, start: int, stop: int) -> PackedMatrix:
    """Tiles [start, stop) of a weight: views. Rows keep their order."""
    layout, shape = weight.shape.layout, weight.shape
    before, upto = (layout.sections(tile * TILE, shape.k, shape.step) for tile in (start, stop))
    words = weight.words[before.words : upto.words]
    return replace(
        weight,
        n=min(stop * TILE, weight.n) - start * TILE,
        words=words,
        high=weight.high[before.high : upto.high] if upto.high else words,
        headers=weight.headers[before.headers : upto.headers] if upto.headers else words,
    )


def unpack_kernel(shape: Shape, *, portable: bool = False) -> Kernel:
    layout = shape.layout
    return Kernel(
        module="unpack",
        function="unpack",
        arguments=(
            ("w", "*u16"), ("h", "*u16"), ("s", "*u32"), ("shifts", "*u16"), ("out", f"*{shape.operand}"),
        ),
        constants=(
            ("K", shape.k), ("FORMAT", shape.format), ("BLOCK", len(layout.codes)), ("STEP", shape.step),
            ("PLANES", layout.planes), ("HIGH", layout.high_bits), ("SHARE", layout.share),
            ("HEADER", layout.header_bytes(shape.step)), ("PORTABLE", portable),
        ),
    )  # fmt: skip


def wide_kernel(shape: Shape, cut: Cut, epilogue: Epilogue, *, odd_stride: bool = False) -> Kernel:
    cache = "*u8" if epilogue.store is not None and epilogue.store.fp8 else "*fp16"
    return Kernel(
        module="linear_wide",
        function="wide",
        arguments=(
            ("w", _box(TILE, shape.operand)), ("x", _box(cut.tokens, shape.operand)),
            ("y", f"*{epilogue.out}"), ("bias", "*fp32"), ("residual", "*fp32"), ("first", "i32"),
            ("rows", "i32"), ("n", "i32"), ("tokens", "i32"), ("stride", "i32"), ("cache", cache),
            ("positions", "*i32"), ("slots", "*i32"), ("table", "*fp32"), ("values", "i64"),
        ),
        constants=(
            ("K", shape.k), ("CHUNKS", shape.chunks), ("ROWS", ROWS), ("TOKENS", cut.tokens),
            ("STAGES", cut.stages), ("GROUP", _GROUP), ("WARPS", _WARPS),
            *epilogue.constants().items(), *epilogue.heads().items(),
        ),
        aligned=("n", "first") if odd_stride else ("n", "first", "stride"),
        loose=("positions", "slots"),
        warps=_WARPS,
        registers=_REGISTERS // (32 * (_WARPS + _LOADING)) // 8 * 8,
        fused=epilogue.fused,
        gluon=True,
    )  # fmt: skip


def _box(rows: int, dtype: str) -> str:
    """Triton's type of a matrix of which so many rows of 64 columns are moved at a time."""
    layout = (
        "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=False,"
        " fp4_padded=False, cga_layout=[])"
    )
    return f"tensordesc<{dtype}[{rows}, {STEP}],{layout}>"
