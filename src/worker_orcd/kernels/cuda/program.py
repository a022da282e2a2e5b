"""
A traced forward pass: operations in order on values whose memory is not decided yet.

A `Value` is some columns of a `Buffer`, which has as many rows as a step has tokens or logits. While tracing
every buffer is float32; `fuse` merges operations and lets buffers be what tensor cores take, `executor` gives
them memory and launches.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from worker_orcd.kernels.backend import AttentionParams, Glu, LayerCache, RopeParams
from worker_orcd.kernels.cuda.expert_weights import PackedExperts
from worker_orcd.kernels.cuda.weights import PackedMatrix


class Rows(enum.Enum):
    """How many rows a buffer has."""

    TOKENS = enum.auto()
    LOGITS = enum.auto()


@dataclass(eq=False, slots=True)
class Buffer:
    """What one operation writes: `width` columns."""

    width: int
    rows: Rows
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """Columns [column, column + width) of a buffer."""

    buffer: Buffer
    column: int
    width: int

    @property
    def rows(self) -> Rows:
        return self.buffer.rows

    @property
    def is_whole(self) -> bool:
        return self.width == self.buffer.width

    def columns(self, column: int, width: int) -> Value:
        return Value(self.buffer, self.column + column, width)


def fresh(width: int, rows: Rows, dtype: torch.dtype = torch.float32) -> Value:
    """A value in a buffer of its own."""
    return Value(Buffer(width, rows, dtype), 0, width)


@dataclass(frozen=True, slots=True)
class InputName:
    """Stands for one of the step's input buffers while tracing."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One step of the computation. Its fields that are values are read, but for those that it `writes`."""

    @property
    def writes(self) -> tuple[Value, ...]:
        """In a dataclass the fields named `out…`."""
        return tuple(value for name, value in _values(self) if name.startswith("out"))

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(value for name, value in _values(self) if not name.startswith("out"))


def _values(operation: Operation) -> Iterator[tuple[str, Value]]:
    for one in dataclasses.fields(operation):
        content = getattr(operation, one.name)
        if isinstance(content, Value):
            yield one.name, content


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Embed(Operation):
    indices: InputName
    table: PackedMatrix
    scale: float = 1.0
    out: Value


@dataclass(frozen=True, slots=True)
class Heads:
    """Where a product of q, k and v puts them: q is rotated and kept, k rotated and stored, v stored."""

    rope: RopeParams | None
    cache: LayerCache
    params: AttentionParams


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Linear(Operation):
    """Of one packed matrix; of a small float32 one, unpacked, without tensor cores."""

    x: Value
    weight: PackedMatrix | torch.Tensor
    bias: torch.Tensor | None = None
    residual: Value | None = None  # added
    glu: Glu | None = None  # of a paired weight, without a residual: `out` is half as wide
    heads: Heads | None = None  # of a weight with heads, without a residual: `out` is q
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Norm(Operation):
    """RMSNorm; LayerNorm where there is a bias."""

    x: Value
    gain: torch.Tensor
    bias: torch.Tensor | None = None
    eps: float
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Rope(Operation):
    x: Value
    params: RopeParams
    head_dim: int
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class StoreKv(Operation):
    k: Value
    v: Value
    cache: LayerCache


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RopeStore(Operation):
    """Head norms, rotation, and K and V to the cache: what stands between q, k, v and attention."""

    qkv: Value
    q_gain: torch.Tensor | None
    k_gain: torch.Tensor | None
    eps: float
    rope: RopeParams | None
    cache: LayerCache
    params: AttentionParams
    out: Value  # q


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Attend(Operation):
    q: Value
    cache: LayerCache
    params: AttentionParams
    sinks: torch.Tensor | None
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Gated(Operation):
    kind: Glu
    gate: Value
    up: Value
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Gelu(Operation):
    x: Value
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Route(Operation):
    logits: Value
    top_k: int
    out: Value  # experts, int32
    out_weights: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ExpertLinear(Operation):
    """Of a paired weight without `glu`, the first half of the outputs are the gates of all slots."""

    x: Value
    weight: PackedExperts
    experts: Value
    glu: Glu | None = None
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Combine(Operation):
    x: Value
    weights: Value
    residual: Value | None = None  # added
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Add(Operation):
    x: Value
    y: Value
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Scale(Operation):
    x: Value
    factor: float
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Take(Operation):
    """Rows `logit_tokens` of x."""

    x: Value
    out: Value


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Cast(Operation):
    x: Value
    out: Value


@dataclass(slots=True)
class Program:
    """The operations of one step in the order they run."""

    operations: list[Operation] = field(default_factory=list[Operation])

    def record(self, operation: Operation) -> None:
        self.operations.append(operation)
