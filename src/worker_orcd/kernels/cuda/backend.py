"""
The CUDA backend: weights packed on the device, a forward pass traced once, a step as one CUDA graph.

Tensors are `program.Value`s: an operation called while `compile` traces records itself and returns where its
result will be. Nothing runs then.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.config import DeviceConfig
from worker_orcd.errors import InsufficientMemory, Internal, InvalidConfiguration
from worker_orcd.kernels.backend import (
    AttentionParams,
    BatchInputs,
    CompiledForward,
    Forward,
    Glu,
    LayerCache,
    Limits,
    Matrix,
    RopeParams,
)
from worker_orcd.kernels.cuda import wide
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import FULL_OVERLAP, Kernels, prepare_triton
from worker_orcd.kernels.cuda.draw_slab import MAX_VOCAB
from worker_orcd.kernels.cuda.executor import Executor, Launcher
from worker_orcd.kernels.cuda.expert_weights import PackedExperts, pack_experts
from worker_orcd.kernels.cuda.fuse import ATTENTION_DTYPE, fuse
from worker_orcd.kernels.cuda.inputs import Staging
from worker_orcd.kernels.cuda.launcher import KernelLauncher
from worker_orcd.kernels.cuda.memory import CudaMemory
from worker_orcd.kernels.cuda.program import (
    Add,
    Attend,
    Combine,
    Embed,
    ExpertLinear,
    Gated,
    Gelu,
    InputName,
    Linear,
    Norm,
    Operation,
    Program,
    Rope,
    Route,
    Rows,
    Scale,
    StoreKv,
    Take,
    Value,
    fresh,
)
from worker_orcd.kernels.cuda.rounds import Rounds
from worker_orcd.kernels.cuda.sampler import DeviceSampler
from worker_orcd.kernels.cuda.step import CudaStep, DrawingStep
from worker_orcd.kernels.cuda.weights import CudaWeight, Uploader
from worker_orcd.kernels.memory import Widths, Workspaces

T = TypeVar("T")
MakeLauncher = Callable[[Kernels, BatchInputs, Limits, Sequence[Operation], torch.Tensor | None], Launcher]
OnCompile = Callable[[int, int], None]

OLDEST = 80  # compute capability
_BLOCK_MULTIPLE = 16  # tokens
_SCRATCH_BYTES = 128 << 20  # parts of split products and of split attention
GRAPH_BYTES = 256 << 20  # that graphs and the code of kernels take at most, which the driver allocates


def _nobody_watches(_done: int, _all: int) -> None:
    """Kernels are compiled."""


@dataclass(frozen=True, eq=False, slots=True)
class Routing:
    """What `route` writes: (…, top_k) each."""

    experts: Value
    weights: Value

    @property
    def top_k(self) -> int:
        return self.experts.width


class CudaBackend:
    """Implements `kernels.backend.Backend` on one NVIDIA GPU. Used by one thread."""

    name = "cuda"

    def __init__(
        self,
        kernels: Kernels,
        make_launcher: MakeLauncher = KernelLauncher,
        *,
        graphs: bool = True,
        fp8_cache: bool = False,
        on_compile: OnCompile = _nobody_watches,
    ) -> None:
        """`on_compile(done, all)` is told of kernels that `compile` finds in no cache. `fp8_cache`: keys and
        values are float8, see `cache_type`; else float16.
        """
        self._on_compile = on_compile
        self._kernels, self._make_launcher = kernels, make_launcher
        self._device = kernels.device
        self._graphs = graphs
        self._cache_dtype = FP8 if fp8_cache else ATTENTION_DTYPE
        self.memory = CudaMemory(self._device)
        self._uploader = Uploader(self._device)
        self._program: Program | None = None  # being traced
        self._staging: Staging | None = None
        self.description = _description(kernels, fp8_cache)

    # -- memory ------------------------------------------------------------------------------------------

    def available_memory(self) -> int:
        """Bytes of device memory that nobody has."""
        return self.memory.free_bytes()

    def displaces_files(self, num_bytes: int) -> bool:
        """No: the device's memory is its own."""
        return False

    def matrix(
        self,
        parts: Sequence[Matrix],
        bias: Sequence[NDArray[np.float32] | None] = (),
        *,
        gated: bool = False,
        head_dim: int = 0,
    ) -> CudaWeight:
        """Raises UnsupportedFormat naming the tensor; InsufficientMemory."""
        try:
            return self._note(self._uploader.weight(parts, bias, gated=gated, head_dim=head_dim))
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory(f"{parts[0].name} does not fit into the GPU's memory") from error

    def experts(
        self,
        parts: Sequence[Matrix],
        num_experts: int,
        bias: Sequence[NDArray[np.float32] | None] = (),
    ) -> tuple[PackedExperts, ...]:
        """Raises as `matrix` does."""
        try:
            return self._note(pack_experts(parts, num_experts, bias, self._uploader))
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory(f"{parts[0].name} does not fit into the GPU's memory") from error

    def embedding(self, table: Matrix) -> CudaWeight:
        """Raises as `matrix` does. One packed copy serves `embed` and `linear`."""
        self._kernels.prepare()  # here, where loading begins: planning memory needs no kernel
        try:
            return self._note(self._uploader.weight((table,), packed=True))
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory(f"{table.name} does not fit into the GPU's memory") from error

    def vector(self, values: NDArray[np.float32]) -> torch.Tensor:
        return self._note(torch.as_tensor(np.array(values, np.float32, order="C"), device=self._device))

    def _note(self, weight: T) -> T:
        return self.memory.note("weights", weight)

    def allocate_inputs(self, limits: Limits) -> BatchInputs:
        staging = self._staging = Staging(limits, self._device)
        return staging.host

    def allocate_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> LayerCache:
        """(2, num_blocks, num_kv_heads, block_size, head_dim), keys first. Raises InsufficientMemory."""
        shape = 2, num_blocks, num_kv_heads, block_size, head_dim
        try:
            cache = LayerCache(torch.zeros(shape, dtype=self._cache_dtype, device=self._device))
            return self.memory.note("KV cache", cache)
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory(f"{num_blocks} KV blocks do not fit into the GPU's memory") from error

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        if block_size % _BLOCK_MULTIPLE:
            raise InvalidConfiguration(
                f"block_size is {block_size}; the CUDA backend needs a multiple of {_BLOCK_MULTIPLE}"
            )
        return 2 * block_size * num_kv_heads * head_dim * self._cache_dtype.itemsize

    # -- operations --------------------------------------------------------------------------------------

    def embed(self, indices: Any, table: CudaWeight) -> Value:
        if indices not in (InputName("token_ids"), InputName("positions")):
            raise Internal("embed takes the step's own token_ids or positions")
        out = fresh(table.k, Rows.TOKENS)
        self._record(Embed(indices=indices, table=table.table, out=out))
        return out

    def linear(self, x: Value, weight: CudaWeight) -> Value:
        _check_width(x, weight.k, "linear")
        out = fresh(weight.n, x.rows)
        for part in weight.parts:
            self._record(
                Linear(x=x, weight=part.weight, bias=part.bias, out=out.columns(part.column, part.n))
            )
        return out

    def split(self, x: Value, widths: Sequence[int]) -> tuple[Value, ...]:
        _check_width(x, sum(widths), "split")
        columns = [sum(widths[:index]) for index in range(len(widths))]
        return tuple(x.columns(column, width) for column, width in zip(columns, widths, strict=True))

    def rms_norm(self, x: Value, gain: torch.Tensor, eps: float) -> Value:
        if x.width % len(gain):
            raise Internal(f"rms_norm: {x.width} columns are not runs of {len(gain)}")
        out = fresh(x.width, x.rows)
        self._record(Norm(x=x, gain=gain, eps=eps, out=out))
        return out

    def layer_norm(self, x: Value, gain: torch.Tensor, bias: torch.Tensor, eps: float) -> Value:
        _check_width(x, len(gain), "layer_norm")
        out = fresh(x.width, x.rows)
        self._record(Norm(x=x, gain=gain, bias=bias, eps=eps, out=out))
        return out

    def rope(self, x: Value, positions: Any, params: RopeParams, head_dim: int) -> Value:
        if x.width % head_dim or not 0 < params.rotary_dim <= head_dim:
            raise Internal(f"rope: {x.width} columns, heads of {head_dim}, {params.rotary_dim} rotated")
        out = fresh(x.width, x.rows)
        self._record(Rope(x=x, params=params, head_dim=head_dim, out=out))
        return out

    def store_kv(self, k: Value, v: Value, cache: LayerCache, inputs: BatchInputs) -> None:
        self._record(StoreKv(k=k, v=v, cache=cache))

    def attention(
        self,
        q: Value,
        cache: LayerCache,
        inputs: BatchInputs,
        params: AttentionParams,
        sinks: torch.Tensor | None = None,
    ) -> Value:
        held = cache.tensor.shape[2], cache.tensor.shape[4]
        if (params.num_kv_heads, params.head_dim) != held or params.num_heads % params.num_kv_heads:
            raise Internal(
                f"attention: {params.num_heads} heads, {params.num_kv_heads} KV heads of {params.head_dim}; "
                f"the cache has {held[0]} of {held[1]}"
            )
        _check_width(q, params.num_heads * params.head_dim, "attention")
        out = fresh(q.width, q.rows)
        self._record(Attend(q=q, cache=cache, params=params, sinks=sinks, out=out))
        return out

    def glu(self, kind: Glu, gate: Value, up: Value) -> Value:
        _check_alike(gate, up, kind.value)
        out = fresh(gate.width, gate.rows)
        self._record(Gated(kind=kind, gate=gate, up=up, out=out))
        return out

    def gelu(self, x: Value) -> Value:
        out = fresh(x.width, x.rows)
        self._record(Gelu(x=x, out=out))
        return out

    def route(self, logits: Value, top_k: int) -> Routing:
        if not 1 <= top_k <= logits.width:
            raise Internal(f"route: {top_k} of {logits.width} experts")
        experts, weights = fresh(top_k, logits.rows, torch.int32), fresh(top_k, logits.rows)
        self._record(Route(logits=logits, top_k=top_k, out=experts, out_weights=weights))
        return Routing(experts, weights)

    def expert_linear(
        self, x: Value, weight: tuple[PackedExperts, ...], routing: Routing
    ) -> tuple[Value, ...]:
        k, top_k = weight[0].shape.k, routing.top_k
        if x.width not in (k, top_k * k) or x.rows is not routing.experts.rows:
            raise Internal(f"expert_linear: {x.width} columns, not {k} or {top_k * k}")
        outputs: list[Value] = []
        for stack in weight:
            out = fresh(top_k * stack.n, x.rows)
            self._record(ExpertLinear(x=x, weight=stack, experts=routing.experts, out=out))
            outputs += self.split(out, (out.width // 2,) * 2) if stack.paired else (out,)
        return tuple(outputs)

    def combine(self, x: Value, routing: Routing) -> Value:
        width, rest = divmod(x.width, routing.top_k)
        if rest or x.rows is not routing.experts.rows:
            raise Internal(f"combine: {x.width} columns are not {routing.top_k} slots")
        out = fresh(width, x.rows)
        self._record(Combine(x=x, weights=routing.weights, out=out))
        return out

    def add(self, x: Value, y: Value) -> Value:
        _check_alike(x, y, "add")
        out = fresh(x.width, x.rows)
        self._record(Add(x=x, y=y, out=out))
        return out

    def scale(self, x: Value, factor: float) -> Value:
        out = fresh(x.width, x.rows)
        self._record(Scale(x=x, factor=factor, out=out))
        return out

    def take(self, x: Value, indices: Any) -> Value:
        if indices != InputName("logit_tokens") or x.rows is not Rows.TOKENS:
            raise Internal("take: rows of the step's own logit_tokens, once")
        out = fresh(x.width, Rows.LOGITS)
        self._record(Take(x=x, out=out))
        return out

    def _record(self, operation: Operation) -> None:
        if self._program is None:
            raise Internal(
                f"{type(operation).__name__} outside compile: this backend only records operations"
            )
        self._program.record(operation)

    # -- running -----------------------------------------------------------------------------------------

    def compile(self, forward: Forward, inputs: BatchInputs, limits: Limits) -> CompiledForward:
        """Raises InsufficientMemory; Internal for shapes that do not fit together."""
        try:
            step = self._build(forward, inputs, limits)
            if self._device.type == "cuda":
                with torch.inference_mode():
                    step.warm(self._on_compile)
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory("a step's buffers do not fit into the GPU's memory") from error
        return step

    def rehearse(self, forward: Forward, limits: Limits) -> Workspaces:
        """Raises as `compile` does."""
        self._uploader.close()  # or what goes with it would count against what a step takes
        before = self.memory.allocated_bytes()
        try:
            step = self._build(forward, self.allocate_inputs(limits), limits)
        except torch.cuda.OutOfMemoryError as error:
            raise InsufficientMemory("a step's buffers do not fit into the GPU's memory") from error
        taken = self.memory.allocated_bytes() - before
        sampler_bytes = step.sampler_bytes
        self._staging = None
        return Workspaces(
            buffers_bytes=taken - sampler_bytes, sampler_bytes=sampler_bytes, graphs_bytes=GRAPH_BYTES
        )

    def _build(self, forward: Forward, inputs: BatchInputs, limits: Limits) -> CudaStep:
        """A step with all its buffers, but nothing compiled yet."""
        program = self._program = Program()
        try:
            result: Value = forward(BatchInputs(*(InputName(entry.name) for entry in fields(BatchInputs))))
        finally:
            self._program = None
        staging = self._staging
        if staging is None or inputs is not staging.host:
            raise Internal("compile takes the inputs that this backend allocated last")
        self._uploader.close()
        operations = fuse(program.operations, result)
        sampler = None
        with torch.inference_mode():
            if self._device.type == "cuda" and result.width <= MAX_VOCAB:
                sampler = DeviceSampler(self._kernels, result.width, limits.max_rows, limits.longest)
            drawn = None if sampler is None else sampler.token_ids[0]
            launcher = self._make_launcher(self._kernels, staging.device, limits, operations, drawn)
            executor = Executor(
                operations, result, launcher, staging, limits, self._kernels, graphs=self._graphs
            )
            if sampler is None:
                return CudaStep(executor, self._device)
            rounds = Rounds(self._kernels, staging.device, limits, sampler.token_ids, sampler.ints)
            return DrawingStep(executor, self._device, sampler, rounds)

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces:
        activations = 6 * limits.max_tokens * (widths.widest + 64)
        logits = 2 * limits.max_rows * (widths.vocab_size + 64)
        angles = widths.angles * limits.longest
        unpacked = min(wide.SCRATCH_BYTES, 2 * widths.widest**2)
        return Workspaces(
            buffers_bytes=4 * (activations + logits + angles) + _SCRATCH_BYTES + unpacked,
            sampler_bytes=DeviceSampler.device_bytes(widths.vocab_size, limits.max_rows, limits.longest),
            graphs_bytes=GRAPH_BYTES,
        )

    def close(self) -> None:
        """Nothing is held but memory, which goes with the backend and the steps it compiled."""


def missing_for_cuda() -> str | None:
    """Why no GPU can be used, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (a GPU needs a CUDA build of torch, and a driver)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed, which compiles the kernels"
    return None


def open_cuda(config: DeviceConfig, on_compile: OnCompile) -> CudaBackend:
    """The backend on the GPU that `config` names. Raises InvalidConfiguration saying what is missing."""
    missing = missing_for_cuda()
    if missing is not None:
        raise InvalidConfiguration(f"device is cuda; {missing}")
    if config.kv_cache_dtype == "float32":
        raise InvalidConfiguration(
            "kv_cache_dtype is float32; the CUDA backend keeps K and V as float16 or fp8"
        )
    count = torch.cuda.device_count()
    if not 0 <= config.gpu_index < count:
        raise InvalidConfiguration(f"gpu_index is {config.gpu_index}; there are {count} GPUs, counted from 0")
    device = torch.device("cuda", config.gpu_index)
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability < OLDEST:
        raise InvalidConfiguration(
            f"the GPU has compute capability {major}.{minor}; 8.0 is the oldest that works"
        )
    fp8 = config.kv_cache_dtype == "fp8"
    kernels = Kernels(device, capability, overlap=FULL_OVERLAP, prepare=prepare_triton)
    return CudaBackend(kernels, fp8_cache=fp8, on_compile=on_compile)


def _description(kernels: Kernels, fp8_cache: bool) -> str:
    capability = f"compute capability {kernels.capability // 10}.{kernels.capability % 10}"
    on_cuda = kernels.device.type == "cuda"
    device = torch.cuda.get_device_name(kernels.device) if on_cuda else "no device"
    return f"{device}, {capability}, {'fp8' if fp8_cache else 'float16'} KV cache"


def _check_width(value: Value, width: int, operation: str) -> None:
    if value.width != width:
        raise Internal(f"{operation}: the tensor has {value.width} columns, not {width}")


def _check_alike(x: Value, y: Value, operation: str) -> None:
    if (x.width, x.rows) != (y.width, y.rows):
        raise Internal(f"{operation}: {x.width} columns of {x.rows.name}, {y.width} of {y.rows.name}")
