"""Q5_0: 32 weights of 5 bits, offset 16, and a float16 scale; the fifth bits are kept apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import bits_in_order, halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    high = bits_in_order(blocks[:, 2:6])  # (n, 32)
    q = (planes(blocks[:, 6:], 4) | high << 4).view(np.int8) - np.int8(16)  # (n, 32), -16 to 15
    return scale * q.astype(np.float32)


Q5_0 = WeightFormat(name="Q5_0", ggml_type=6, block_size=32, type_size=22, dequantize=dequantize)
