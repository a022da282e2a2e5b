"""
A traced forward pass: operations in order, and one arena for everything they compute.

While tracing, a tensor is a `Value`: some columns of a `Buffer`, which has a width and as many rows as a step
has tokens or logits. `link` gives every buffer a place in the arena for as long as it is needed, so buffers
that are never alive together share memory, and makes the array of operations that `orcd_run` takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InsufficientMemory, Internal
from worker_orcd.kernels import placement
from worker_orcd.kernels.backend import Limits
from worker_orcd.kernels.cpu.library import Kind, Op, Rows
from worker_orcd.kernels.placement import Lifetime

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
_FLOATS = ALIGNMENT // 4
ROUTING_LISTS = 5  # routing.h: lists of a routing, as wide as it has slots


@dataclass(eq=False, slots=True)
class Buffer:
    """What one operation writes: a row a token or a logit, `width` float32 columns."""

    width: int
    rows: Rows

    @property
    def stride(self) -> int:
        """Floats from one row to the next: rows are aligned."""
        return -(-self.width // _FLOATS) * _FLOATS


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """Columns [column, column + width) of a buffer."""

    buffer: Buffer
    column: int
    width: int

    @property
    def rows(self) -> Rows:
        return self.buffer.rows

    def columns(self, column: int, width: int) -> Value:
        return Value(self.buffer, self.column + column, width)


@dataclass(frozen=True, eq=False, slots=True)
class RoutingValue:
    """What `route` writes (routing.h). Its entries are no floats: no tensor operation may have it."""

    entries: Value
    num_experts: int
    top_k: int

    @property
    def rows(self) -> Rows:
        return self.entries.rows


@dataclass(frozen=True, slots=True)
class InputName:
    """Stands for one of the step's input buffers while tracing; the batch structure holds the real ones."""

    name: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """One operation: everything but the addresses of `x`, `y` and `out`."""

    kind: Kind
    x: Value | None
    y: Value | None
    out: Value | None
    fields: dict[str, Any]
    owners: tuple[Any, ...] = ()  # of the memory that `fields` points to

    @property
    def rows(self) -> Rows:
        """The rows it works on: those of what it writes, or of x if it writes to a cache."""
        leader = self.out if self.out is not None else self.x
        if leader is None:
            raise Internal(f"{self.kind.name} neither reads nor writes a tensor")
        return leader.rows

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(value for value in (self.x, self.y, self.out) if value is not None)


@dataclass(slots=True)
class Program:
    """The operations of one step in the order they run."""

    operations: list[Recorded] = field(default_factory=list[Recorded])

    def record(self, operation: Recorded) -> None:
        self.operations.append(operation)


def fresh(width: int, rows: Rows) -> Value:
    """A tensor in a buffer of its own."""
    return Value(Buffer(width, rows), 0, width)


@dataclass(frozen=True, slots=True)
class Linked:
    """A program with addresses. Owns the arena."""

    ops: ctypes.Array[Op]
    kinds: tuple[Kind, ...]
    arena: NDArray[np.float32]
    result: NDArray[np.float32]  # (max_tokens or max_rows, width), a view of the arena
    result_rows: Rows
    owners: tuple[Any, ...]  # of weights and caches that the operations point to


def link(program: Program, result: Value, limits: Limits) -> Linked:
    """Place every buffer and make the array of operations. Raises InsufficientMemory."""
    places, size = place(program.operations, result, limits)
    arena = aligned_zeros(size * 4, "the activations").view(np.float32)
    base: int = arena.ctypes.data
    ops = (Op * len(program.operations))()
    for op, recorded in zip(ops, program.operations, strict=True):
        op.kind, op.rows = recorded.kind, recorded.rows
        for pointer, stride, value in (
            ("x", "ldx", recorded.x),
            ("y", "ldy", recorded.y),
            ("out", "ldout", recorded.out),
        ):
            if value is not None:
                setattr(op, pointer, base + 4 * (places[value.buffer] + value.column))
                setattr(op, stride, value.buffer.stride)
        for name, content in recorded.fields.items():
            setattr(op, name, content)
    rows, stride = row_count(result.rows, limits), result.buffer.stride
    start = places[result.buffer]
    whole = arena[start : start + rows * stride].reshape(rows, stride)
    view = whole[:, result.column : result.column + result.width]
    kinds = tuple(recorded.kind for recorded in program.operations)
    owners = tuple(owner for recorded in program.operations for owner in recorded.owners)
    return Linked(ops, kinds, arena, view, result.rows, owners)


def row_count(rows: Rows, limits: Limits) -> int:
    return limits.max_tokens if rows is Rows.TOKENS else limits.max_rows


def place(operations: Sequence[Recorded], result: Value, limits: Limits) -> tuple[dict[Buffer, int], int]:
    """Give each buffer an offset in floats, so that no two that are alive at once overlap; and the total.

    A buffer is alive from the operation that first writes it to the last that names it, the result to the
    end.
    """
    first_use: dict[Buffer, int] = {}
    last_use: dict[Buffer, int] = {}
    for index, operation in enumerate(operations):
        for value in operation.values:
            first_use.setdefault(value.buffer, index)
            last_use[value.buffer] = index
    if result.buffer not in last_use:
        raise Internal("the forward function returned a tensor that no operation wrote")
    last_use[result.buffer] = len(operations)
    lifetimes = [
        Lifetime(buffer.stride * row_count(buffer.rows, limits), first, last_use[buffer])
        for buffer, first in first_use.items()
    ]
    offsets, total = placement.place(lifetimes)
    return dict(zip(first_use, offsets, strict=True)), total


def aligned_zeros(num_bytes: int, what: str) -> NDArray[np.uint8]:
    """Zeroed, 64-byte aligned memory. Raises InsufficientMemory naming `what`."""
    try:
        memory = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise InsufficientMemory(f"{what} need {num_bytes} bytes, more than this machine gives") from error
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes]
