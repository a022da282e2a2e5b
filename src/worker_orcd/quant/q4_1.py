"""Q4_1: 32 weights of 4 bits with a float16 scale and a float16 minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale, minimum = halves(blocks, 0), halves(blocks, 2)  # (n, 1)
    q = planes(blocks[:, 4:], 4).astype(np.float32)  # (n, 32), 0 to 15
    return scale * q + minimum


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    minimum = weights.min(axis=1, keepdims=True)
    scale = (weights.max(axis=1, keepdims=True) - minimum) / np.float32(15)
    q = ((weights - minimum) * reciprocal(scale) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([half_bytes(scale), half_bytes(minimum), pack_planes(q, 4)], axis=1)


GPU = GpuLayout(codes=plane_bits(4, 16, 4), header=in_words(byte_bits(0, 4)), steps=(128, 64))

Q4_1 = WeightFormat(
    name="Q4_1", ggml_type=3, block_size=32, type_size=20, dequantize=dequantize, quantize=quantize, gpu=GPU
)
