"""Q5_1: 32 weights of 5 bits with a float16 scale and a float16 minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import bits_in_order, halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale, minimum = halves(blocks, 0), halves(blocks, 2)  # (n, 1)
    high = bits_in_order(blocks[:, 4:8])  # (n, 32)
    q = planes(blocks[:, 8:], 4) | high << 4  # (n, 32), 0 to 31
    return scale * q.astype(np.float32) + minimum


Q5_1 = WeightFormat(name="Q5_1", ggml_type=7, block_size=32, type_size=24, dequantize=dequantize)
