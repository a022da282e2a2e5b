"""F16: IEEE half precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits


def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return halves(blocks, 0)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    return half_bytes(weights)


GPU = GpuLayout(codes=byte_bits(0, 2).reshape(1, 16), header=byte_bits(0, 0).reshape(-1), steps=(64,))

F16 = WeightFormat(
    name="F16", ggml_type=1, block_size=1, type_size=2, dequantize=dequantize, quantize=quantize, gpu=GPU
)
