"""Q8_0: 32 signed bytes and a float16 scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    return scale * blocks[:, 2:].view(np.int8).astype(np.float32)


Q8_0 = WeightFormat(name="Q8_0", ggml_type=8, block_size=32, type_size=34, dequantize=dequantize)
