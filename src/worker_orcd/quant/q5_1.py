"""Q5_1: 32 weights of 5 bits with a float16 scale and a float16 minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import bits_in_order, half_bytes, halves, pack_bits, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale, minimum = halves(blocks, 0), halves(blocks, 2)  # (n, 1)
    high = bits_in_order(blocks[:, 4:8])  # (n, 32)
    q = planes(blocks[:, 8:], 4) | high << 4  # (n, 32), 0 to 31
    return scale * q.astype(np.float32) + minimum


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    minimum = weights.min(axis=1, keepdims=True)
    scale = (weights.max(axis=1, keepdims=True) - minimum) / np.float32(31)
    q = ((weights - minimum) * reciprocal(scale) + np.float32(0.5)).astype(np.uint8).clip(0, 31)
    bits = [pack_bits(q >> 4), pack_planes(q & 15, 4)]
    return np.concatenate([half_bytes(scale), half_bytes(minimum), *bits], axis=1)


GPU = GpuLayout(
    codes=np.concatenate([plane_bits(8, 16, 4), byte_bits(4, 4).reshape(32, 1)], axis=1),
    high_bits=1,
    header=in_words(byte_bits(0, 4)),
    steps=(128, 64),
)

Q5_1 = WeightFormat(
    name="Q5_1", ggml_type=7, block_size=32, type_size=24, dequantize=dequantize, quantize=quantize, gpu=GPU
)
