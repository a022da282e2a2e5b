"""
The memory plan once more, on a device whose memory is counted: from what things take, not from what they may.

Before loading a plan knows the file and upper bounds. Once the weights are on the device they are as large as
they are, a step's buffers can be allocated for a moment to see what they take, and the driver tells what is
left, whatever others have done meanwhile. The KV cache then gets what it can have of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.kernels.backend import Backend, BatchInputs, RehearsingBackend, Tensor
from worker_orcd.kernels.memory import Held, Workspaces
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import Weights
from worker_orcd.runner.kv_cache import allocate_kv_cache
from worker_orcd.runner.plan import Measured, MemoryPlan, make_plan, mib


def settled(
    plan: MemoryPlan,
    config: ModelConfig,
    weights: Weights,
    backend: Backend,
    engine: EngineConfig,
    device: DeviceConfig,
) -> MemoryPlan:
    """The plan to allocate the KV cache by; `plan` itself where memory is not counted.

    `config`: as the file has it. Raises InsufficientMemory where too little is left.
    """
    memory = backend.memory
    if not (memory.counts and isinstance(backend, RehearsingBackend)):
        return plan
    spaces = _rehearsed(plan, Decoder(config.serving(plan.max_model_len), weights, backend), backend, engine)
    memory.forget("KV cache")
    taken = memory.taken_bytes()
    return make_plan(
        config,
        taken,
        backend,
        engine,
        device,
        backend.available_memory() + taken,
        measured=Measured(taken, spaces),
    )


def _rehearsed(
    plan: MemoryPlan, decoder: Decoder, backend: RehearsingBackend, engine: EngineConfig
) -> Workspaces:
    groups = [replace(group, num_blocks=1) for group in plan.kv_groups]
    caches = allocate_kv_cache(backend, decoder.config, groups, plan.block_size)

    def forward(inputs: BatchInputs) -> Tensor:
        return decoder.forward(inputs, caches)

    return backend.rehearse(forward, plan.limits(engine))


def seal(plan: MemoryPlan, backend: Backend, warn: Callable[[str], None]) -> Held | None:
    """All is allocated: from here on nothing more is. What is held; None where that is not counted."""
    held = backend.memory.held()
    backend.memory.seal()
    if held is not None and held.total_bytes > plan.usable_bytes:
        warn(
            f"the model takes {mib(held.total_bytes)} of the {mib(plan.usable_bytes)} that may be used:"
            f" {mib(held.spare_bytes)} lie between allocations, {mib(held.driver_bytes)} are graphs and code"
        )
    return held
