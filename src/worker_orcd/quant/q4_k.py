"""Q4_K: 256 weights of 4 bits in eight sub-blocks, each with a 6-bit scale and a 6-bit minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, k_scales_and_mins, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, k_header_bits, plane_bits
from worker_orcd.quant.k_codes import k_codes


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scales, mins = k_scales_and_mins(blocks[:, 4:16])
    scale = (halves(blocks, 0) * scales).reshape(-1, 8, 1)  # (n, 8, 1)
    minimum = (halves(blocks, 2) * mins).reshape(-1, 8, 1)  # (n, 8, 1)
    q = planes(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32).astype(np.float32)  # 0 to 15
    return np.subtract(scale * q, minimum).reshape(-1, 256)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    fields, q = k_codes(weights, top=15)  # (n, 16), (n, 8, 32)
    packed = pack_planes(q.reshape(-1, 4, 64), 4).reshape(-1, 128)
    return np.concatenate([fields, packed], axis=1)


GPU = GpuLayout(
    codes=np.concatenate([plane_bits(16 + 32 * group, 32, 4) for group in range(4)]),
    header=k_header_bits(),
    steps=(256, 128),
)

Q4_K = WeightFormat(
    name="Q4_K",
    ggml_type=12,
    block_size=256,
    type_size=144,
    dequantize=dequantize,
    quantize=quantize,
    gpu=GPU,
)
