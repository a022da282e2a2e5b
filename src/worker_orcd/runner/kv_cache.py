"""The KV cache's tensors: one LayerCache a layer. Layers of a cache group share block numbers; 0 is null."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import replace

from worker_orcd.kernels.backend import Backend, LayerCache
from worker_orcd.model.config import ModelConfig
from worker_orcd.runner.cache_plan import GroupPlan


def allocate_kv_cache(
    backend: Backend, config: ModelConfig, groups: SequenceABC[GroupPlan], block_size: int
) -> tuple[LayerCache, ...]:
    """`groups`: as planned for this model. Raises InsufficientMemory."""
    numbers = {group.window: number for number, group in enumerate(groups)}
    caches: list[LayerCache] = []
    for layer in config.layers:
        attention, number = layer.attention, numbers[layer.attention.window]
        cache = backend.allocate_cache(
            groups[number].num_blocks, block_size, attention.num_kv_heads, attention.head_dim
        )
        caches.append(replace(cache, group=number))
    return tuple(caches)
