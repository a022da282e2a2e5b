"""The reference backend with keys and values that were rounded to fp8, as a GPU's fp8 cache has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from worker_orcd.kernels.backend import BatchInputs, LayerCache
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE, LARGEST_FP8

Rounding = Callable[[torch.Tensor], torch.Tensor]


def as_fp8(values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """What they become, of their own type."""
    return (values * scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8).to(values.dtype) / scale


def fp8_key(keys: torch.Tensor) -> torch.Tensor:
    return as_fp8(keys, KEY_SCALE)


class RoundedReference(ReferenceBackend):
    """With any rounding of keys and of values, (tokens, num_kv_heads * head_dim) float32."""

    def __init__(self, keys: Rounding = fp8_key, values: Rounding = as_fp8) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def store_kv(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, inputs: BatchInputs) -> None:
        super().store_kv(self.keys(k), self.values(v), cache, inputs)
