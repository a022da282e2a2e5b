"""The operations of a CUDA program in torch, on any device: what kernels should compute, without kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import singledispatchmethod

import numpy as np
import torch

from gpu_attention_steps import to_fp8, wide
from worker_orcd.kernels.backend import (
    CLAMPED_SWIGLU_ALPHA,
    CLAMPED_SWIGLU_LIMIT,
    AttentionParams,
    BatchInputs,
    Glu,
    Limits,
    RopeParams,
)
from worker_orcd.kernels.cuda.backend import CudaBackend
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import Kernels
from worker_orcd.kernels.cuda.executor import Launch, View
from worker_orcd.kernels.cuda.inputs import Bucket
from worker_orcd.kernels.cuda.program import (
    Add,
    Attend,
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
    Scale,
    Take,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix
from worker_orcd.quant import BY_NAME


def unpacked(weight: PackedMatrix | torch.Tensor) -> torch.Tensor:
    """(n, k) float32."""
    if isinstance(weight, torch.Tensor):
        return weight
    fmt, shape = BY_NAME[weight.shape.format], weight.shape
    packed = np.frombuffer(bytes(weight.words.untyped_storage()), np.uint8)
    rows = shape.layout.unpack(packed, weight.n, shape.k, shape.step)
    return torch.from_numpy(fmt.dequantize_rows(rows)).float()


class TorchLauncher:
    """Implements `executor.Launcher`. Counts what it was asked for."""

    def __init__(
        self,
        kernels: Kernels,
        inputs: BatchInputs,
        limits: Limits,
        operations: Sequence[Operation],
        drawn: torch.Tensor | None,
    ) -> None:
        self._inputs, self._limits, self.drawn = inputs, limits, drawn
        self.operations = list(operations)

    def prepare(self, bucket: Bucket) -> Sequence[Launch]:
        return ()

    def launch(self, operation: Operation, view: View, bucket: Bucket) -> Launch:
        return lambda: self._run(operation, view, bucket)

    @singledispatchmethod
    def _run(self, operation: Operation, view: View, bucket: Bucket) -> None:
        raise NotImplementedError(type(operation).__name__)

    @_run.register
    def _(self, one: Embed, view: View, bucket: Bucket) -> None:
        indices = getattr(self._inputs, one.indices.name)[: bucket.tokens].long()
        if self.drawn is not None:
            indices = torch.where(indices < 0, self.drawn[(-1 - indices).clamp(min=0)].long(), indices)
        view(one.out).copy_(unpacked(one.table)[indices] * one.scale)

    @_run.register
    def _(self, one: Linear, view: View, bucket: Bucket) -> None:
        x = view(one.x)
        if isinstance(one.weight, PackedMatrix):
            assert x.dtype == one.weight.operand and x.is_contiguous()
        y = x.double() @ unpacked(one.weight).double().T
        if one.bias is not None:
            y = y + one.bias
        if isinstance(one.weight, PackedMatrix) and one.weight.paired:
            gate, up = y.view(len(y), -1, 2, 8).unbind(2)
            gate, up = (half.reshape(len(y), -1) for half in (gate, up))
            y = torch.cat((gate, up), dim=1) if one.glu is None else gated(one.glu, gate, up)
        if isinstance(one.weight, PackedMatrix) and one.weight.head:
            y = y.view(len(y), -1, one.weight.head // 16, 2, 8).transpose(2, 3).reshape(y.shape)
        if one.heads is not None:
            self._store(y.float(), one.heads, view(one.out))
            return
        if one.residual is not None:
            y = y + view(one.residual)
        view(one.out).copy_(y)

    @_run.register
    def _(self, one: Norm, view: View, bucket: Bucket) -> None:
        x = view(one.x)
        runs = x.reshape(len(x), -1, len(one.gain))
        if one.bias is None:
            out = torch.nn.functional.rms_norm(runs, (len(one.gain),), one.gain, one.eps)
        else:
            out = torch.nn.functional.layer_norm(runs, (len(one.gain),), one.gain, one.bias, one.eps)
        view(one.out).copy_(out.reshape(x.shape))

    @_run.register
    def _(self, one: RopeStore, view: View, bucket: Bucket) -> None:
        x, dim = view(one.qkv), one.params.head_dim
        q, k, v = _heads(x, one.params)
        if one.q_gain is not None:
            q = torch.nn.functional.rms_norm(q, (dim,), one.q_gain, one.eps)
        if one.k_gain is not None:
            k = torch.nn.functional.rms_norm(k, (dim,), one.k_gain, one.eps)
        x = torch.cat([part.reshape(len(x), -1) for part in (q, k, v)], dim=1)
        self._store(x, Heads(one.rope, one.cache, one.params), view(one.out))

    def _store(self, x: torch.Tensor, one: Heads, out: torch.Tensor) -> None:
        """Rotated q to `out`, rotated k and v to the cache."""
        tokens = len(x)
        q, k, v = _heads(x, one.params)
        if one.rope is not None:
            positions = self._inputs.positions[:tokens]
            q, k = (rotated(part, positions, one.rope) for part in (q, k))
        out.copy_(q.reshape(tokens, -1))
        cache, size = one.cache.tensor, self._limits.block_size
        slots = self._inputs.slots[one.cache.group, :tokens].long()
        stored = torch.stack((k, v))
        stored = to_fp8(stored).view(torch.uint8) if cache.dtype == FP8 else stored.to(cache.dtype)
        lying = cache.view(stored.dtype)
        for side, values in enumerate(stored):
            lying[side, slots // size, :, slots % size] = values

    @_run.register
    def _(self, one: Attend, view: View, bucket: Bucket) -> None:
        params, q, out = one.params, view(one.q), view(one.out)
        starts = self._inputs.query_start.tolist()
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            length = int(self._inputs.context_lens[row])
            blocks = self._inputs.block_tables[one.cache.group, row].long()
            sides = (side.transpose(1, 2) for side in wide(one.cache.tensor, blocks))
            shape = -1, params.num_kv_heads, params.head_dim
            k, v = (side.reshape(shape)[:length] for side in sides)
            for token in range(start, end):
                position = length - (end - token)
                first = 0 if params.window is None else max(0, position - params.window + 1)
                heads = q[token].double().reshape(params.num_kv_heads, -1, params.head_dim)
                scores = torch.einsum("hgd,khd->hgk", heads, k[first : position + 1]) * params.scale
                if one.sinks is not None:
                    sinks = one.sinks.double().reshape(params.num_kv_heads, -1, 1)
                    scores = torch.cat((scores, sinks), dim=2)
                weights = scores.softmax(dim=2)[..., : position + 1 - first]
                attended = torch.einsum("hgk,khd->hgd", weights, v[first : position + 1])
                out[token] = attended.reshape(-1).to(out.dtype)

    @_run.register
    def _(self, one: Route, view: View, bucket: Bucket) -> None:
        logits = view(one.logits)
        experts = logits.sort(dim=1, descending=True, stable=True).indices[:, : one.top_k]
        view(one.out).copy_(experts)
        view(one.out_weights).copy_(logits.gather(1, experts).softmax(dim=1))

    @_run.register
    def _(self, one: ExpertLinear, view: View, bucket: Bucket) -> None:
        weight, experts = one.weight, view(one.experts)
        assert experts.is_contiguous()
        tokens, slots = experts.shape
        x = view(one.x)
        assert x.dtype == weight.operand
        x = x.unsqueeze(1) if one.x.width == weight.shape.k else x.reshape(tokens, slots, -1)
        matrices = unpacked(weight.matrix).double().view(weight.num_experts, -1, weight.shape.k)
        matrices = matrices[:, : weight.n]
        y = torch.einsum("tsk,tsnk->tsn", x.expand(-1, slots, -1).double(), matrices[experts.long()])
        if weight.bias is not None:
            y = y + weight.bias[experts.long()]
        if weight.paired:
            gate, up = y.view(tokens, slots, -1, 2, 8).unbind(3)
            gate, up = (part.reshape(tokens, -1) for part in (gate, up))
            y = torch.cat((gate, up), dim=1) if one.glu is None else gated(one.glu, gate, up)
        view(one.out).copy_(y.reshape(tokens, -1))

    @_run.register
    def _(self, one: Combine, view: View, bucket: Bucket) -> None:
        weights = view(one.weights)
        y = (view(one.x).reshape(*weights.shape, -1) * weights.unsqueeze(2)).sum(dim=1)
        view(one.out).copy_(y if one.residual is None else y + view(one.residual))

    @_run.register
    def _(self, one: Gated, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(gated(one.kind, view(one.gate), view(one.up)))

    @_run.register
    def _(self, one: Gelu, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(torch.nn.functional.gelu(view(one.x), approximate="tanh"))

    @_run.register
    def _(self, one: Add, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(view(one.x) + view(one.y))

    @_run.register
    def _(self, one: Scale, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(view(one.x) * one.factor)

    @_run.register
    def _(self, one: Take, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(view(one.x)[self._inputs.logit_tokens[: bucket.logits].long()])

    @_run.register
    def _(self, one: Cast, view: View, bucket: Bucket) -> None:
        view(one.out).copy_(view(one.x))


def _heads(x: torch.Tensor, params: AttentionParams) -> tuple[torch.Tensor, ...]:
    """q, k and v, (tokens, heads, head_dim) each."""
    dim = params.head_dim
    widths = params.num_heads * dim, params.num_kv_heads * dim, params.num_kv_heads * dim
    return tuple(part.reshape(len(x), -1, dim) for part in x.split(widths, dim=1))


def gated(kind: Glu, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    match kind:
        case Glu.SWIGLU:
            return torch.nn.functional.silu(gate) * up
        case Glu.GEGLU:
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        case Glu.CLAMPED_SWIGLU:
            gate = gate.clamp(max=CLAMPED_SWIGLU_LIMIT)
            up = up.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
            return gate * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * gate) * (up + 1)


def rotated(x: torch.Tensor, positions: torch.Tensor, params: RopeParams) -> torch.Tensor:
    """(tokens, heads, head_dim), the first `rotary_dim` of each head turned."""
    angles = positions.double()[:, None] * torch.tensor(params.inv_freq, dtype=torch.float64)
    cos, sin = (f(angles).float()[:, None] * params.attention_factor for f in (torch.cos, torch.sin))
    half = params.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def on_torch(*, fp8_cache: bool = False) -> tuple[CudaBackend, list[TorchLauncher]]:
    """The backend with operations in torch, and where its launcher will be found."""
    made: list[TorchLauncher] = []

    def launcher(
        kernels: Kernels,
        inputs: BatchInputs,
        limits: Limits,
        operations: list[Operation],
        drawn: torch.Tensor | None,
    ) -> TorchLauncher:
        made.append(TorchLauncher(kernels, inputs, limits, operations, drawn))
        return made[-1]

    return CudaBackend(Kernels(torch.device("cpu"), 90), launcher, fp8_cache=fp8_cache), made
