"""Q4_0: 32 weights of 4 bits, offset 8, and a float16 scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import farthest, reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    q = planes(blocks[:, 2:], 4).view(np.int8) - np.int8(8)  # (n, 32), -8 to 7
    return scale * q.astype(np.float32)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The weight farthest from 0 becomes -8, whatever its sign."""
    scale = farthest(weights) / np.float32(-8)  # (n, 1)
    q = (weights * reciprocal(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([half_bytes(scale), pack_planes(q, 4)], axis=1)


GPU = GpuLayout(codes=plane_bits(2, 16, 4), header=in_words(byte_bits(0, 2)), steps=(128, 256, 64))

Q4_0 = WeightFormat(
    name="Q4_0", ggml_type=2, block_size=32, type_size=18, dequantize=dequantize, quantize=quantize, gpu=GPU
)
