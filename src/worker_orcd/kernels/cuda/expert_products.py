"""
Running products with the matrices of experts: which way a step goes, tiles, launches, and scratch memory.

For a few tokens a program has one of them, and may be `expert_stream`'s; for more, `sort` puts the tokens of
an expert together first. Either way, and whatever the tile, the bits are the same. Importing this needs
neither Triton nor a GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda.compiler import OVERLAPPING_TOKENS, Kernel, Kernels
from worker_orcd.kernels.cuda.expert_weights import PackedExperts
from worker_orcd.kernels.cuda.streaming import can_stream
from worker_orcd.kernels.cuda.variants import Epilogue, Shape, Tile, Variant, choose_tile, tile_of_width

MAX_PAIR_TOKENS = 8  # from more on, an expert's weights would be read too often: see `goes_by_pairs`
LONGEST_STREAM = 4096  # columns
_MOST_AHEAD, _MORE_AHEAD = 5, 15  # steps on their way to registers; more where programs are few
_FEW_PROGRAMS = 264  # two for each multiprocessor of an H100
NARROWEST = 16  # tokens of an expert that a program takes together
_BLOCKS = ((512, 4), (2048, 8), (8192, 16))  # pairs that a program of `sort` looks at together, and its warps
_OUT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Order:
    """What `ExpertProducts.sort` has written: see `experts.sort`."""

    entries: torch.Tensor  # (pairs,) int32
    tiles: torch.Tensor  # (num_tiles, 4) int32
    num_tiles: int
    width: int  # entries of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertVariant:
    """All that a compiled product depends on, beside the GPU."""

    shape: Shape
    tile: Tile
    slots: int
    shared: bool  # x is the same for all slots
    width: int = 0  # of the tiles of an order; 0: a program a pair
    paired: bool = False
    glu: Glu | None = None
    bias: bool = False
    out: str = "fp32"
    aligned: tuple[str, ...] = ("n", "x_stride", "y_stride")  # arguments that are multiples of 16
    portable: bool = False
    overlap: int = 0  # see `overlap`

    def kernel(self) -> Kernel:
        if self.tile.ahead:
            return self._streamed()
        dense = Variant(
            shape=self.shape, tile=self.tile, epilogue=Epilogue(bias=self.bias), portable=self.portable
        )
        types = dict(dense.kernel().arguments)
        arguments = {name: types[name] for name in ("w", "h", "s", "shifts", "x")} | {
            "y": f"*{self.out}", "bias": "*fp32", "experts": "*i32", "order": "*i32", "tiles": "*i32",
            "partials": "*fp32", "counters": "*i32", "n": "i32", "pairs": "i32", "x_stride": "i32",
            "y_stride": "i32",
        }  # fmt: skip
        constants: dict[str, Any] = dense.constants() | {
            "SLOTS": self.slots,
            "SHARED": self.shared,
            "WIDTH": self.width,
            "PAIRED": self.paired,
            "GLU": "" if self.glu is None else self.glu.value,
            "OVERLAP": self.overlap,
        }
        del constants["RESIDUAL"]
        return Kernel(
            module="experts",
            function="product",
            arguments=tuple(arguments.items()),
            constants=tuple(constants.items()),
            aligned=self.aligned,
            warps=self.tile.warps,
            stages=self.tile.stages,
            fused=False,  # a gated unit has the bits that `elementwise` gives it
        )

    def _streamed(self) -> Kernel:
        arguments = {
            "w": "*u16", "s": "*u32", "x": f"*{self.shape.operand}", "y": f"*{self.out}", "bias": "*fp32",
            "experts": "*i32", "n": "i32", "x_stride": "i32", "y_stride": "i32",
        }  # fmt: skip
        constants: dict[str, Any] = {
            "K": self.shape.k,
            "CHUNKS": self.shape.chunks,
            "ROWS": self.tile.rows,
            "TOKENS": self.tile.tokens,
            "AHEAD": self.tile.ahead,
            "SLOTS": self.slots,
            "SHARED": self.shared,
            "PAIRED": self.paired,
            "GLU": "" if self.glu is None else self.glu.value,
            "BIAS": self.bias,
            "OVERLAP": self.overlap,
        }
        return Kernel(
            module="expert_stream",
            function="stream",
            arguments=tuple(arguments.items()),
            constants=tuple(constants.items()),
            aligned=self.aligned,
            warps=self.tile.warps,
            fused=False,
            gluon=True,
        )


def choose_width(pairs: int, num_experts: int) -> int:
    """Entries of a tile: most experts' pairs should fill one, or a few of the widest."""
    return next((width for width in (16, 32, 64) if 1.5 * pairs <= width * num_experts), 128)


def goes_by_pairs(tokens: int, slots: int, num_experts: int) -> bool:
    """Whether a step is not sorted: hardly an expert is chosen twice. Measured, see docs/perf/gpu.md."""
    return tokens == 1 or (tokens <= MAX_PAIR_TOKENS and 2 * tokens * slots <= num_experts)


def choose_expert_tile(
    shape: Shape, n: int, pairs: int, width: int, capability: int = 90, *, streamed: bool = False
) -> Tile:
    """The tile of a product of `pairs` that are sorted into tiles of `width`, or 0 for a program a pair.

    `streamed`: it may be `expert_stream`'s. By what was fastest on an H100: `benchmarks/gpu_expert_tune.py`.
    """
    if width == 0:
        ahead = _steps_ahead(shape, n, pairs) if streamed else 0
        if ahead:
            return Tile(rows=64, tokens=8, warps=4, stages=1, ahead=ahead)
        return choose_tile(shape, n, 1, capability)
    if width < 128 and shape.format == "MXFP4" and capability == 90 and shape.steps_of_chunk % 3 == 0:
        return Tile(rows=128, tokens=width, warps=4, stages=3, unroll=3)
    tile = tile_of_width(shape, n, width if width < 128 else max(pairs, 128), capability)
    tokens = tile.tokens
    if shape.chunks > 1 and shape.layout.high_bits:
        tokens = min(tokens, 64)  # two sums, words and high words are more than 255 registers
    return dataclasses.replace(tile, tokens=tokens, split=False)


def _steps_ahead(shape: Shape, n: int, pairs: int) -> int:
    """Of `expert_stream`, or 0 where it is not for this shape."""
    if shape.format != "MXFP4" or shape.step != 64 or shape.k % 64 or shape.k > LONGEST_STREAM:
        return 0
    few = pairs * -(-n // 64) <= _FEW_PROGRAMS
    most = min(_MORE_AHEAD if few else _MOST_AHEAD, shape.steps_of_chunk)
    return next(ahead for ahead in range(most, 0, -1) if shape.steps_of_chunk % ahead == 0)


def sort_kernel(pairs: int, width: int, overlap: int = 0) -> Kernel:
    block, warps = next((one for one in _BLOCKS if pairs <= one[0]), _BLOCKS[-1])
    return Kernel(
        module="experts",
        function="sort",
        arguments=(("experts", "*i32"), ("order", "*i32"), ("tiles", "*i32"), ("pairs", "i32")),
        constants=(("WIDTH", width), ("BLOCK", block), ("COUNT", -(-pairs // block)), ("OVERLAP", overlap)),
        warps=warps,
    )


class ExpertProducts:
    """Products with experts on the current stream of one device. They share scratch memory: one at a time."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, device = kernels, kernels.device
        self._device = device
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)
        self._entries = torch.zeros(0, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(0, dtype=torch.int32, device=device)

    @property
    def scratch_bytes(self) -> int:
        return sum(one.nbytes for one in (self._partials, self._counters, self._entries, self._tiles))

    def reserve(self, weight: PackedExperts, tokens: int, slots: int) -> None:
        """Room for products of up to `tokens` with `weight`. Before any graph is captured."""
        split = min(tokens, MAX_PAIR_TOKENS) * slots
        if weight.shape.chunks > 1:
            self._partials = self._grown(self._partials, weight.shape.chunks * split * weight.n)
            self._counters = self._grown(self._counters, split * -(-weight.n // 64))
        self._entries = self._grown(self._entries, tokens * slots)
        tiles = tokens * slots // NARROWEST + weight.num_experts
        self._tiles = self._grown(self._tiles, 4 * tiles)

    def _grown(self, scratch: torch.Tensor, length: int) -> torch.Tensor:
        if length <= len(scratch):
            return scratch
        return torch.zeros(length, dtype=scratch.dtype, device=self._device)

    def sort(self, experts: torch.Tensor, num_experts: int, width: int | None = None) -> Order | None:
        """Put the pairs of each expert together, for the products that follow; None for a few tokens.

        `experts` (tokens, slots) int32, contiguous. The result is valid until the next sort. `width` is for
        experiments.
        """
        tokens, slots = experts.shape
        pairs = tokens * slots
        if width is None and goes_by_pairs(tokens, slots, num_experts):
            return None
        width = width or choose_width(pairs, num_experts)
        num_tiles = pairs // width + num_experts
        if pairs > len(self._entries) or 4 * num_tiles > len(self._tiles):
            raise ValueError(
                f"sorting {tokens} tokens of {slots} slots needs more scratch memory: see reserve"
            )
        order = Order(self._entries, self._tiles, num_tiles, width)
        kernel = sort_kernel(pairs, width, self._kernels.overlap_mode(tokens))
        self._kernels.launch(kernel, (num_experts, 1, 1), experts, order.entries, order.tiles, pairs)
        return order

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedExperts,
        experts: torch.Tensor,
        out: torch.Tensor,
        *,
        order: Order | None = None,
        glu: Glu | None = None,
        tile: Tile | None = None,
    ) -> torch.Tensor:
        """Each slot times its expert's matrix, plus the expert's bias.

        `x` is (tokens, k), the same for all slots, or (tokens, slots * k), of `weight.operand`; `experts`
        (tokens, slots) int32, contiguous; `order` what `sort` made of it. `out` is (tokens, slots * n). Of a
        paired weight it is, with `glu`, (tokens, slots * n / 2), else (tokens, slots * n) of which the first
        half of the columns are the gates. Rows of x and out may be further apart than they are long.
        """
        pairs, slots, k = experts.numel(), experts.shape[1], weight.shape.k
        width = 0 if order is None else order.width
        capability, overlap = self._kernels.capability, self._kernels.overlap
        streamed = can_stream(capability) and x.stride(0) % 16 == 0
        tile = tile or choose_expert_tile(weight.shape, weight.n, pairs, width, capability, streamed=streamed)
        self._check(x, weight, experts, out, glu, tile)
        if tile.ahead and (order is not None or x.stride(0) % 16):
            raise ValueError("what goes to registers is not sorted, and its rows start at multiples of 16")
        sizes = {"n": weight.n, "x_stride": x.stride(0), "y_stride": out.stride(0)}
        variant = ExpertVariant(
            shape=weight.shape,
            tile=tile,
            slots=slots,
            shared=x.shape[1] == k,
            width=width,
            paired=weight.paired,
            glu=glu,
            bias=weight.bias is not None,
            out=_OUT[out.dtype],
            aligned=tuple(name for name, value in sizes.items() if value % 16 == 0),
            overlap=overlap.product if len(x) <= OVERLAPPING_TOKENS else 0,
        )
        programs = pairs if order is None else order.num_tiles * (width // tile.tokens)
        grid = -(-weight.n // tile.rows), programs, weight.shape.chunks if tile.split else 1
        matrix = weight.matrix
        if tile.ahead:
            self._kernels.launch(
                variant.kernel(), grid, matrix.words, matrix.headers, x, out,
                out if weight.bias is None else weight.bias, experts,
                weight.n, sizes["x_stride"], sizes["y_stride"],
            )  # fmt: skip
            return out
        self._kernels.launch(
            variant.kernel(), grid,
            matrix.words, matrix.high, matrix.headers, matrix.shifts, x, out,
            out if weight.bias is None else weight.bias, experts,
            experts if order is None else order.entries, experts if order is None else order.tiles,
            self._partials if tile.split else out, self._counters,
            weight.n, pairs, sizes["x_stride"], sizes["y_stride"],
        )  # fmt: skip
        return out

    def _check(
        self,
        x: torch.Tensor,
        weight: PackedExperts,
        experts: torch.Tensor,
        out: torch.Tensor,
        glu: Glu | None,
        tile: Tile,
    ) -> None:
        """Raises ValueError for what the kernel would misread, or write where it may not."""
        (tokens, slots), k = experts.shape, weight.shape.k
        width = slots * (weight.n if glu is None else weight.n // 2)
        if x.shape not in ((tokens, k), (tokens, slots * k)) or out.shape != (tokens, width):
            raise ValueError(f"{tokens} tokens of {slots} slots: x {tuple(x.shape)}, out {tuple(out.shape)}")
        if glu is not None and not weight.paired:
            raise ValueError("a gated unit needs gates and what goes with them in one weight")
        if tile.split and weight.shape.chunks * tokens * slots * weight.n > len(self._partials):
            raise ValueError(f"a split product of {tokens} tokens needs more scratch memory: see reserve")
