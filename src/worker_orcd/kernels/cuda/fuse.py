"""
What a traced program becomes before it is given memory: fewer operations, and the types tensor cores take.

No pass changes what is computed, only which launch computes it, except that a value which tensor cores alone
read is rounded to their type where it is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

import torch

from worker_orcd.errors import Internal
from worker_orcd.kernels.cuda.program import (
    Add,
    Attend,
    Buffer,
    Cast,
    Combine,
    Embed,
    ExpertLinear,
    Gated,
    Gelu,
    Heads,
    Linear,
    Norm,
    Operation,
    Rope,
    RopeStore,
    Scale,
    StoreKv,
    Take,
    Value,
    fresh,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix

ATTENTION_DTYPE = torch.float16  # of q, and of K and V in the cache
# Operations that can round what they write; beside them products that end in a gated unit.
_TYPED = (Norm, Gated, Gelu, Attend, ExpertLinear, Cast, Take)


def fuse(operations: Sequence[Operation], result: Value) -> list[Operation]:
    """All passes in order. `result` stays as it is."""
    fused = _scale_embeddings(operations)
    fused = _store_in_products(_rotate_and_store(fused))
    fused = _gate_in_products(fused)
    fused = _add_to_products(fused, result)
    return _round(fused, result)


def _uses(operations: Sequence[Operation]) -> Counter[Buffer]:
    """How many operations read a buffer."""
    return Counter(buffer for one in operations for buffer in {value.buffer for value in one.reads})


def _writers(operations: Sequence[Operation]) -> dict[Buffer, list[Operation]]:
    writers: dict[Buffer, list[Operation]] = {}
    for one in operations:
        for value in one.writes:
            writers.setdefault(value.buffer, []).append(one)
    return writers


def _scale_embeddings(operations: Sequence[Operation]) -> list[Operation]:
    uses, writers = _uses(operations), _writers(operations)
    gone: set[Operation] = set()
    changed: dict[Operation, Operation] = {}
    for one in operations:
        if isinstance(one, Scale) and uses[one.x.buffer] == 1:
            (writer,) = writers[one.x.buffer]
            if isinstance(writer, Embed):
                gone.add(writer)
                changed[one] = replace(writer, scale=writer.scale * one.factor, out=one.out)
    return [changed.get(one, one) for one in operations if one not in gone]


def _rotate_and_store(operations: Sequence[Operation]) -> list[Operation]:
    """Head norms, rotation and storing K and V are one operation; q comes out of it for attention."""
    writers = _writers(operations)
    gone: set[Operation] = set()
    changed: dict[Operation, Operation] = {}
    store: StoreKv | None = None
    for one in operations:
        if isinstance(one, StoreKv):
            store = one
        elif isinstance(one, Attend):
            if store is None or store.cache is not one.cache:
                raise Internal("attention to a cache that nothing was just stored in")
            q, k = _Chain(one.q, writers), _Chain(store.k, writers)
            start = q.source.column
            ends = [start + q.source.width, start + q.source.width + k.source.width]
            if [k.source.column, store.v.column] != ends or len(
                {q.source.buffer, k.source.buffer, store.v.buffer}
            ) != 1:
                raise Internal("q, k and v are not columns of one product")
            gone.update(q.operations + k.operations)
            heads = Value(q.source.buffer, start, sum(v.width for v in (q.source, k.source, store.v)))
            out = fresh(one.q.width, one.q.rows, ATTENTION_DTYPE)
            changed[store] = RopeStore(
                qkv=heads,
                q_gain=q.gain,
                k_gain=k.gain,
                eps=q.eps,
                rope=q.rope,
                cache=one.cache,
                params=one.params,
                out=out,
            )
            changed[one] = replace(one, q=out)
    return [changed.get(one, one) for one in operations if one not in gone]


class _Chain:
    """From q or k at attention back to the product: perhaps a rotation, perhaps a norm of heads."""

    def __init__(self, value: Value, writers: dict[Buffer, list[Operation]]) -> None:
        self.operations: list[Operation] = []
        self.rope = self.gain = None
        self.eps = 0.0
        one = writers[value.buffer][0]
        if isinstance(one, Rope):
            self.operations.append(one)
            self.rope, value = one.params, one.x
            one = writers[value.buffer][0]
        if isinstance(one, Norm) and one.bias is None and value.is_whole:
            self.operations.append(one)
            self.gain, self.eps, value = one.gain, one.eps, one.x
        self.source = value


def _store_in_products(operations: Sequence[Operation]) -> list[Operation]:
    """Rotating whole heads and storing them is the epilogue of the product that makes them."""
    uses, writers = _uses(operations), _writers(operations)
    gone: set[Operation] = set()
    changed: dict[Operation, Operation] = {}
    for one in operations:
        if not isinstance(one, RopeStore) or not one.qkv.is_whole or uses[one.qkv.buffer] != 1:
            continue
        product, *others = writers[one.qkv.buffer]
        if not others and _has_heads(product, one):
            gone.add(product)
            heads = Heads(one.rope, one.cache, one.params)
            changed[one] = replace(product, heads=heads, out=one.out)
    return [changed.get(one, one) for one in operations if one not in gone]


def _has_heads(product: Operation, store: RopeStore) -> TypeGuard[Linear]:
    if not isinstance(product, Linear) or not isinstance(product.weight, PackedMatrix):
        return False
    dim = store.params.head_dim
    plain = store.q_gain is None and store.k_gain is None
    return product.weight.head == dim and plain and (store.rope is None or store.rope.rotary_dim == dim)


def _gate_in_products(operations: Sequence[Operation]) -> list[Operation]:
    """A gated unit of the two halves of a paired product is that product's epilogue."""
    uses, writers = _uses(operations), _writers(operations)
    gone: set[Operation] = set()
    changed: dict[Operation, Operation] = {}
    for one in operations:
        if isinstance(one, Gated) and uses[one.gate.buffer] == 1 and one.gate.buffer is one.up.buffer:
            product, *others = writers[one.gate.buffer]
            halves = one.gate.column == 0 and one.up.column == one.gate.width == one.gate.buffer.width // 2
            if not others and halves and _is_paired(product):
                gone.add(one)
                changed[product] = replace(product, glu=one.kind, out=one.out)
    return [changed.get(one, one) for one in operations if one not in gone]


def _is_paired(product: Operation) -> TypeGuard[Linear | ExpertLinear]:
    """Whether it is a product whose programs have gates and what goes with them."""
    match product:
        case ExpertLinear():
            return product.weight.paired
        case Linear(weight=PackedMatrix() as weight):
            return weight.paired
        case _:
            return False


def _add_to_products(operations: Sequence[Operation], result: Value) -> list[Operation]:
    """A sum of which one side is a product, used nowhere else, is that product's epilogue."""
    uses, writers = _uses(operations), _writers(operations)
    gone: set[Operation] = set()
    changed: dict[Operation, Operation] = {}
    for one in operations:
        if not isinstance(one, Add) or one.y.buffer is result.buffer or uses[one.y.buffer] != 1:
            continue
        products = writers[one.y.buffer]
        if not one.y.is_whole or not all(_can_add(product) for product in products):
            continue
        gone.add(one)
        for product in products:
            if isinstance(product, Linear | Combine):
                column, width = product.out.column, product.out.width
                changed[product] = replace(
                    product, residual=one.x.columns(column, width), out=one.out.columns(column, width)
                )
    return [changed.get(one, one) for one in operations if one not in gone]


def _can_add(product: Operation) -> bool:
    if isinstance(product, Linear):
        return product.glu is None and product.heads is None
    return isinstance(product, Combine)


def _can_round(writer: Operation) -> bool:
    return isinstance(writer, _TYPED) or (isinstance(writer, Linear) and writer.glu is not None)


def _operand(one: Operation) -> torch.dtype | None:
    """What an operation wants its x to be; None: float32."""
    match one:
        case ExpertLinear():
            return one.weight.operand
        case Linear(weight=PackedMatrix() as weight):
            return weight.operand
        case _:
            return None


def _round(operations: Sequence[Operation], result: Value) -> list[Operation]:
    """Buffers that only products of one operand type read become that type; others are cast for them."""
    writers = _writers(operations)
    wanted: dict[Buffer, set[torch.dtype | None]] = {}
    for one in operations:
        for value in one.reads:
            is_x = isinstance(one, Linear | ExpertLinear) and value is one.x
            wanted.setdefault(value.buffer, set()).add(_operand(one) if is_x else None)
    for buffer, dtypes in wanted.items():
        (dtype, *others) = dtypes
        typed = all(_can_round(writer) for writer in writers.get(buffer, ()))
        if dtype is not None and not others and typed and buffer is not result.buffer:
            buffer.dtype = dtype
    rounded: list[Operation] = []
    casts: dict[tuple[Buffer, int, int, torch.dtype], Value] = {}
    for one in operations:
        dtype = _operand(one)
        if isinstance(one, Linear | ExpertLinear) and dtype is not None and one.x.buffer.dtype != dtype:
            key = one.x.buffer, one.x.column, one.x.width, dtype
            if key not in casts:
                casts[key] = fresh(one.x.width, one.x.rows, dtype)
                rounded.append(Cast(x=one.x, out=casts[key]))
            rounded.append(replace(one, x=casts[key]))
        else:
            rounded.append(one)
    return rounded
