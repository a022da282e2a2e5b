"""
Which kernel runs a matrix product: tile, warps and stages by number of tokens and kind of GPU.

A variant changes how long a product takes, never its bits. Importing this needs neither Triton nor a GPU;
`compile_variant` needs Triton, and compiles for any GPU without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda.compiler import Kernel, compile_kernel
from worker_orcd.kernels.cuda.contract import WANTED_PROGRAMS, num_chunks
from worker_orcd.quant import BY_NAME
from worker_orcd.quant.gpu_layout import GpuLayout

# Tensor cores take float16 for formats of integers (finer rounding) and bfloat16 where float16 has no range.
BFLOAT16_FORMATS = frozenset({"MXFP4", "BF16", "F32"})
FORMATS = tuple(BY_NAME)
CAPABILITIES = (80, 89, 90)  # compiled for in the tests; others run, untested
_FLIGHT_REGISTERS = 96  # of a thread
MAX_SPLIT_TOKENS = 256  # of any product, see `most_split_tokens`
_MANY_CHUNKS = 12  # whose parts are much to add up
_ONE_EACH = 132  # programs for an H100's multiprocessors
WIDE_ROWS = 1 << 16  # from here on a program takes two tiles of rows even for a few tokens
# Formats that many tokens run fastest for with few tokens, or few rows, a program.
_NARROW = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"})
_SHORT = frozenset({"Q8_0", "Q4_K", "Q5_K"})
_WITH_MINIMUM = frozenset({"Q4_K", "Q2_K"})
_WIDE_SPLIT = frozenset({"Q4_K", "Q2_K", "Q5_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"})
_SMALL_WALK = frozenset({"Q8_0", "MXFP4"})
_WALKS_WELL = frozenset({"Q4_K", "Q3_K", "Q2_K", "Q8_0"})
# Bytes of shared memory that a program may have.
_SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
_DTYPES = {"F32": "*fp32", "F16": "*fp16", "BF16": "*bf16"}  # of words; else u16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a kernel knows of a weight."""

    format: str
    k: int
    step: int
    chunks: int
    aligned: bool = False  # n is a multiple of 16

    @property
    def layout(self) -> GpuLayout:
        layout = BY_NAME[self.format].gpu
        if layout is None:
            raise ValueError(f"{self.format} has no GPU layout")
        return layout

    @property
    def steps_of_chunk(self) -> int:
        return -(-self.k // self.step) // self.chunks

    @property
    def operand(self) -> str:
        return "bf16" if self.format in BFLOAT16_FORMATS else "fp16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How the work of a product is cut up."""

    rows: int  # of weights, a program
    tokens: int
    warps: int
    stages: int  # steps in flight
    split: bool = False  # a program a chunk
    unroll: int = 1  # steps at a time: divides those of a chunk
    ahead: int = 0  # steps on their way to registers, see `linear_stream`, `expert_stream`

    def flight(self, chunks: int) -> int:
        """How many parts of a split product are loaded at a time, to be added up."""
        if not self.split or self.tokens <= 16:
            return chunks
        registers = self.rows * self.tokens // (32 * self.warps)  # of a thread, for a part
        return max(1, min(chunks, _FLIGHT_REGISTERS // registers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Heads of q go to the output, those of k and v to a cache."""

    num_heads: int
    num_kv_heads: int
    cache_block: int  # tokens
    rotated: bool
    fp8: bool = False  # the cache's numbers, else float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What is done to a sum on its way out."""

    bias: bool = False
    residual: bool = False  # added, float32
    paired: bool = False  # rows are eight gates, then the eight that go with them
    glu: Glu | None = None  # of a paired weight
    head: int = 0  # rows of each head lie in this way
    store: Store | None = None  # of a weight with heads
    out: str = "fp32"  # or fp16, bf16

    @property
    def fused(self) -> bool:
        """Whether the compiler may fuse products with sums: `Kernel.fused`.

        A gated unit has the bits that `elementwise` gives it, a rotated head those of `rope`.
        """
        return self.glu is None and self.store is None

    def constants(self) -> dict[str, Any]:
        """A kernel's compile-time parameters."""
        return {
            "PAIRED": self.paired,
            "GLU": "" if self.glu is None else self.glu.value,
            "BIAS": self.bias,
            "RESIDUAL": self.residual,
        }

    def heads(self) -> dict[str, Any]:
        """Likewise, of what is done with heads."""
        store = self.store
        return {
            "HEAD": self.head,
            "HEADS": 0 if store is None else store.num_heads,
            "KV_HEADS": 0 if store is None else store.num_kv_heads,
            "CACHE_BLOCK": 0 if store is None else store.cache_block,
            "ROTATED": store is not None and store.rotated,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """All that a compiled kernel depends on, beside the GPU."""

    shape: Shape
    tile: Tile
    epilogue: Epilogue = Epilogue()
    odd_stride: bool = False  # outputs of a token and the next are no multiple of 16 apart
    portable: bool = False  # plain Triton throughout, for the interpreter
    overlap: int = 0  # see `overlap`

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time parameters."""
        shape, tile, epilogue, layout = self.shape, self.tile, self.epilogue, self.shape.layout
        return {
            "K": shape.k,
            "FORMAT": shape.format,
            "BLOCK": len(layout.codes),
            "STEP": shape.step,
            "CHUNKS": shape.chunks,
            "PLANES": layout.planes,
            "HIGH": layout.high_bits,
            "SHARE": layout.share,
            "HEADER": layout.header_bytes(shape.step),
            "SPLIT": tile.split,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "STAGES": tile.stages,
            "UNROLL": tile.unroll,
            **epilogue.constants(),
            "PORTABLE": self.portable,
        }

    def _arguments(self) -> dict[str, str]:
        """The kernel's, and their types."""
        words = _DTYPES.get(self.shape.format, "*u16")
        high = "*u16" if self.shape.layout.high_bits else words
        arguments = {
            "w": words, "h": high, "s": "*u32", "shifts": "*u16", "x": f"*{self.shape.operand}",
            "y": f"*{self.epilogue.out}", "partials": "*fp32", "counters": "*i32", "bias": "*fp32",
            "residual": "*fp32", "n": "i32", "tokens": "i32", "stride": "i32", "cache": "*fp16",
            "positions": "*i32", "slots": "*i32", "table": "*fp32", "values": "i64",
        }  # fmt: skip
        if self.epilogue.store is not None and self.epilogue.store.fp8:
            arguments["cache"] = "*u8"
        return arguments

    def kernel(self) -> Kernel:
        return _kernel_of(self)

    def make_kernel(self) -> Kernel:
        arguments = self._arguments()
        if self.tile.ahead:
            return self._streamed(arguments)
        aligned = ("n",) if self.odd_stride else ("n", "stride")
        return Kernel(
            module="linear",
            function="linear",
            arguments=tuple(arguments.items()),
            constants=(
                *self.constants().items(),
                *self.epilogue.heads().items(),
                ("OVERLAP", self.overlap),
                ("FLIGHT", self.tile.flight(self.shape.chunks)),
            ),
            aligned=aligned if self.shape.aligned else (),
            loose=("positions", "slots"),
            warps=self.tile.warps,
            stages=self.tile.stages,
            fused=self.epilogue.fused,
        )

    def _streamed(self, arguments: dict[str, str]) -> Kernel:
        constants: dict[str, Any] = {}
        for name, value in self.constants().items():
            if name not in ("SPLIT", "TOKENS", "STAGES", "UNROLL", "PORTABLE"):
                constants[name] = value
            if name == "ROWS":
                constants["AHEAD"] = self.tile.ahead
        return Kernel(
            module="linear_stream",
            function="stream",
            arguments=tuple(arguments.items()),
            constants=(*constants.items(), *self.epilogue.heads().items(), ("OVERLAP", self.overlap)),
            aligned=("n", "stride") if self.shape.aligned and not self.odd_stride else (),
            loose=("positions", "slots"),
            warps=self.tile.warps,
            fused=self.epilogue.fused,
            gluon=True,
        )


@cache  # layers are alike, and a start asks for all of them
def _kernel_of(variant: Variant) -> Kernel:
    return variant.make_kernel()


def shape_of(format_name: str, n: int, k: int, step: int = 0) -> Shape:
    """The shape of an (n, k) matrix under the contract."""
    layout = BY_NAME[format_name].gpu
    if layout is None:
        raise ValueError(f"{format_name} has no GPU layout")
    return Shape(
        format=format_name,
        k=k,
        step=step or layout.step(k),
        chunks=num_chunks(layout, n, k),
        aligned=n % 16 == 0,
    )


def most_split_tokens(shape: Shape) -> int:
    """A step of so many tokens, or fewer, has a program a chunk; of more, a program walks the chunks."""
    if shape.chunks == 1:
        return 0
    if shape.format in _WALKS_WELL:
        return 128
    return 256 if shape.chunks >= _MANY_CHUNKS or shape.format == "Q6_K" else 192


def choose_tile(shape: Shape, n: int, tokens: int, capability: int = 90) -> Tile:
    """The tile for a step of `tokens` on a GPU of compute capability `capability` (90 is 9.0).

    By what was fastest on an H100: `benchmarks/gpu_linear.py --only tune`.
    """
    split = tokens <= most_split_tokens(shape)
    if not 16 < tokens <= 256:
        tile = tile_of_width(shape, n, tokens, capability)
        return dataclasses.replace(tile, split=split)
    rows, width, warps = (
        _for_split(shape, tokens) if split else _for_some_tokens(shape, n, tokens, capability)
    )
    registers_are_short = capability < 90 and split and shape.format == "Q6_K"
    stages = 2 if registers_are_short or (shape.format in _NARROW and width == 128) else 3
    return _that_fits(
        shape, Tile(rows=rows, tokens=width, warps=warps, stages=stages, split=split), capability
    )


def _for_split(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """Rows, tokens and warps where a program a chunk is made; the last of a tile adds up its parts."""
    if shape.chunks >= _MANY_CHUNKS:
        return 64, 32 if tokens <= 192 else 64, 4
    if shape.format in _WITH_MINIMUM and tokens <= 128:
        return 64, 32, 4
    if tokens > 64 and shape.format in _WIDE_SPLIT:
        return 128, 64, 8
    return 64, 64, 4


def _for_some_tokens(shape: Shape, n: int, tokens: int, capability: int) -> tuple[int, int, int]:
    """Likewise where a program has whole sums, and there are too few to fill the GPU with wide tiles."""
    tiles = -(-n // 64)
    if tokens <= 64 and tiles * -(-tokens // 16) <= _ONE_EACH:
        return 64, 16, 4
    if tokens <= 32 or tiles * -(-tokens // 32) <= _ONE_EACH:
        return 64, 32, 4
    if shape.chunks > 1:
        if shape.format not in _SMALL_WALK:
            return 128, 64, 8
        return 64, 64 if capability >= 90 else 32, 4
    if tiles * -(-tokens // 64) <= 1.5 * _ONE_EACH:
        return 64, 64, 4
    if tokens > 192 and shape.format in _NARROW:
        return 64, 128, 4
    if tokens <= 192 or tiles * -(-tokens // 128) < 2 * _ONE_EACH:
        return 128, 64, 8
    return _for_many_tokens(shape, n, tokens, capability)


def tile_of_width(shape: Shape, n: int, tokens: int, capability: int = 90) -> Tile:
    """Of a product that is not split, and whose tokens come in tiles of that many, up to 128."""
    if tokens <= 16:
        rows, width, warps = 128 if n >= WIDE_ROWS else 64, 16, 4
    elif tokens <= 32:
        rows, width, warps = 64 if shape.step >= 256 or shape.format == "Q8_0" else 128, 32, 4
    elif tokens <= 64:
        rows, width, warps = 128, 64, 8
    else:
        rows, width, warps = _for_many_tokens(shape, n, tokens, capability)
    stages = 4 if tokens <= 16 and shape.chunks == 1 else 3
    return _that_fits(shape, Tile(rows=rows, tokens=width, warps=warps, stages=stages), capability)


def _for_many_tokens(shape: Shape, n: int, tokens: int, capability: int) -> tuple[int, int, int]:
    """Rows, tokens and warps where arithmetic is what takes the time."""
    large = -(-n // 128) * -(-tokens // 128) >= WANTED_PROGRAMS
    two_sums = shape.chunks > 1  # at 128 by 128 they fill the registers
    if capability < 90 and two_sums:
        return 64, 32 if shape.step >= 256 else 64, 4
    if not large or (shape.step >= 256 and (two_sums or capability < 90)):
        return 128, 64, 8
    if shape.format in _NARROW and not two_sums:
        return 128, 64, 4
    if shape.format in _SHORT and not two_sums:
        return 64, 128, 4
    return 128, 128, 8


def _that_fits(shape: Shape, tile: Tile, capability: int) -> Tile:
    """With as many stages as shared memory has room for."""
    room = _SHARED.get(capability, 99 << 10)
    layout = shape.layout
    x = 2 * shape.step * tile.tokens
    weights = tile.rows * (shape.step // layout.planes * (4 if layout.low_bits == 32 else 2))
    high = tile.rows * shape.step // layout.planes * 2 if layout.high_bits else 0
    stage = x + weights + high + tile.rows * layout.header_bytes(shape.step)
    stages = max(2, min(tile.stages, (room - 2048) // stage))
    return Tile(rows=tile.rows, tokens=tile.tokens, warps=tile.warps, stages=stages, split=tile.split)


def all_variants(
    shapes: list[tuple[str, int, int]], capability: int, tokens: tuple[int, ...] = (1, 32, 64, 128, 256, 4096)
) -> Iterator[Variant]:
    """Every kernel that steps of up to 4096 tokens of these (format, n, k) may need, each once."""
    seen: set[Variant] = set()
    for name, n, k in shapes:
        shape = shape_of(name, n, k)
        for count in tokens:
            variant = Variant(shape=shape, tile=choose_tile(shape, n, count, capability))
            if variant not in seen:
                seen.add(variant)
                yield variant


def compile_variant(variant: Variant, capability: int) -> Any:
    """As `compiler.compile_kernel`."""
    return compile_kernel(variant.kernel(), capability)
