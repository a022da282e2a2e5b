"""MXFP4: 32 floats of 4 bits (E2M1) and a power of two (E8M0), after the OCP Microscaling Formats v1.0.

The exponent byte e means 2^(e - 127). Unlike in that specification, and as in every GGUF reader, 255 is not
NaN but 2^128. Weights beyond the range of float32 become infinite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import planes
from worker_orcd.quant.format import WeightFormat

# Twice the sixteen E2M1 values: integers. Half the scale then never leaves the range of float32.
DOUBLED_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


@np.errstate(over="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    exponent = blocks[:, :1].astype(np.int32) - 128  # (n, 1), of half the scale
    half_scale = np.ldexp(np.float32(1), exponent)  # (n, 1)
    return half_scale * DOUBLED_VALUES[planes(blocks[:, 1:], 4)]


MXFP4 = WeightFormat(name="MXFP4", ggml_type=39, block_size=32, type_size=17, dequantize=dequantize)
