"""
The reference CPU backend: torch in float32, eager, one obvious expression an operation.

It is the oracle the other backends are compared with, and what runs where no compiler exists. Weights stay in
their GGUF bytes and are dequantised a tile of rows at a time, so memory stays near the size of the file.

It keeps the arithmetic contract of `kernels.backend` by never giving the library a shape that depends on the
batch: sums over a row are a tree of elementwise additions, products and softmax run a token at a time, on
freshly allocated (equally aligned) operands whose sizes follow from the weight or the token's position. Bits
may depend on torch's thread count, which is process-global and set when the backend is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.config import KVCacheDtype
from worker_orcd.errors import InsufficientMemory
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
from worker_orcd.kernels.cpu.cores import check_threads
from worker_orcd.kernels.cpu.inputs import allocate_cpu_inputs, check_counts, join_bias, valid_inputs
from worker_orcd.kernels.cpu.memory import HostMemory, available_memory, check_cache, unused_memory
from worker_orcd.kernels.memory import Widths, Workspaces

TILE_WEIGHTS = 1 << 18  # dequantised at a time: 1 MiB of float32 stays in a core's own cache


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    """Matrices that share k, one below the other, in their GGUF bytes; `bias` is (sum of n,) or None."""

    parts: tuple[Matrix, ...]
    bias: torch.Tensor | None

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    """A weight of each expert."""

    experts: tuple[ReferenceWeight, ...]
    widths: tuple[int, ...]  # outputs of each part


@dataclass(frozen=True, slots=True)
class ReferenceRouting:
    """Which experts each token goes to: (tokens, top_k) each."""

    experts: torch.Tensor  # int64
    weights: torch.Tensor  # float32


class ReferenceBackend:
    """Implements `kernels.backend.Backend`; its tensors are torch tensors of shape (tokens, width)."""

    name = "cpu-reference"

    def __init__(self, kv_cache_dtype: KVCacheDtype = "auto", num_threads: int | None = None) -> None:
        """`num_threads` becomes torch's, for the whole process; None leaves that alone.

        Raises InvalidConfiguration for an fp8 KV cache.
        """
        check_cache(kv_cache_dtype)
        if num_threads is not None:
            torch.set_num_threads(check_threads(num_threads))
        self._cache_dtype = torch.float16 if kv_cache_dtype == "float16" else torch.float32
        self._angles: dict[RopeParams, tuple[torch.Tensor, torch.Tensor]] = {}  # of the running step
        self.memory = HostMemory()
        cache = "float16" if kv_cache_dtype == "float16" else "float32"
        self.description = f"torch reference, float32 activations, {cache} KV cache"

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
    ) -> ReferenceWeight:
        """Rows lie as they come, whatever they are."""
        return ReferenceWeight(tuple(_owned(part) for part in parts), join_bias(parts, bias))

    def experts(
        self,
        parts: Sequence[Matrix],
        num_experts: int,
        bias: Sequence[NDArray[np.float32] | None] = (),
    ) -> ReferenceExperts:
        owned = [_owned(part) for part in parts]
        weights: list[ReferenceWeight] = []
        for expert in range(num_experts):
            own = [replace(part, data=part.data[expert * part.n : (expert + 1) * part.n]) for part in owned]
            own_bias = [None if values is None else values[expert] for values in bias]
            weights.append(ReferenceWeight(tuple(own), join_bias(own, own_bias)))
        return ReferenceExperts(tuple(weights), tuple(part.n for part in parts))

    def embedding(self, table: Matrix) -> ReferenceWeight:
        return ReferenceWeight((_owned(table),), None)

    def vector(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.as_tensor(np.array(values, dtype=np.float32))

    def allocate_inputs(self, limits: Limits) -> BatchInputs:
        return allocate_cpu_inputs(limits)

    def allocate_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> LayerCache:
        shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
        try:
            return LayerCache(torch.zeros(shape, dtype=self._cache_dtype))
        except (RuntimeError, MemoryError) as error:
            need = num_blocks * self.cache_block_bytes(block_size, num_kv_heads, head_dim)
            raise InsufficientMemory(f"the KV cache of one layer needs {need} bytes") from error

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * block_size * num_kv_heads * head_dim * self._cache_dtype.itemsize

    # -- operations --------------------------------------------------------------------------------------

    def embed(self, indices: torch.Tensor, table: ReferenceWeight) -> torch.Tensor:
        (part,) = table.parts
        rows = part.format.dequantize_rows(part.data[indices.numpy()])  # (tokens, k)
        return torch.as_tensor(rows)

    def linear(self, x: torch.Tensor, weight: ReferenceWeight) -> torch.Tensor:
        tokens = [row.clone() for row in x]  # torch allocates aligned: the same bits wherever x began
        out = torch.empty(len(tokens), weight.n)  # (tokens, n)
        column = 0
        for part in weight.parts:
            step = max(1, TILE_WEIGHTS // part.k)
            tile = torch.empty(step, part.k)
            for first in range(0, part.n, step):
                last = min(first + step, part.n)
                rows = part.format.dequantize_rows(part.data[first:last])
                tile[: last - first] = torch.as_tensor(rows)
                for index, token in enumerate(tokens):
                    out[index, column + first : column + last] = torch.mv(tile[: last - first], token)
            column += part.n
        return out if weight.bias is None else out + weight.bias

    def split(self, x: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return torch.split(x, list(widths), dim=1)

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x²) + eps) * gain, for each run of len(gain)."""
        runs = x.reshape(x.shape[0], x.shape[1] // gain.shape[0], gain.shape[0])  # (tokens, runs, len(gain))
        mean = _row_sums(runs * runs) / gain.shape[0]
        root = torch.as_tensor(np.sqrt((mean + eps).numpy()))  # numpy's is correctly rounded
        return (runs / root * gain).reshape(x.shape)

    def layer_norm(self, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        """LayerNorm (Ba et al. 2016) over the row."""
        centred = x - _row_sums(x) / x.shape[1]
        variance = _row_sums(centred * centred) / x.shape[1]
        root = torch.as_tensor(np.sqrt((variance + eps).numpy()))  # numpy's is correctly rounded
        return centred / root * gain + bias

    def rope(
        self, x: torch.Tensor, positions: torch.Tensor, params: RopeParams, head_dim: int
    ) -> torch.Tensor:
        """Rotary position embedding (Su et al. 2021): dimension i pairs with i + rotary_dim / 2."""
        if params not in self._angles:
            self._angles[params] = _rope_angles(positions, params)
        cos, sin = self._angles[params]  # (tokens, 1, rotary_dim / 2)
        heads = x.reshape(x.shape[0], -1, head_dim)  # (tokens, heads, head_dim)
        half = params.rotary_dim // 2
        low, high, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=2).reshape(x.shape)

    def store_kv(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, inputs: BatchInputs) -> None:
        slots = inputs.slots[cache.group].long()
        keys_values = cache.tensor.flatten(1, 2)  # (2, slots, num_kv_heads, head_dim), a view
        shape = (k.shape[0], *keys_values.shape[2:])  # (tokens, num_kv_heads, head_dim)
        keys_values[0].index_copy_(0, slots, k.reshape(shape).to(keys_values.dtype))
        keys_values[1].index_copy_(0, slots, v.reshape(shape).to(keys_values.dtype))

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        inputs: BatchInputs,
        params: AttentionParams,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty(q.shape[0], params.num_heads * params.head_dim)
        block_size = cache.tensor.shape[2]
        keys_values = cache.tensor.flatten(1, 2)  # (2, slots, num_kv_heads, head_dim), a view
        starts: list[int] = inputs.query_start.tolist()
        for row in range(len(starts) - 1):
            blocks = inputs.block_tables[cache.group, row].long()
            for token in range(starts[row], starts[row + 1]):
                last = int(inputs.positions[token])
                first = 0 if params.window is None else max(0, last - params.window + 1)
                seen = torch.arange(first, last + 1)
                slots = blocks[seen // block_size] * block_size + seen % block_size
                out[token] = _attend(q[token], keys_values[:, slots], params, sinks)
        return out

    def glu(self, kind: Glu, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if kind is Glu.SWIGLU:
            return _by_row(torch.nn.functional.silu, gate) * up
        if kind is Glu.GEGLU:
            return self.gelu(gate) * up
        gate = gate.clamp(max=CLAMPED_SWIGLU_LIMIT)
        up = up.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
        return gate * _by_row(torch.sigmoid, CLAMPED_SWIGLU_ALPHA * gate) * (up + 1)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return _by_row(partial(torch.nn.functional.gelu, approximate="tanh"), x)

    def route(self, logits: torch.Tensor, top_k: int) -> ReferenceRouting:
        order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top_k]
        chosen = torch.gather(logits, 1, order)  # (tokens, top_k)
        return ReferenceRouting(order, _by_row(partial(torch.softmax, dim=0), chosen))

    def expert_linear(
        self, x: torch.Tensor, weight: ReferenceExperts, routing: ReferenceRouting
    ) -> tuple[torch.Tensor, ...]:
        num_tokens, top_k = routing.experts.shape
        k = weight.experts[0].parts[0].k
        inputs = x.unsqueeze(1).expand(-1, top_k, -1) if x.shape[1] == k else x.reshape(num_tokens, top_k, k)
        out = torch.empty(num_tokens, top_k, sum(weight.widths))
        for index, expert in enumerate(weight.experts):
            places = (routing.experts == index).nonzero(as_tuple=True)  # tokens, slots
            if len(places[0]):
                out[places] = self.linear(inputs[places], expert)
        parts = torch.split(out, list(weight.widths), dim=2)
        return tuple(part.reshape(num_tokens, -1) for part in parts)

    def combine(self, x: torch.Tensor, routing: ReferenceRouting) -> torch.Tensor:
        num_tokens, top_k = routing.experts.shape
        slots = x.reshape(num_tokens, top_k, -1)  # (tokens, top_k, n)
        out = slots[:, 0] * routing.weights[:, :1]
        for slot in range(1, top_k):
            out = out + slots[:, slot] * routing.weights[:, slot : slot + 1]
        return out

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def take(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x[indices.long()]

    # -- running -----------------------------------------------------------------------------------------

    def compile(self, forward: Forward, inputs: BatchInputs, limits: Limits) -> CompiledForward:
        def step(counts: Counts) -> torch.Tensor:
            check_counts(counts, limits)
            self._angles.clear()
            with torch.inference_mode():
                return forward(valid_inputs(inputs, counts))

        return step

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces:
        # The residual, an operation's inputs, output and product.
        activations = 6 * limits.max_tokens * widths.widest
        logits = 2 * limits.max_rows * widths.vocab_size
        return Workspaces(buffers_bytes=4 * (activations + logits + 4 * TILE_WEIGHTS))

    def close(self) -> None:
        self._angles.clear()


def _owned(part: Matrix) -> Matrix:
    """The part with its own copy of the bytes, so that the file may be closed."""
    return replace(part, data=np.array(part.data))


def _by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The function of each row on its own: the bits of an exponential may depend on the lane it is in."""
    return torch.stack([function(row.clone()) for row in x]) if len(x) else torch.empty(x.shape)


def _row_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum the last dimension, kept as 1, by adding its upper half to its lower until one is left."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        lower = x[..., :half].clone()
        lower[..., : n - half] += x[..., half:]
        x = lower
    return x


def _rope_angles(positions: torch.Tensor, params: RopeParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and sin of position * inv_freq in float64, rounded once: (tokens, 1, rotary_dim / 2) each."""
    inv_freq = np.array(params.inv_freq)
    angles = [int(position) * inv_freq for position in positions]  # one shape, whatever the batch
    cos = np.stack([np.cos(angle) for angle in angles]) * params.attention_factor
    sin = np.stack([np.sin(angle) for angle in angles]) * params.attention_factor
    return torch.as_tensor(cos).float().unsqueeze(1), torch.as_tensor(sin).float().unsqueeze(1)


def _attend(
    q: torch.Tensor, keys_values: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One token over its keys and values, (2, context, num_kv_heads, head_dim) -> (num_heads * head_dim,)."""
    heads = q.reshape(params.num_kv_heads, -1, params.head_dim).clone()  # (kv_heads, group, head_dim)
    k, v = keys_values.float().transpose(1, 2).contiguous()  # (kv_heads, context, head_dim) each
    scores = torch.bmm(heads, k.transpose(1, 2).contiguous()) * params.scale  # (kv_heads, group, context)
    if sinks is not None:
        scores = torch.cat((scores, sinks.reshape(*scores.shape[:2], 1)), dim=2)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]].contiguous()
    return torch.bmm(weights, v).reshape(-1)
