"""
What a device must be able to do: load weights, hold a KV cache, and some twenty operations.

The decoder is written once against this protocol, as a function from a batch to logits. `compile` turns that
function into something that can be run a step at a time: the reference backend runs it as it stands (torch,
eager), the native CPU backend traces it once into a flat list of operations, a CUDA backend captures graphs.
So tensors are opaque to the decoder: it may pass them on, and nothing else.

Arithmetic contract, for every backend: what is computed for a token depends only on the weights and on that
token's prefix, bit for bit. Neighbours in the batch, chunking and the place in the batch do not enter.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.kernels.draw import Draw
from worker_orcd.kernels.memory import DeviceMemory, Widths, Workspaces
from worker_orcd.quant import WeightFormat
from worker_orcd.sequence import RowResult

Tensor = Any  # a backend's own value; see the module docstring
Weight = Any  # a backend's own packed matrix
Routing = Any  # a backend's own: which experts each token goes to, and how much each counts

# SwiGLU as GPT-OSS has it (openai/gpt-oss, torch/model.py): the gate at most LIMIT, the other within ±LIMIT.
CLAMPED_SWIGLU_LIMIT = 7.0
CLAMPED_SWIGLU_ALPHA = 1.702


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix as the file stores it, before a backend has packed it.

    `data` is (n, row_bytes) uint8, possibly a view of the mapped file: a backend must not write to it, and
    must not keep it once it has packed the bytes.
    """

    name: str  # of the GGUF tensor, for messages
    format: WeightFormat
    n: int  # outputs (rows)
    k: int  # inputs (columns)
    data: NDArray[np.uint8]


class Glu(enum.Enum):
    """Gated linear units (Shazeer 2020): a function of a gate, times a linear part."""

    SWIGLU = "swiglu"  # silu(gate) * up
    GEGLU = "geglu"  # gelu(gate) * up, gelu by its tanh approximation
    CLAMPED_SWIGLU = "clamped_swiglu"  # g * sigmoid(ALPHA * g) * (u + 1), g and u clamped (gpt-oss)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParams:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # multiplies q·k
    window: int | None = None  # a query at p sees keys at p-window+1 … p; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParams:
    """Rotary embedding of the half-split (NEOX) kind: dimension i pairs with i + rotary_dim // 2.

    GGUF's interleaved llama rows are permuted at load, so kernels know one layout.
    """

    rotary_dim: int
    inv_freq: tuple[float, ...]  # (rotary_dim // 2,) radians per position, scaling factors folded in
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """The inputs of a step: fixed buffers whose first entries are valid (see `Counts`).

    A backend's `allocate_inputs` makes them; `runner.batch` fills them; the forward function receives them.
    """

    token_ids: Tensor  # (max_tokens,) int32; negative ones: see `DrawingForward`
    positions: Tensor  # (max_tokens,) int32, absolute
    slots: Tensor  # (num_groups, max_tokens) int32: block_id * block_size + offset, where K and V go
    query_start: Tensor  # (max_rows + 1,) int32: row r owns tokens query_start[r] … query_start[r + 1] - 1
    context_lens: Tensor  # (max_rows,) int32: tokens in the cache after this step
    block_tables: Tensor  # (num_groups, max_rows, max_blocks_per_row) int32; what no token sees is undefined
    logit_tokens: Tensor  # (max_rows,) int32: the tokens whose logits are wanted, as indices into the step


@dataclass(frozen=True, slots=True)
class Counts:
    """How much of the fixed buffers a step uses."""

    num_tokens: int
    num_rows: int
    num_logits: int
    # Forward passes. In each after the first, every row computes the token that it has just drawn; then all
    # rows have one token, and draw.
    num_rounds: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes of the fixed buffers."""

    max_tokens: int
    max_rows: int
    max_blocks_per_row: int
    block_size: int
    num_groups: int = 1  # of layers that share block tables, see `model.config.ModelConfig.cache_groups`

    @property
    def longest(self) -> int:
        """Tokens that a row's blocks have room for."""
        return self.max_blocks_per_row * self.block_size


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's KV blocks. Block 0 is the null block.

    Which of the two axes of a block comes first is the backend's business: only its `store_kv` and
    `attention` look inside. `tensor` is the backend's own.
    """

    tensor: Tensor
    group: int = 0  # of the step's slots and block tables


class Forward(Protocol):
    def __call__(self, inputs: BatchInputs) -> Tensor:
        """(num_logits, vocab_size) float32."""
        ...


class CompiledForward(Protocol):
    def __call__(self, counts: Counts) -> torch.Tensor:
        """Run one step on what the input buffers hold.

        Returns (num_logits, vocab_size) float32, valid until the next call. Raises EngineError.
        """
        ...


@runtime_checkable
class DrawingForward(CompiledForward, Protocol):
    """Of a device that also draws the tokens, so that logits need not be copied from it."""

    max_draws: int  # rounds of a step

    def launch(self, counts: Counts, draws: Iterable[Draw | None]) -> Callable[[], Sequence[RowResult]]:
        """Start a step on what the input buffers hold, without waiting for it, and the draws of its rows.

        `draws` has an entry a row, None where it does not sample. It is iterated over once the device
        computes, so that making them takes none of its time. What is returned waits and gives the results,
        once, as `sequence.PendingStep` has them. Both raise EngineError, and then the device does no more for
        the step.

        Two steps may be under way, waited for in order. The input buffers may be filled for the second once
        `launch` has returned. Its `token_ids` may be negative: -1 - i is the token that draw i of the first,
        None not counted, will have given last. So a draw may say that tokens before it are unknown: those
        that the first draws for it. Penalties count them where they are, and those of rounds before.
        """
        ...


class Backend(Protocol):
    """One device. Built once by `select_backend`, passed down, owned by the runner's thread."""

    name: str  # "cpu", "cpu-reference", "cuda"
    description: str  # for people: "AVX512-VNNI, 2 threads, int8 activations"

    # -- memory ------------------------------------------------------------------------------------------

    @property
    def memory(self) -> DeviceMemory: ...

    def available_memory(self) -> int:
        """Bytes that this process may still take of the device."""
        ...

    def displaces_files(self, num_bytes: int) -> bool:
        """Whether so much of the device can be taken only from the page cache of the machine's files."""
        ...

    def matrix(
        self,
        parts: Sequence[Matrix],
        bias: Sequence[NDArray[np.float32] | None] = (),
        *,
        gated: bool = False,
        head_dim: int = 0,
    ) -> Weight:
        """Pack matrices with equal k for `linear`; outputs are concatenated in order. Formats may differ.

        `bias` is empty or has one entry a part, (n,) float32 or None. `gated`: the first half of the outputs
        are the gates of the second, both for one `glu`. `head_dim`: outputs are heads of so many, to be
        rotated whole or not at all and stored. These are hints at how rows may lie, no more: what `linear`
        returns is the same, in the same order.
        """
        ...

    def experts(
        self,
        parts: Sequence[Matrix],
        num_experts: int,
        bias: Sequence[NDArray[np.float32] | None] = (),
    ) -> Weight:
        """Pack the matrices of all experts for `expert_linear`, one output tensor a part.

        A part's `n` is of one expert, its `data` is (num_experts * n, row_bytes), expert after expert. All
        parts have equal k; formats may differ. `bias` is empty or has one entry a part, (num_experts, n)
        float32 or None.
        """
        ...

    def embedding(self, table: Matrix) -> Weight:
        """Pack a table for `embed`. The result also serves `linear` (tied embeddings)."""
        ...

    def vector(self, values: NDArray[np.float32]) -> Tensor:
        """(n,) float32: gains and biases of norms, attention sinks."""
        ...

    def allocate_inputs(self, limits: Limits) -> BatchInputs:
        """Zeroed torch CPU tensors for `runner.batch` to fill (a GPU backend stages them itself)."""
        ...

    def allocate_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> LayerCache:
        """One layer's cache, zeroed, for group 0. Raises InsufficientMemory."""
        ...

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block of one layer, for `plan`."""
        ...

    # -- operations: (tokens, width) float32 in, fresh (tokens, width) float32 out ------------------------

    def embed(self, indices: Tensor, table: Weight) -> Tensor:
        """Rows of the table: `indices` is `inputs.token_ids`, or `inputs.positions` for learned positions."""
        ...

    def linear(self, x: Tensor, weight: Weight) -> Tensor: ...

    def split(self, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """Views of consecutive columns."""
        ...

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """Normalise each run of len(gain) columns: the whole row, or each head of it."""
        ...

    def layer_norm(self, x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * gain + bias over the whole row (Ba et al. 2016)."""
        ...

    def rope(self, x: Tensor, positions: Tensor, params: RopeParams, head_dim: int) -> Tensor:
        """Rotate the first `rotary_dim` of each head."""
        ...

    def store_kv(self, k: Tensor, v: Tensor, cache: LayerCache, inputs: BatchInputs) -> None:
        """Write each token's K and V to its slot. Must precede `attention` on the same cache."""
        ...

    def attention(
        self,
        q: Tensor,
        cache: LayerCache,
        inputs: BatchInputs,
        params: AttentionParams,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each token over its row's cache. (tokens, num_heads * head_dim).

        `sinks` (num_heads,), from `vector`, is one more score of each head, which has no value: exp(sink) is
        added to the softmax's denominator (gpt-oss).
        """
        ...

    def glu(self, kind: Glu, gate: Tensor, up: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor:
        """By the tanh approximation (Hendrycks and Gimpel 2016), as GPT-2 has it."""
        ...

    # -- mixtures of experts: a routing has `top_k` slots a token ------------------------------------------

    def route(self, logits: Tensor, top_k: int) -> Routing:
        """The `top_k` experts of highest logit, highest first (of equal ones the lower index), and the
        softmax over their logits. `logits` is (tokens, num_experts).
        """
        ...

    def expert_linear(self, x: Tensor, weight: Weight, routing: Routing) -> tuple[Tensor, ...]:
        """Each slot times its expert's matrices: for each part of the weight (tokens, top_k * n).

        `x` is (tokens, k), the same for all slots, or (tokens, top_k * k), one after the other.
        """
        ...

    def combine(self, x: Tensor, routing: Routing) -> Tensor:
        """The slots weighted by the routing and added up in slot order: (tokens, top_k * n) → (tokens, n)."""
        ...

    def add(self, x: Tensor, y: Tensor) -> Tensor: ...

    def scale(self, x: Tensor, factor: float) -> Tensor: ...

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        """Rows `inputs.logit_tokens` of x: (num_logits, width)."""
        ...

    # -- running -------------------------------------------------------------------------------------------

    def compile(self, forward: Forward, inputs: BatchInputs, limits: Limits) -> CompiledForward:
        """Make a step of `forward`. Called once, after weights and cache exist."""
        ...

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces:
        """An upper bound of what `compile` will take, for `plan`."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RehearsingBackend(Backend, Protocol):
    """Of a device whose memory is counted: what a step takes can be measured before its KV cache is there."""

    def rehearse(self, forward: Forward, limits: Limits) -> Workspaces:
        """What inputs and `compile` will take for these, as allocated; graphs, which only compiling makes, as
        a bound.

        `forward` works on caches of any number of blocks. Nothing stays allocated.
        """
        ...


BackendFactory = Callable[[], Backend]
