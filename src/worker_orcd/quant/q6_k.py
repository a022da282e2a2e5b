"""Q6_K: 256 weights of 6 bits, offset 32, in sixteen sub-blocks, each with a signed byte as scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import halves, planes
from worker_orcd.quant.format import WeightFormat


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = planes(blocks[:, :128].reshape(-1, 2, 64), 4)  # (n, 2, 128)
    high = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2)  # (n, 2, 128)
    q = (low | high << 4).view(np.int8) - np.int8(32)  # -32 to 31
    scale = halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (n, 16)
    return (scale.reshape(-1, 16, 1) * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


Q6_K = WeightFormat(name="Q6_K", ggml_type=14, block_size=256, type_size=210, dequantize=dequantize)
