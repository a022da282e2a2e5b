"""IQ4_NL: 32 indices of 4 bits into a table of uneven steps, and a float16 scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import fit_scale, reciprocal

VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
# For the halves from -128 on: the index of the value nearest to what lies between one and the next.
_INDEX = np.abs(np.arange(-128, 128, 0.5)[:, None] + 0.25 - VALUES).argmin(axis=1).astype(np.uint8)


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale = halves(blocks, 0)  # (n, 1)
    return scale * VALUES[planes(blocks[:, 2:], 4)]


def _nearest(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The index of the nearest value. The borders lie on halves, so a table of halves decides."""
    return _INDEX[np.clip(np.floor(scaled * 2) + 256, 0, 511).astype(np.int16)]


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale = fit_scale(
        weights, lambda scaled: VALUES[_nearest(scaled)], [float(VALUES[0]) + step for step in range(-7, 8)]
    )
    stored = half_bytes(scale)
    q = _nearest(weights * reciprocal(halves(stored, 0)))
    return np.concatenate([stored, pack_planes(q, 4)], axis=1)


GPU = GpuLayout(codes=plane_bits(2, 16, 4), header=in_words(byte_bits(0, 2)), steps=(128, 256, 64))

IQ4_NL = WeightFormat(
    name="IQ4_NL",
    ggml_type=20,
    block_size=32,
    type_size=18,
    dequantize=dequantize,
    quantize=quantize,
    gpu=GPU,
)
