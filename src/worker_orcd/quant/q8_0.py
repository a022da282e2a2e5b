"""Q8_0: 32 signed bytes and a float16 scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words
from worker_orcd.quant.scales import reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    return scale * blocks[:, 2:].view(np.int8).astype(np.float32)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To the nearest, ties away from 0."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    scaled = weights * reciprocal(scale)
    q = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
    return np.concatenate([half_bytes(scale), q.view(np.uint8)], axis=1)


GPU = GpuLayout(
    codes=byte_bits(2, 32), flipped=byte_bits(2, 32)[:, 7], header=in_words(byte_bits(0, 2)), steps=(128, 64)
)

Q8_0 = WeightFormat(
    name="Q8_0", ggml_type=8, block_size=32, type_size=34, dequantize=dequantize, quantize=quantize, gpu=GPU
)
