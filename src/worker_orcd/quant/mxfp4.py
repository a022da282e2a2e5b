"""MXFP4: 32 floats of 4 bits (E2M1) and a power of two (E8M0), after the OCP Microscaling Formats v1.0.

The exponent byte e means 2^(e - 127). Unlike in that specification, and as in every GGUF reader, 255 is not
NaN but 2^128. Weights beyond the range of float32 become infinite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits

# Twice the sixteen E2M1 values: integers. Half the scale then never leaves the range of float32.
DOUBLED_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)
_STEPS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # halfway between them


@np.errstate(over="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    exponent = blocks[:, :1].astype(np.int32) - 128  # (n, 1), of half the scale
    half_scale = np.ldexp(np.float32(1), exponent)  # (n, 1)
    return half_scale * DOUBLED_VALUES[planes(blocks[:, 1:], 4)]


@np.errstate(divide="ignore")
def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The scale is the largest that brings no weight below half its value: the largest weight is 4 to 8 times
    it, and beyond 6 is 6. Then to the nearest, ties towards 0.
    """
    largest = np.abs(weights).max(axis=1, keepdims=True)  # (n, 1)
    exponent = np.clip(np.floor(np.log2(largest)) - 2 + 127, 0, 254).astype(np.int32)
    doubled = np.ldexp(np.abs(weights), 128 - exponent)  # (n, 32), in units of half the scale
    q = np.zeros(weights.shape, np.uint8)
    for step in _STEPS:
        q += doubled > step
    q |= ((weights < 0) & (q > 0)).astype(np.uint8) << 3
    return np.concatenate([exponent.astype(np.uint8), pack_planes(q, 4)], axis=1)


GPU = GpuLayout(
    codes=plane_bits(1, 16, 4),
    header=in_words(byte_bits(0, 1)),
    steps=(128, 64),
    # Sign, exponent and mantissa (bit 3, 2-1 and 0 of a code) where a bfloat16 has them, or a shift away:
    # plane 0 at 15, 8-7 and 6, plane 1 three lower, plane 2 six lower, plane 3 in what is left.
    word_bits=(8, 9, 10, 4, 5, 6, 0, 1, 2, 11, 13, 14, 7, 12, 15, 3),
)

MXFP4 = WeightFormat(
    name="MXFP4", ggml_type=39, block_size=32, type_size=17, dequantize=dequantize, quantize=quantize, gpu=GPU
)
