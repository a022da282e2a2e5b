"""Q4_1: 32 weights of 4 bits with a float16 scale and a float16 minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale, minimum = halves(blocks, 0), halves(blocks, 2)  # (n, 1)
    q = planes(blocks[:, 4:], 4).astype(np.float32)  # (n, 32), 0 to 15
    return scale * q + minimum


Q4_1 = WeightFormat(name="Q4_1", ggml_type=3, block_size=32, type_size=20, dequantize=dequantize)
