"""The KV cache's tensors: one LayerCache a layer, all with the same block numbers. Block 0 is null."""

from __future__ import annotations

from worker_orcd.kernels.backend import Backend, LayerCache
from worker_orcd.model.config import ModelConfig


def allocate_kv_cache(
    backend: Backend, config: ModelConfig, num_blocks: int, block_size: int
) -> tuple[LayerCache, ...]:
    """Raises InsufficientMemory. `num_blocks` counts the null block."""
    return tuple(
        backend.allocate_cache(num_blocks, block_size, layer.attention.num_kv_heads, layer.attention.head_dim)
        for layer in config.layers
    )
