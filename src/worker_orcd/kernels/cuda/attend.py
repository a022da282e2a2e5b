"""
Running attention on a GPU: how a layer's heads are cut up, launches, and the memory that split rows share.

Once a step, for each kind of layer, `plans` turns the step's rows into units of work on the device; each
layer then runs them. What is launched depends on the bucket alone. Importing this needs neither Triton nor a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE, NATIVE_FP8
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels

FEW_TOKENS = 256  # up to here a program has 64 rows (a query's heads are rows), beyond 128
CAPACITY = 2048  # queries times splits that may wait in memory
START = 4.0  # tiles of keys in whose time a program begins a unit
SPLITTING = 4.0  # and in whose time the parts of a row come together
_CHUNK = 128  # units that `plan` writes at a time
_RECORD = 16  # integers of a unit
_WIDEST = 128  # columns of the values that a program has
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", FP8: "*u8",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a program is. It changes no bits, as long as there are 64 rows or more."""

    rows: int
    warps: int
    stages: int  # tiles of keys and of values in shared memory
    programs: int  # on a multiprocessor


def choose_tile(head_dim: int, tokens: int, capability: int = 90, cache: torch.dtype = torch.float16) -> Tile:
    """The tile for a step of `tokens` on a GPU of compute capability `capability` (90 is 9.0)."""
    if cache == FP8:
        head_dim = sum(pieces(head_dim, padded=True))
    if capability < 90:
        warps = 4 if head_dim < _WIDEST else 8  # whose registers hold what wide heads need
        return Tile(rows=64, warps=warps, stages=3 if head_dim <= 64 else 2, programs=8 // warps)
    if head_dim > _WIDEST and cache == FP8:  # which more rows would have no registers for
        return Tile(rows=64, warps=8, stages=2, programs=1)
    if head_dim > _WIDEST or tokens > FEW_TOKENS:
        return Tile(rows=128, warps=8, stages=3 if head_dim <= 64 else 2, programs=1)
    return Tile(rows=64, warps=4, stages=3 if head_dim <= 64 else 2, programs=2)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the heads of a kind of layer are shared out among programs. It changes no bits."""

    params: AttentionParams
    rows: int
    padded: bool = False  # a head that is no power of two is one piece, up to the next one

    @property
    def group(self) -> int:
        """Heads that share keys, all of them rows of one tile."""
        return self.params.num_heads // self.params.num_kv_heads

    @property
    def head_tiles(self) -> int:
        return -(-self.group // self.rows)

    @property
    def heads(self) -> int:
        """Of a tile."""
        return -(-self.group // self.head_tiles)

    @property
    def queries(self) -> int:
        """Of a tile."""
        return max(1, self.rows // self.heads)

    @property
    def keys(self) -> tuple[int, int]:
        """Columns of a head, as powers of two."""
        return pieces(self.params.head_dim, padded=self.padded)

    @property
    def value_parts(self) -> int:
        return -(-self.params.head_dim // _WIDEST)

    @property
    def values(self) -> tuple[int, int]:
        """Columns that a program has, likewise."""
        return pieces(self.params.head_dim // self.value_parts, padded=self.padded)

    @property
    def lanes(self) -> int:
        return self.params.num_kv_heads * self.head_tiles * self.value_parts


def pieces(columns: int, *, padded: bool) -> tuple[int, int]:
    """`columns` as the sum of a power of two and a lower one, or 0. Raises ValueError where it is none.

    `padded`: the next power of two, and 0.
    """
    first = 1 << (columns.bit_length() - 1)
    rest = columns - first
    if columns < 16 or (rest and (rest < 16 or rest & (rest - 1))):
        raise ValueError(f"heads of {columns} columns; the kernels take one or two powers of two from 16 on")
    return (2 * first, 0) if rest and padded else (first, rest)


def num_splits(context: int) -> int:
    """Of a row of so many keys, at least one: see `attention.split_of`."""
    last = max(0, context - 1)
    near, far = min(last // 128, (last + 1024) // 256), min((last + 6144) // 512, (last + 28672) // 1024)
    return min(near, far, (last + 122880) // 2048) + 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a list of work depends on, beside the step."""

    window: int
    lanes: int
    queries: int
    programs: int


class Attention:
    """Of one device, on its current stream: one layer at a time."""

    def __init__(
        self,
        kernels: Kernels,
        limits: Limits,
        *,
        cache: torch.dtype = torch.float16,
        choose: Callable[[int, int, int, torch.dtype], Tile] = choose_tile,
        start: float = START,
        splitting: float = SPLITTING,
    ) -> None:
        """`cache`: what keys and values are. `start`, `splitting`: as the constants. They and `choose` change
        no bits.
        """
        self._kernels, self._limits, self._cache = kernels, limits, cache
        self._choose, self._start, self._splitting = choose, start, splitting
        device = kernels.device
        self._kinds: set[AttentionParams] = set()
        self._work: dict[_Plan, torch.Tensor] = {}
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self._sums = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    @property
    def scratch_bytes(self) -> int:
        own = self._parts, self._sums, self._counters, *self._work.values()
        return sum(tensor.nbytes for tensor in own)

    def reserve(self, params: AttentionParams) -> None:
        """Make room for layers of this kind. Before any graph is captured. Raises ValueError."""
        self._kinds.add(params)
        device = self._kernels.device
        for tokens in (1, self._limits.max_tokens):
            cut, tile = self._cut(params, tokens)
            slots = CAPACITY * params.num_heads * cut.value_parts
            if slots * sum(cut.values) > len(self._parts):
                self._parts = torch.empty(slots * sum(cut.values), dtype=torch.float32, device=device)
            if 2 * slots > len(self._sums):
                self._sums = torch.empty(2 * slots, dtype=torch.float32, device=device)
            if CAPACITY * cut.lanes > len(self._counters):
                self._counters = torch.zeros(CAPACITY * cut.lanes, dtype=torch.int32, device=device)
            units = -(-self._limits.max_tokens // cut.queries) + self._limits.max_rows + CAPACITY
            plan = self._plan_of(cut, tile)
            if plan not in self._work:
                self._work[plan] = torch.zeros((1 + units) * _RECORD, dtype=torch.int32, device=device)

    def _cut(self, params: AttentionParams, tokens: int) -> tuple[Cut, Tile]:
        tile = self._choose(params.head_dim, tokens, self._kernels.capability, self._cache)
        return Cut(params, tile.rows, padded=self._cache == FP8), tile

    def _plan_of(self, cut: Cut, tile: Tile) -> _Plan:
        programs = tile.programs * self._kernels.multiprocessors
        return _Plan(cut.params.window or 0, cut.lanes, cut.queries, programs)

    def _with_work(self, plan: _Plan, tokens: int) -> int:
        """Programs of a layer: no more than a step of so many tokens can have work for."""
        return min(plan.programs, tokens * num_splits(self._limits.longest) * plan.lanes)

    def plans(self, inputs: BatchInputs, tokens: int) -> list[Callable[[], None]]:
        """What a step of up to `tokens` launches before its layers, once for each kind of them."""
        kinds = sorted(self._kinds, key=repr)
        plans = dict.fromkeys(self._plan_of(*self._cut(params, tokens)) for params in kinds)
        return [partial(self._plan, inputs, tokens, plan) for plan in plans]

    def _plan(self, inputs: BatchInputs, tokens: int, plan: _Plan) -> None:
        rows = min(tokens, self._limits.max_rows)
        arguments = (
            ("query_start", "*i32"), ("context_lens", "*i32"), ("work", "*i32"), ("rows", "i32"),
            ("programs", "i32"),
        )  # fmt: skip
        constants = {
            "LANES": plan.lanes, "QUERIES": plan.queries, "WINDOW": plan.window, "CAPACITY": CAPACITY,
            "START": self._start, "SPLITTING": self._splitting,
            "MAX_ROWS": max(2, 1 << (rows - 1).bit_length()), "CHUNK": _CHUNK,
        }  # fmt: skip
        constants["OVERLAP"] = self._kernels.overlap_mode(tokens)
        kernel = Kernel(
            module="attention", function="plan", arguments=arguments, constants=tuple(constants.items())
        )
        self._kernels.launch(
            kernel, (rows, 1, 1),
            inputs.query_start, inputs.context_lens, self._work[plan], rows, plan.programs,
        )  # fmt: skip

    def run(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        inputs: BatchInputs,
        out: torch.Tensor,
        params: AttentionParams,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Each query over what its row's cache holds up to it. `plans` has run, on the same step.

        q (tokens, num_heads * head_dim) of the cache's type, float16 where that is fp8; out likewise,
        float32, float16 or bfloat16, contiguous; sinks (num_heads,) float32. What is no query of a row is
        not written.
        """
        cut, tile = self._cut(params, len(q))
        keys_values, table = cache.tensor, inputs.block_tables[cache.group]
        fp8 = keys_values.dtype == FP8
        if q.dtype != (torch.float16 if fp8 else self._cache) or keys_values.dtype != self._cache:
            raise ValueError(f"queries of {q.dtype} and keys of {keys_values.dtype}, not {self._cache}")
        if not out.is_contiguous():
            raise ValueError("rows of results with gaps")
        if not params.scale > 0:
            raise ValueError(f"scores are multiplied by {params.scale}; it must be positive")
        plan = self._plan_of(cut, tile)
        self._kernels.launch(
            attend_kernel(
                cut, tile, keys_values.shape[3], (q.dtype, keys_values.dtype, out.dtype),
                sinks=sinks is not None, native=self._kernels.capability >= NATIVE_FP8,
                overlap=self._kernels.overlap_mode(len(q)),
            ),
            (self._with_work(plan, len(q)), 1, 1),
            q, keys_values, table, self._work[plan], out if sinks is None else sinks, out, self._parts,
            self._sums, self._counters, params.scale / (KEY_SCALE if fp8 else 1.0), keys_values.stride(0),
            keys_values.stride(1), q.stride(0), table.stride(0),
        )  # fmt: skip
        return out


def attend_kernel(
    cut: Cut,
    tile: Tile,
    block_size: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    *,
    sinks: bool,
    native: bool,
    overlap: int = 0,
) -> Kernel:
    """The kernel of one kind of layer. `dtypes`: of queries, of the cache, of results.

    `native`: the GPU has instructions for fp8.
    """
    params = cut.params
    q, cache, out = (_TYPES[dtype] for dtype in dtypes)
    arguments = {
        "q": q, "cache": cache, "table": "*i32", "work": "*i32", "sinks": "*fp32", "out": out,
        "parts": "*fp32", "sums": "*fp32", "counters": "*i32", "scale": "fp32", "values": "i64",
        "block_stride": "i64", "q_stride": "i32", "table_stride": "i32",
    }  # fmt: skip
    (d0, d1), (v0, v1) = cut.keys, cut.values
    constants = {
        "HEADS": params.num_heads, "KV_HEADS": params.num_kv_heads, "HEAD_TILES": cut.head_tiles,
        "D": params.head_dim, "D0": d0, "D1": d1, "V": params.head_dim // cut.value_parts, "V0": v0, "V1": v1,
        "VALUE_PARTS": cut.value_parts, "ROWS": cut.rows,
        "BLOCK_SIZE": block_size, "WINDOW": params.window or 0, "SINKS": sinks,
        "NATIVE": native,
        "MERGED": min(16, 1 << (cut.heads - 1).bit_length()),  # rows whose parts are merged at a time
        "AT_ONCE": 8 if sum(cut.values) < _WIDEST else 4,  # splits that are on their way then
        "OVERLAP": overlap,
    }  # fmt: skip
    return Kernel(
        module="attention",
        function="attend",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        aligned=("values", "block_stride", "q_stride"),
        loose=("table",),
        warps=tile.warps,
        stages=tile.stages,
        fused=False,
    )
