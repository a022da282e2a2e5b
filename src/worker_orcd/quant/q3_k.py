"""Q3_K: 256 weights of 3 bits, offset 4, in sixteen sub-blocks, each with a 6-bit scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, pairs, plane_bits
from worker_orcd.quant.scales import farthest, fit_scale, reciprocal, rounded


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    high = planes(blocks[:, :32], 1)  # (n, 256)
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = (low | high << 2).view(np.int8) - np.int8(4)  # (n, 256), -4 to 3
    scale = planes(blocks[:, 96:104], 4) | planes(blocks[:, 104:108], 2) << 4  # (n, 16), 0 to 63
    d = halves(blocks, 108) * (scale.view(np.int8) - np.int8(32)).astype(np.float32)  # (n, 16)
    return (d.reshape(-1, 16, 1) * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    x = weights.reshape(-1, 16)  # (16 n, 16)
    fitted = fit_scale(x, rounded(-4, 3), [-4 - step / 10 for step in range(-9, 10)]).reshape(-1, 16)
    unit = farthest(fitted) / np.float32(-32)  # (n, 1)
    scales = np.rint(fitted * reciprocal(unit)).clip(-32, 31)  # (n, 16)
    stored = half_bytes(unit)
    q = np.rint(weights.reshape(-1, 16, 16) * reciprocal(halves(stored, 0) * scales)[:, :, None])
    codes = (q.clip(-4, 3) + 4).astype(np.uint8).reshape(-1, 256)
    high = pack_planes(codes >> 2, 1)  # (n, 32)
    low = pack_planes((codes & 3).reshape(-1, 2, 128), 2).reshape(-1, 64)
    six = (scales + 32).astype(np.uint8)
    return np.concatenate([high, low, pack_planes(six & 15, 4), pack_planes(six >> 4, 2), stored], axis=1)


_SCALES = np.concatenate([plane_bits(96, 8, 4), plane_bits(104, 4, 2)], axis=1)  # (16, 6)

GPU = GpuLayout(
    codes=np.concatenate(
        [np.concatenate([plane_bits(32, 32, 2), plane_bits(64, 32, 2)]), plane_bits(0, 32, 1)], axis=1
    ),
    high_bits=1,
    # Two words of the low nibbles of the scales, even sub-blocks in the low half and odd ones in the high, a
    # word of their upper two bits in the same order, then d.
    header=in_words(
        *pairs(_SCALES[:8, :4]), *pairs(_SCALES[8:, :4]), *pairs(_SCALES[:, 4:]), byte_bits(108, 2)
    ),
    steps=(256,),
)

Q3_K = WeightFormat(
    name="Q3_K",
    ggml_type=11,
    block_size=256,
    type_size=110,
    dequantize=dequantize,
    quantize=quantize,
    gpu=GPU,
)
