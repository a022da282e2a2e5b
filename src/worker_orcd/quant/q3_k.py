"""Q3_K: 256 weights of 3 bits, offset 4, in sixteen sub-blocks, each with a 6-bit scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    high = planes(blocks[:, :32], 1)  # (n, 256)
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = (low | high << 2).view(np.int8) - np.int8(4)  # (n, 256), -4 to 3
    scale = planes(blocks[:, 96:104], 4) | planes(blocks[:, 104:108], 2) << 4  # (n, 16), 0 to 63
    d = halves(blocks, 108) * (scale.view(np.int8) - np.int8(32)).astype(np.float32)  # (n, 16)
    return (d.reshape(-1, 16, 1) * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


Q3_K = WeightFormat(name="Q3_K", ggml_type=11, block_size=256, type_size=110, dequantize=dequantize)
