"""The KV cache's tensors: one LayerCache a layer. Layers of a cache group share block numbers; block 0 is null."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import replace

from worker_orcd.kernels.backend import Backend, LayerCache
from worker_orcd.model.config import ModelConfig


def allocate_kv_cache(
    backend: Backend, config: ModelConfig, num_blocks: SequenceABC[int], block_size: int
) -> tuple[LayerCache, ...]:
    """Raises InsufficientMemory. `num_blocks` counts the null block; one number for each cache group."""
    caches: list[LayerCache] = []
    for layer in config.layers:
        attention, group = layer.attention, config.cache_groups.index(layer.attention.window)
        cache = backend.allocate_cache(
            num_blocks[group], block_size, attention.num_kv_heads, attention.head_dim
        )
        caches.append(replace(cache, group=group))
    return tuple(caches)
