"""Q2_K: 256 weights of 2 bits in sixteen sub-blocks, each with a 4-bit scale and a 4-bit minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    d, dmin = halves(blocks, 80), halves(blocks, 82)  # (n, 1)
    scale = (d * (blocks[:, :16] & 15).astype(np.float32)).reshape(-1, 16, 1)  # (n, 16, 1)
    minimum = (dmin * (blocks[:, :16] >> 4).astype(np.float32)).reshape(-1, 16, 1)  # (n, 16, 1)
    packed = blocks[:, 16:80].reshape(-1, 2, 32)
    q = planes(packed, 2).reshape(-1, 16, 16).astype(np.float32)  # 0 to 3
    return np.subtract(scale * q, minimum).reshape(-1, 256)


Q2_K = WeightFormat(name="Q2_K", ggml_type=10, block_size=256, type_size=84, dequantize=dequantize)
