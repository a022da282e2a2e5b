"""
The native CPU backend: weights packed for the C kernels, a forward pass traced once, a step as one call.

Tensors are `program.Value`s: an operation called while `compile` traces records itself and returns where its
result will be. Nothing runs then. A step fills counts into the batch structure and calls `orcd_run`, which
releases the interpreter lock.

The kernels keep the arithmetic contract of `kernels.backend` whatever the number of threads and the
instruction set. The thread pool belongs to the process, not to a backend: the last one made sets its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from errno import ENOMEM
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.config import DeviceConfig
from worker_orcd.errors import Internal, InvalidConfiguration, OutOfMemory
from worker_orcd.kernels.backend import (
    CLAMPED_SWIGLU_ALPHA,
    CLAMPED_SWIGLU_LIMIT,
    AttentionParams,
    BatchInputs,
    CompiledForward,
    Counts,
    Forward,
    Glu,
    LayerCache,
    Limits,
    Matrix,
    RopeParams,
)
from worker_orcd.kernels.cpu.cores import check_threads, usable_cores
from worker_orcd.kernels.cpu.inputs import allocate_cpu_inputs, check_counts
from worker_orcd.kernels.cpu.library import Batch, Kind, Library, Rows
from worker_orcd.kernels.cpu.memory import HostMemory, available_memory, check_cache, unused_memory
from worker_orcd.kernels.cpu.program import (
    ROUTING_LISTS,
    InputName,
    Linked,
    Program,
    Recorded,
    RoutingValue,
    Value,
    aligned_zeros,
    fresh,
    link,
)
from worker_orcd.kernels.cpu.weights import (
    NativeExperts,
    NativeWeight,
    PackedExperts,
    pack_experts,
    pack_matrices,
)
from worker_orcd.kernels.memory import Widths, Workspaces

_ACTIVATIONS = {"int8": 8, "int16": 16, "float32": 32}
_SCRATCH_BYTES = 4 << 20  # of a thread: scores, values, a panel of unpacked weights


@dataclass(frozen=True, slots=True)
class NativeCache:
    """One layer's blocks, laid out by attention.h."""

    data: NDArray[np.uint8]
    block_size: int
    num_kv_heads: int
    head_dim: int


class NativeBackend:
    """Implements `kernels.backend.Backend` on the native library."""

    name = "cpu"

    def __init__(self, library: Library, config: DeviceConfig) -> None:
        """Raises InvalidConfiguration for a number of threads the pool cannot have, or an fp8 KV cache."""
        check_cache(config.kv_cache_dtype)
        self._library, self.memory = library, HostMemory()
        threads = usable_cores() if config.cpu_threads is None else check_threads(config.cpu_threads)
        if not library.set_threads(threads):
            raise InvalidConfiguration(f"a pool of {threads} threads cannot be made")
        self._threads = threads
        self._activations = _ACTIVATIONS[config.cpu_activations]
        wide_cache = config.kv_cache_dtype == "float32" or (
            config.kv_cache_dtype == "auto" and config.cpu_activations == "float32"
        )
        self._cache_dtype = 0 if wide_cache else 1
        self._program: Program | None = None  # being traced
        self._angles: dict[RopeParams, Value] = {}  # of the program being traced
        self.description = (
            f"{library.isa}, {threads} {'thread' if threads == 1 else 'threads'}, "
            f"{config.cpu_activations} activations, {'float32' if wide_cache else 'float16'} KV cache"
        )

    # -- memory ------------------------------------------------------------------------------------------

    def available_memory(self) -> int:
        return available_memory()

    def displaces_files(self, num_bytes: int) -> bool:
        return num_bytes > unused_memory()

    def matrix(
        self,
        parts: Sequence[Matrix],
        bias: Sequence[NDArray[np.float32] | None] = (),
        *,
        gated: bool = False,
        head_dim: int = 0,
    ) -> NativeWeight:
        """Rows lie as they come, whatever they are. Raises UnsupportedFormat naming the tensor;
        InsufficientMemory.
        """
        return pack_matrices(self._library, parts, bias, self._threads)

    def experts(
        self,
        parts: Sequence[Matrix],
        num_experts: int,
        bias: Sequence[NDArray[np.float32] | None] = (),
    ) -> NativeExperts:
        """Raises as `matrix` does."""
        return pack_experts(self._library, parts, num_experts, bias, self._threads)

    def embedding(self, table: Matrix) -> NativeWeight:
        """Raises as `matrix` does. One packed copy serves `embed` and `linear`."""
        return pack_matrices(self._library, (table,), (), self._threads)

    def vector(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array(values, dtype=np.float32, order="C")

    def allocate_inputs(self, limits: Limits) -> BatchInputs:
        return allocate_cpu_inputs(limits)

    def allocate_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> LayerCache:
        """Raises InsufficientMemory; InvalidConfiguration for a block size that is not a multiple of 16."""
        size = num_blocks * self.cache_block_bytes(block_size, num_kv_heads, head_dim)
        memory = aligned_zeros(size, "the KV blocks of one layer")
        return LayerCache(NativeCache(memory, block_size, num_kv_heads, head_dim))

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        size = self._library.cache_block_bytes(block_size, num_kv_heads, head_dim, self._cache_dtype)
        if size is None:
            raise InvalidConfiguration(f"block_size is {block_size}; the CPU backend needs a multiple of 16")
        return size

    # -- operations --------------------------------------------------------------------------------------

    def embed(self, indices: Any, table: NativeWeight) -> Value:
        kind = Kind.EMBED_POSITIONS if indices == InputName("positions") else Kind.EMBED
        _check_input(indices, "positions" if kind is Kind.EMBED_POSITIONS else "token_ids")
        (part,) = table.parts
        out = fresh(part.k, Rows.TOKENS)
        self._record(
            kind,
            out,
            owners=(table,),
            n=part.n,
            k=part.k,
            weight=part.data.ctypes.data,
            format=part.ggml_type,
        )
        return out

    def linear(self, x: Value, weight: NativeWeight) -> Value:
        _check_width(x, weight.k, "linear")
        out = fresh(weight.n, x.rows)
        for part in weight.parts:
            bias = None if weight.bias is None else weight.bias.ctypes.data + 4 * part.column
            self._record(
                Kind.LINEAR,
                out.columns(part.column, part.n),
                x,
                owners=(weight,),
                n=part.n,
                k=part.k,
                weight=part.data.ctypes.data,
                format=part.ggml_type,
                activations=self._activations,
                vector=bias,
            )
        return out

    def split(self, x: Value, widths: Sequence[int]) -> tuple[Value, ...]:
        _check_width(x, sum(widths), "split")
        columns = [sum(widths[:index]) for index in range(len(widths))]
        return tuple(x.columns(column, width) for column, width in zip(columns, widths, strict=True))

    def rms_norm(self, x: Value, gain: NDArray[np.float32], eps: float) -> Value:
        _check_tensor(x, "rms_norm")
        if x.width % gain.shape[0]:
            raise Internal(f"rms_norm: {x.width} columns are not runs of {gain.shape[0]}")
        out = fresh(x.width, x.rows)
        self._record(
            Kind.RMS_NORM,
            out,
            x,
            owners=(gain,),
            n=x.width,
            width=gain.shape[0],
            vector=gain.ctypes.data,
            f0=eps,
        )
        return out

    def layer_norm(self, x: Value, gain: NDArray[np.float32], bias: NDArray[np.float32], eps: float) -> Value:
        for vector in (gain, bias):
            _check_width(x, vector.shape[0], "layer_norm")
        out = fresh(x.width, x.rows)
        self._record(
            Kind.LAYER_NORM,
            out,
            x,
            owners=(gain, bias),
            n=x.width,
            vector=gain.ctypes.data,
            weight=bias.ctypes.data,
            f0=eps,
        )
        return out

    def rope(self, x: Value, positions: Any, params: RopeParams, head_dim: int) -> Value:
        _check_input(positions, "positions")
        _check_tensor(x, "rope")
        heads, rest = divmod(x.width, head_dim)
        if rest or not 0 < params.rotary_dim <= head_dim or params.rotary_dim != 2 * len(params.inv_freq):
            raise Internal(
                f"rope: {x.width} columns, heads of {head_dim}, {params.rotary_dim} of them rotated by "
                f"{len(params.inv_freq)} frequencies"
            )
        out = fresh(x.width, x.rows)
        angles = self._rope_angles(params)
        self._record(
            Kind.ROPE, out, x, angles, n=x.width, width=params.rotary_dim, num_heads=heads, head_dim=head_dim
        )
        return out

    def _rope_angles(self, params: RopeParams) -> Value:
        """The cos and sin of the step's positions: (tokens, rotary_dim), computed once a step."""
        if params not in self._angles:
            frequencies = np.array(params.inv_freq, dtype=np.float64)
            angles = fresh(params.rotary_dim, Rows.TOKENS)
            self._record(
                Kind.ROPE_ANGLES,
                angles,
                owners=(frequencies,),
                n=params.rotary_dim,
                width=params.rotary_dim,
                weight=frequencies.ctypes.data,
                f0=params.attention_factor,
            )
            self._angles[params] = angles
        return self._angles[params]

    def store_kv(self, k: Value, v: Value, cache: LayerCache, inputs: BatchInputs) -> None:
        _check_input(inputs.slots, "slots")
        blocks: NativeCache = cache.tensor
        for value in (k, v):
            _check_width(value, blocks.num_kv_heads * blocks.head_dim, "store_kv")
        self._record(Kind.STORE_KV, None, k, v, owners=(blocks,), **self._cache_fields(cache))

    def attention(
        self,
        q: Value,
        cache: LayerCache,
        inputs: BatchInputs,
        params: AttentionParams,
        sinks: NDArray[np.float32] | None = None,
    ) -> Value:
        _check_input(inputs.block_tables, "block_tables")
        blocks: NativeCache = cache.tensor
        found, held = (params.num_kv_heads, params.head_dim), (blocks.num_kv_heads, blocks.head_dim)
        if found != held or params.num_heads % params.num_kv_heads:
            raise Internal(
                f"attention: {params.num_heads} heads, {params.num_kv_heads} KV heads of {params.head_dim}; "
                f"the cache has {blocks.num_kv_heads} of {blocks.head_dim}"
            )
        _check_width(q, params.num_heads * params.head_dim, "attention")
        if sinks is not None and sinks.shape != (params.num_heads,):
            raise Internal(f"attention: {params.num_heads} heads, {sinks.shape[0]} sinks")
        out = fresh(q.width, q.rows)
        self._record(
            Kind.ATTENTION,
            out,
            q,
            owners=(blocks, sinks),
            num_heads=params.num_heads,
            vector=None if sinks is None else sinks.ctypes.data,
            width=0 if params.window is None else params.window,
            f0=params.scale,
            **self._cache_fields(cache),
        )
        return out

    def _cache_fields(self, cache: LayerCache) -> dict[str, Any]:
        blocks: NativeCache = cache.tensor
        return {
            "group": cache.group,
            "num_kv_heads": blocks.num_kv_heads,
            "head_dim": blocks.head_dim,
            "block_size": blocks.block_size,
            "cache": blocks.data.ctypes.data,
            "cache_dtype": self._cache_dtype,
        }

    def glu(self, kind: Glu, gate: Value, up: Value) -> Value:
        if kind is Glu.CLAMPED_SWIGLU:
            limits = {"f0": CLAMPED_SWIGLU_LIMIT, "f1": CLAMPED_SWIGLU_ALPHA}
            return self._columnwise(Kind.CLAMPED_SWIGLU, gate, up, **limits)
        return self._columnwise({Glu.SWIGLU: Kind.SWIGLU, Glu.GEGLU: Kind.GEGLU}[kind], gate, up)

    def gelu(self, x: Value) -> Value:
        return self._columnwise(Kind.GELU, x, None)

    def route(self, logits: Value, top_k: int) -> RoutingValue:
        """Raises Internal for more slots than experts."""
        _check_tensor(logits, "route")
        if not 1 <= top_k <= logits.width:
            raise Internal(f"route: {top_k} of {logits.width} experts")
        entries = fresh(ROUTING_LISTS * top_k, logits.rows)
        self._record(Kind.ROUTE, entries, logits, n=logits.width, top_k=top_k)
        return RoutingValue(entries, logits.width, top_k)

    def expert_linear(self, x: Value, weight: NativeExperts, routing: RoutingValue) -> tuple[Value, ...]:
        """Raises Internal for a routing to another number of experts."""
        _check_routing(routing, x, "expert_linear")
        if routing.num_experts != weight.num_experts:
            raise Internal(f"expert_linear: {weight.num_experts} experts, a routing to {routing.num_experts}")
        shared = x.width == weight.k
        _check_width(x, weight.k if shared else routing.top_k * weight.k, "expert_linear")
        return tuple(self._expert_linear(x, part, routing, shared) for part in weight.parts)

    def _expert_linear(self, x: Value, part: PackedExperts, routing: RoutingValue, shared: bool) -> Value:
        out = fresh(routing.top_k * part.n, x.rows)
        self._record(
            Kind.EXPERT_LINEAR,
            out,
            x,
            routing.entries,
            owners=(part,),
            n=part.n,
            k=part.k,
            weight=part.data.ctypes.data,
            format=part.ggml_type,
            activations=self._activations,
            vector=None if part.bias is None else part.bias.ctypes.data,
            width=0 if shared else part.k,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
        )
        return out

    def combine(self, x: Value, routing: RoutingValue) -> Value:
        _check_routing(routing, x, "combine")
        width, rest = divmod(x.width, routing.top_k)
        if rest:
            raise Internal(f"combine: {x.width} columns are not {routing.top_k} slots")
        out = fresh(width, x.rows)
        self._record(Kind.COMBINE, out, x, routing.entries, n=width, top_k=routing.top_k)
        return out

    def add(self, x: Value, y: Value) -> Value:
        return self._columnwise(Kind.ADD, x, y)

    def scale(self, x: Value, factor: float) -> Value:
        return self._columnwise(Kind.SCALE, x, None, f0=factor)

    def _columnwise(self, kind: Kind, x: Value, y: Value | None, **fields: Any) -> Value:
        for value in (x,) if y is None else (x, y):
            _check_tensor(value, kind.name.lower())
        if y is not None and (y.width, y.rows) != (x.width, x.rows):
            raise Internal(
                f"{kind.name.lower()}: {x.width} columns of {x.rows.name}, {y.width} of {y.rows.name}"
            )
        out = fresh(x.width, x.rows)
        self._record(kind, out, x, y, n=x.width, **fields)
        return out

    def take(self, x: Value, indices: Any) -> Value:
        _check_input(indices, "logit_tokens")
        _check_tensor(x, "take")
        if x.rows is not Rows.TOKENS:
            raise Internal("take: the tensor has a row for each logit already")
        out = fresh(x.width, Rows.LOGITS)
        self._record(Kind.TAKE, out, x, n=x.width)
        return out

    def _record(
        self,
        kind: Kind,
        out: Value | None,
        x: Value | None = None,
        y: Value | None = None,
        *,
        owners: tuple[Any, ...] = (),
        **fields: Any,
    ) -> None:
        if self._program is None:
            raise Internal(f"{kind.name.lower()} outside compile: this backend only records operations")
        self._program.record(Recorded(kind, x, y, out, fields, owners))

    # -- running -----------------------------------------------------------------------------------------

    def compile(self, forward: Forward, inputs: BatchInputs, limits: Limits) -> CompiledForward:
        """Raises InsufficientMemory; Internal for shapes that do not fit together."""
        program = Program()
        self._program, self._angles = program, {}
        try:
            result: Value = forward(BatchInputs(*(InputName(entry.name) for entry in fields(BatchInputs))))
        finally:
            self._program, self._angles = None, {}
        for operation in program.operations:
            if (group := operation.fields.get("group", 0)) >= limits.num_groups:
                raise Internal(f"a layer of cache group {group}; a step has {limits.num_groups} of them")
        return NativeStep(self._library, link(program, result, limits), inputs, limits)

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces:
        # Alive at once: the residual, an operation's two inputs and its output, the rope angles; then logits.
        # As much again for what the kernels keep: quantised activations, parts of split attention.
        numbers = 8 * limits.max_tokens * (widths.widest + 16) + limits.max_rows * (widths.vocab_size + 16)
        return Workspaces(buffers_bytes=4 * numbers + self._threads * _SCRATCH_BYTES)

    def close(self) -> None:
        """Nothing is held but memory, which goes with the backend and the steps it compiled."""


class NativeStep:
    """A compiled forward pass: owns the arena and keeps alive whatever the operations point to."""

    def __init__(self, library: Library, linked: Linked, inputs: BatchInputs, limits: Limits) -> None:
        self._library, self._linked, self._inputs, self._limits = library, linked, inputs, limits
        pointers = {entry.name: getattr(inputs, entry.name).data_ptr() for entry in fields(BatchInputs)}
        self._batch = Batch(
            **pointers,
            slots_stride=inputs.slots.stride(0),
            block_group_stride=inputs.block_tables.stride(0),
            block_table_stride=inputs.block_tables.stride(1),
        )
        self._num_ops = len(linked.ops)
        self._result = torch.as_tensor(linked.result)
        self._result_rows = linked.result_rows

    def __call__(self, counts: Counts) -> torch.Tensor:
        """Raises OutOfMemory or Internal, the latter naming the operation."""
        check_counts(counts, self._limits)
        batch = self._batch
        batch.num_tokens, batch.num_rows = counts.num_tokens, counts.num_rows
        batch.num_logits = counts.num_logits
        error = self._library.run(self._linked.ops, self._num_ops, batch)
        if error:
            raise self._explain(error)
        return self._result[: counts.num_logits if self._result_rows is Rows.LOGITS else counts.num_tokens]

    def _explain(self, error: int) -> OutOfMemory | Internal:
        if error == -ENOMEM:
            return OutOfMemory("the CPU kernels got no scratch memory for this step")
        for index, (op, kind) in enumerate(zip(self._linked.ops, self._linked.kinds, strict=True)):
            if self._library.plan(op, self._batch) < 0:
                return Internal(f"operation {index} ({kind.name.lower()}) cannot be planned: error {error}")
        return Internal(f"the program cannot be run: error {error}")


def _check_input(value: Any, name: str) -> None:
    if value != InputName(name):
        raise Internal(f"expected the step's own {name}")


def _check_tensor(value: Any, operation: str) -> None:
    if not isinstance(value, Value):
        raise Internal(f"{operation}: a {type(value).__name__} is no tensor")


def _check_routing(routing: Any, x: Any, operation: str) -> None:
    _check_tensor(x, operation)
    if not isinstance(routing, RoutingValue):
        raise Internal(f"{operation}: a {type(routing).__name__} is no routing")
    if routing.rows is not x.rows:
        raise Internal(
            f"{operation}: x has a row for each of {x.rows.name}, the routing of {routing.rows.name}"
        )


def _check_width(value: Any, width: int, operation: str) -> None:
    _check_tensor(value, operation)
    if value.width != width:
        raise Internal(f"{operation}: the tensor has {value.width} columns, not {width}")
