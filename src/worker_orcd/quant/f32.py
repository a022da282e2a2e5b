"""F32: plain float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits


def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.array(blocks, order="C").view("<f4")  # a copy: like every format's, the caller may write to it


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.array(weights, "<f4", order="C").view(np.uint8)


GPU = GpuLayout(codes=byte_bits(0, 4).reshape(1, 32), header=byte_bits(0, 0).reshape(-1), steps=(64,))

F32 = WeightFormat(
    name="F32", ggml_type=0, block_size=1, type_size=4, dequantize=dequantize, quantize=quantize, gpu=GPU
)
