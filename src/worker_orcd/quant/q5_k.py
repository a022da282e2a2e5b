"""Q5_K: 256 weights of 5 bits in eight sub-blocks, each with a 6-bit scale and a 6-bit minimum."""

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
    high = planes(blocks[:, 16:48], 1).reshape(-1, 8, 32)
    low = planes(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    q = (low | high << 4).astype(np.float32)  # (n, 8, 32), 0 to 31
    return np.subtract(scale * q, minimum).reshape(-1, 256)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    fields, q = k_codes(weights, top=31)  # (n, 16), (n, 8, 32)
    high = pack_planes((q >> 4).reshape(-1, 256), 1)
    low = pack_planes((q & 15).reshape(-1, 4, 64), 4).reshape(-1, 128)
    return np.concatenate([fields, high, low], axis=1)


GPU = GpuLayout(
    codes=np.concatenate(
        [np.concatenate([plane_bits(48 + 32 * group, 32, 4) for group in range(4)]), plane_bits(16, 32, 1)],
        axis=1,
    ),
    high_bits=1,
    header=k_header_bits(),
    steps=(256, 128),
)

Q5_K = WeightFormat(
    name="Q5_K",
    ggml_type=13,
    block_size=256,
    type_size=176,
    dequantize=dequantize,
    quantize=quantize,
    gpu=GPU,
)
