"""Which kernels an operation of a program is, and on what memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Limits, RopeParams
from worker_orcd.kernels.cuda.attend import Attention
from worker_orcd.kernels.cuda.compiler import Kernels
from worker_orcd.kernels.cuda.executor import Launch, View
from worker_orcd.kernels.cuda.expert_products import ExpertProducts, Order
from worker_orcd.kernels.cuda.inputs import Bucket
from worker_orcd.kernels.cuda.launch import HeadsTo, Products
from worker_orcd.kernels.cuda.operations import Operations, rope_table
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
    RopeStore,
    Route,
    Rows,
    Scale,
    Take,
)
from worker_orcd.kernels.cuda.recorded import Recorded
from worker_orcd.kernels.cuda.weights import PackedMatrix


class KernelLauncher:
    """Implements `executor.Launcher` with compiled kernels. Owns what they share: scratch memory, angles."""

    def __init__(
        self,
        kernels: Kernels,
        inputs: BatchInputs,
        limits: Limits,
        operations: Sequence[Operation],
        drawn: torch.Tensor | None,
    ) -> None:
        """`drawn`: the tokens that the step before drew, for negative ids (`runner.batch`)."""
        self._kernels, self._inputs, self._drawn = kernels, inputs, drawn
        self._operations, self._products = Operations(kernels), Products(kernels)
        caches = {one.cache.tensor.dtype for one in operations if isinstance(one, Attend)}
        (cache,) = caches or {torch.float16}
        self._attention, self._experts = Attention(kernels, limits, cache=cache), ExpertProducts(kernels)
        self._orders: dict[tuple[Bucket, Buffer], Order | None] = {}  # of each routing, as it was sorted last
        self._tables: dict[RopeParams, torch.Tensor] = {}
        positions = limits.max_blocks_per_row * limits.block_size
        for one in operations:
            if isinstance(one, Linear) and isinstance(one.weight, PackedMatrix):
                of_logits = one.x.rows is Rows.LOGITS
                self._products.reserve(one.weight, limits.max_rows if of_logits else limits.max_tokens)
            elif isinstance(one, ExpertLinear):
                self._experts.reserve(one.weight, limits.max_tokens, one.experts.width)
            elif isinstance(one, Attend):
                self._attention.reserve(one.params)
            rotating = one.heads if isinstance(one, Linear) else one
            if isinstance(rotating, RopeStore | Heads) and rotating.rope not in (None, *self._tables):
                self._tables[rotating.rope] = rope_table(rotating.rope, positions, kernels.device)

    def prepare(self, bucket: Bucket) -> Sequence[Launch]:
        plans = self._attention.plans(self._inputs, bucket.tokens)
        return [Recorded(self._kernels, plan) for plan in plans]

    def launch(self, operation: Operation, view: View, bucket: Bucket) -> Launch:
        """Products with experts follow what they are routed by, and are called in that order too."""
        return Recorded(self._kernels, self._launch(operation, view, bucket))

    def _launch(self, operation: Operation, view: View, bucket: Bucket) -> Launch:
        match operation:
            case Linear():
                return self._linear(operation, view, bucket)
            case Norm():
                return self._norm(operation, view)
            case RopeStore():
                return self._rope_store(operation, view, bucket)
            case Attend():
                return self._attend(operation, view, bucket)
            case Route():
                return self._route(operation, view, bucket)
            case ExpertLinear():
                return self._expert_linear(operation, view, bucket)
            case _:
                return self._elementwise(operation, view, bucket)

    def _elementwise(self, one: Operation, view: View, bucket: Bucket) -> Launch:
        kernels, inputs = self._operations, self._inputs
        match one:
            case Embed():
                indices = getattr(inputs, one.indices.name)[: bucket.tokens]
                return partial(kernels.embed, indices, one.table, view(one.out), one.scale, drawn=self._drawn)
            case Take():
                indices = inputs.logit_tokens[: bucket.logits]
                return partial(kernels.take, view(one.x), indices, view(one.out))
            case Combine():
                residual = None if one.residual is None else view(one.residual)
                return partial(kernels.combine, view(one.x), view(one.weights), view(one.out), residual)
            case Gated():
                return partial(kernels.glu, one.kind, view(one.gate), view(one.up), view(one.out))
            case Gelu():
                return partial(kernels.gelu, view(one.x), view(one.out))
            case Add():
                return partial(kernels.add, view(one.x), view(one.y), view(one.out))
            case Scale():
                return partial(kernels.scale, view(one.x), one.factor, view(one.out))
            case Cast():
                return partial(kernels.cast, view(one.x), view(one.out))
            case _:
                raise Internal(f"there is no kernel for {type(one).__name__}")

    def _linear(self, one: Linear, view: View, bucket: Bucket) -> Launch:
        x, out = view(one.x), view(one.out)
        residual = None if one.residual is None else view(one.residual)
        if isinstance(one.weight, PackedMatrix):
            heads = None if one.heads is None else self._heads(one.heads, bucket)
            return partial(
                self._products.linear, x, one.weight, out, bias=one.bias, residual=residual, glu=one.glu,
                heads=heads,
            )  # fmt: skip
        product = partial(self._operations.linear_f32, x, one.weight, one.bias, out)
        if residual is None:
            return product
        return partial(_in_order, product, partial(self._operations.add, residual, out, out))

    def _heads(self, one: Heads, bucket: Bucket) -> HeadsTo:
        return HeadsTo(
            one.params,
            one.cache.tensor,
            self._inputs.positions[: bucket.tokens],
            self._inputs.slots[one.cache.group, : bucket.tokens],
            None if one.rope is None else self._tables[one.rope],
        )

    def _route(self, one: Route, view: View, bucket: Bucket) -> Launch:
        """And what the products that follow want to know of it."""
        experts = view(one.out)

        def launch() -> None:
            self._operations.route(view(one.logits), experts, view(one.out_weights))
            self._orders[bucket, one.out.buffer] = self._experts.sort(experts, one.logits.width)

        return launch

    def _expert_linear(self, one: ExpertLinear, view: View, bucket: Bucket) -> Launch:
        x, experts, out = view(one.x), view(one.experts), view(one.out)

        def launch() -> None:
            order = self._orders[bucket, one.experts.buffer]
            self._experts.linear(x, one.weight, experts, out, order=order, glu=one.glu)

        return launch

    def _norm(self, one: Norm, view: View) -> Launch:
        x, out = view(one.x), view(one.out)
        if one.bias is None:
            return partial(self._operations.rms_norm, x, one.gain, one.eps, out)
        return partial(self._operations.layer_norm, x, one.gain, one.bias, one.eps, out)

    def _rope_store(self, one: RopeStore, view: View, bucket: Bucket) -> Launch:
        return partial(
            self._operations.rope_store,
            view(one.qkv),
            self._inputs.positions[: bucket.tokens],
            self._inputs.slots[one.cache.group, : bucket.tokens],
            one.params,
            one.cache.tensor,
            view(one.out),
            gains=(one.q_gain, one.k_gain, one.eps),
            rope=None if one.rope is None else self._tables[one.rope],
        )

    def _attend(self, one: Attend, view: View, bucket: Bucket) -> Launch:
        return partial(
            self._attention.run, view(one.q), one.cache, self._inputs, view(one.out), one.params, one.sinks
        )


def _in_order(*launches: Launch) -> None:
    for launch in launches:
        launch()
