"""IQ4_NL: 32 indices of 4 bits into a table of uneven steps, and a float16 scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, planes
from worker_orcd.quant.format import WeightFormat

VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    return scale * VALUES[planes(blocks[:, 2:], 4)]


IQ4_NL = WeightFormat(name="IQ4_NL", ggml_type=20, block_size=32, type_size=18, dequantize=dequantize)
