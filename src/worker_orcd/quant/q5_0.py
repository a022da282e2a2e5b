"""Q5_0: 32 weights of 5 bits, offset 16, and a float16 scale; the fifth bits are kept apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import bits_in_order, half_bytes, halves, pack_bits, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import farthest, reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    high = bits_in_order(blocks[:, 2:6])  # (n, 32)
    q = (planes(blocks[:, 6:], 4) | high << 4).view(np.int8) - np.int8(16)  # (n, 32), -16 to 15
    return scale * q.astype(np.float32)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The weight farthest from 0 becomes -16, whatever its sign."""
    scale = farthest(weights) / np.float32(-16)  # (n, 1)
    q = (weights * reciprocal(scale) + np.float32(16.5)).astype(np.uint8).clip(0, 31)
    return np.concatenate([half_bytes(scale), pack_bits(q >> 4), pack_planes(q & 15, 4)], axis=1)


GPU = GpuLayout(
    codes=np.concatenate([plane_bits(6, 16, 4), byte_bits(2, 4).reshape(32, 1)], axis=1),
    high_bits=1,
    header=in_words(byte_bits(0, 2)),
    steps=(128, 256, 64),
)

Q5_0 = WeightFormat(
    name="Q5_0", ggml_type=6, block_size=32, type_size=22, dequantize=dequantize, quantize=quantize, gpu=GPU
)
