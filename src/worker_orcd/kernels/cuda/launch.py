"""Running matrix products on a GPU: kernels by variant, and the memory that split products share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker_orcd.kernels.backend import AttentionParams, Glu
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import OVERLAPPING_TOKENS, Kernels
from worker_orcd.kernels.cuda.streaming import tile_for
from worker_orcd.kernels.cuda.variants import (
    MAX_SPLIT_TOKENS,
    Epilogue,
    Store,
    Tile,
    Variant,
    most_split_tokens,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix
from worker_orcd.kernels.cuda.wide import SCRATCH_BYTES, Cut, WideProducts, cut_for

_OUT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_COUNTERS = 1 << 14  # row tiles times token tiles of a split product


@dataclass(frozen=True, slots=True)
class HeadsTo:
    """Where a product of q, k and v puts k and v, and how it rotates: see `linear.store_heads`."""

    params: AttentionParams
    cache: torch.Tensor  # (2, num_blocks, num_kv_heads, block_size, head_dim), contiguous
    positions: torch.Tensor  # (tokens,) int32
    slots: torch.Tensor  # likewise
    table: torch.Tensor | None  # of `operations.rope_table`

    @property
    def store(self) -> Store:
        params = self.params
        return Store(
            num_heads=params.num_heads,
            num_kv_heads=params.num_kv_heads,
            cache_block=self.cache.shape[3],
            rotated=self.table is not None,
            fp8=self.cache.dtype == FP8,
        )

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """The kernel's."""
        table = self.cache if self.table is None else self.table
        return self.cache, self.positions, self.slots, table, self.cache.stride(0)


def _nowhere(out: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """`HeadsTo.arguments` of what has no heads."""
    return out, out, out, out, 0


def _columns(weight: PackedMatrix, glu: Glu | None, heads: HeadsTo | None) -> int:
    """Of the output. Raises ValueError where the weight's rows do not lie so."""
    if glu is not None:
        return weight.n // 2
    if heads is None:
        return weight.n
    params = heads.params
    all_heads = params.num_heads + 2 * params.num_kv_heads
    if weight.head != params.head_dim or weight.n != all_heads * params.head_dim:
        raise ValueError(f"a weight of {weight.n} rows, heads of {weight.head}, for {params}")
    return params.num_heads * params.head_dim


class Products:
    """Matrix products on the current stream of one device. They share scratch memory: one at a time."""

    def __init__(self, kernels: Kernels, wide_bytes: int = SCRATCH_BYTES) -> None:
        """`wide_bytes`: see `WideProducts`."""
        self._kernels, device = kernels, kernels.device
        self._device = device
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self.wide = WideProducts(kernels, wide_bytes)

    @property
    def scratch_bytes(self) -> int:
        return self._partials.nbytes + self._counters.nbytes + self.wide.scratch_bytes

    def reserve(self, weight: PackedMatrix, tokens: int = MAX_SPLIT_TOKENS) -> None:
        """Scratch memory for `weight`'s products of up to `tokens`. Before any graph is captured."""
        self.wide.reserve(weight, tokens)
        self.make_room(weight.shape.chunks * min(tokens, most_split_tokens(weight.shape)) * weight.n)

    def make_room(self, num_parts: int) -> None:
        """For so many float32, if there is less."""
        if num_parts > len(self._partials):
            self._partials = torch.empty(num_parts, dtype=torch.float32, device=self._device)

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedMatrix,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        glu: Glu | None = None,
        heads: HeadsTo | None = None,
        tile: Tile | Cut | None = None,
    ) -> torch.Tensor:
        """`out` (tokens, n) = x (tokens, k) @ weight.T, then + bias (n,), then + residual (tokens, n).

        x is of `weight.operand`, bias (in the order of the weight's rows) and residual float32. With `glu`,
        of a paired weight, out is (tokens, n / 2); without, the gates of a paired weight are the first half
        of the columns. x is contiguous; rows of out and residual may be further apart than they are long, by
        the same distance. All on this device.
        """
        tokens, n, capability = len(x), weight.n, self._kernels.capability
        if glu is not None and (residual is not None or not weight.paired):
            raise ValueError("a gated unit needs a weight of gates and what goes with them, and no residual")
        if out.shape != (tokens, _columns(weight, glu, heads)):
            raise ValueError(f"{tokens} tokens, a weight of {n} rows: out is {tuple(out.shape)}")
        tile = tile or cut_for(weight.shape, n, tokens, capability)
        tile = tile or tile_for(weight.shape, n, tokens, capability)
        epilogue = Epilogue(
            bias=bias is not None,
            residual=residual is not None,
            paired=weight.paired,
            glu=glu,
            head=weight.head,
            store=None if heads is None else heads.store,
            out=_OUT[out.dtype],
        )
        rest = (
            out if bias is None else bias,
            out if residual is None else residual,
            *(_nowhere(out) if heads is None else heads.arguments),
        )
        if isinstance(tile, Cut):
            self.wide.run(x, weight, out, tile, epilogue, rest)
        else:
            self._by_tile(x, weight, out, tile, epilogue, rest)
        return out

    def _by_tile(
        self,
        x: torch.Tensor,
        weight: PackedMatrix,
        out: torch.Tensor,
        tile: Tile,
        epilogue: Epilogue,
        rest: Sequence[torch.Tensor | int],
    ) -> None:
        """`rest`: the kernel's bias and residual, and what is behind its `stride`."""
        tokens, n, chunks = len(x), weight.n, weight.shape.chunks
        if tile.split and chunks * tokens * n > len(self._partials):
            raise ValueError(f"a split product of {tokens} tokens needs more scratch memory: see reserve")
        bias, residual, *ends = rest
        variant = Variant(
            shape=weight.shape,
            tile=tile,
            epilogue=epilogue,
            odd_stride=out.stride(0) % 16 != 0,
            overlap=self._kernels.overlap.product if tokens <= OVERLAPPING_TOKENS else 0,
        )
        grid = -(-n // tile.rows), -(-tokens // tile.tokens), chunks if tile.split else 1
        self._kernels.launch(
            variant.kernel(), grid,
            weight.words, weight.high, weight.headers, weight.shifts, x, out,
            self._partials if tile.split else out, self._counters, bias, residual,
            n, tokens, out.stride(0), *ends,
        )  # fmt: skip
