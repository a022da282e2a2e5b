"""Q2_K: 256 weights of 2 bits in sixteen sub-blocks, each with a 4-bit scale and a 4-bit minimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import fit_scale_and_minimum, reciprocal


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    d, dmin = halves(blocks, 80), halves(blocks, 82)  # (n, 1)
    scale = (d * (blocks[:, :16] & 15).astype(np.float32)).reshape(-1, 16, 1)  # (n, 16, 1)
    minimum = (dmin * (blocks[:, :16] >> 4).astype(np.float32)).reshape(-1, 16, 1)  # (n, 16, 1)
    packed = blocks[:, 16:80].reshape(-1, 2, 32)
    q = planes(packed, 2).reshape(-1, 16, 16).astype(np.float32)  # 0 to 3
    return np.subtract(scale * q, minimum).reshape(-1, 256)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    x = weights.reshape(-1, 16)  # (16 n, 16)
    fitted = fit_scale_and_minimum(x, np.abs(x), 3, [2.5 + step / 10 for step in range(16)])
    fields: list[NDArray[np.uint8]] = []
    four: list[NDArray[np.uint8]] = []  # scales, minimums: (n, 16)
    for values in (part.reshape(-1, 16) for part in fitted):
        unit = values.max(axis=1, keepdims=True) / np.float32(15)
        fields.append(half_bytes(unit))
        four.append(np.rint(values * reciprocal(unit)).clip(0, 15).astype(np.uint8))
    scale, minimum = (
        (halves(stored, 0) * codes.astype(np.float32))[:, :, None]  # as they will be read
        for stored, codes in zip(fields, four, strict=True)
    )
    q = np.rint((weights.reshape(-1, 16, 16) + minimum) * reciprocal(scale)).clip(0, 3).astype(np.uint8)
    packed = pack_planes(q.reshape(-1, 2, 128), 2).reshape(-1, 64)
    nibbles = pack_planes(np.concatenate(four, axis=1).reshape(-1, 32), 4)
    return np.concatenate([nibbles, packed, *fields], axis=1)


_SUB = byte_bits(0, 16)  # a scale (low nibble) and a minimum each

GPU = GpuLayout(
    codes=np.concatenate([plane_bits(16, 32, 2), plane_bits(48, 32, 2)]),
    # Four words of scales (low half) and minimums (high half) of four sub-blocks each, then d and dmin.
    header=in_words(
        *(f for i in range(0, 16, 4) for f in (_SUB[i : i + 4, :4], _SUB[i : i + 4, 4:])), byte_bits(80, 4)
    ),
    steps=(256,),
)

Q2_K = WeightFormat(
    name="Q2_K", ggml_type=10, block_size=256, type_size=84, dequantize=dequantize, quantize=quantize, gpu=GPU
)
