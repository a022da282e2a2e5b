"""BF16: the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits


def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    upper = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32)  # (n, 1)
    return (upper << np.uint32(16)).view(np.float32)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To the nearest, ties to the even one."""
    bits = np.ascontiguousarray(weights).view(np.uint32)  # (n, 1)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").view(np.uint8)


GPU = GpuLayout(codes=byte_bits(0, 2).reshape(1, 16), header=byte_bits(0, 0).reshape(-1), steps=(64,))

BF16 = WeightFormat(
    name="BF16", ggml_type=30, block_size=1, type_size=2, dequantize=dequantize, quantize=quantize, gpu=GPU
)
