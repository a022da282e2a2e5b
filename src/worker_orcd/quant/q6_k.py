"""Q6_K: 256 weights of 6 bits, offset 32, in sixteen sub-blocks, each with a signed byte as scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_planes, planes
from worker_orcd.quant.format import WeightFormat
from worker_orcd.quant.gpu_layout import GpuLayout, byte_bits, in_words, plane_bits
from worker_orcd.quant.scales import farthest, fit_scale, reciprocal, rounded


@np.errstate(invalid="ignore")
def dequantize(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = planes(blocks[:, :128].reshape(-1, 2, 64), 4)  # (n, 2, 128)
    high = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2)  # (n, 2, 128)
    q = (low | high << 4).view(np.int8) - np.int8(32)  # -32 to 31
    scale = halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (n, 16)
    return (scale.reshape(-1, 16, 1) * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    x = weights.reshape(-1, 16)  # (16 n, 16)
    fitted = fit_scale(x, rounded(-32, 31), [-32 - step / 10 for step in range(-9, 10)]).reshape(-1, 16)
    unit = farthest(fitted) / np.float32(-128)  # (n, 1)
    scales = np.rint(fitted * reciprocal(unit)).clip(-128, 127)  # (n, 16)
    stored = half_bytes(unit)
    q = np.rint(weights.reshape(-1, 16, 16) * reciprocal(halves(stored, 0) * scales)[:, :, None])
    codes = (q.clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 128)
    low, high = pack_planes(codes & 15, 4), pack_planes(codes >> 4, 2)  # (n, 2, 64), (n, 2, 32)
    fields = [scales.astype(np.int8).view(np.uint8), stored]
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), *fields], axis=1)


GPU = GpuLayout(
    codes=np.concatenate(
        [
            np.concatenate([plane_bits(64 * half, 64, 4) for half in range(2)]),
            np.concatenate([plane_bits(128 + 32 * half, 32, 2) for half in range(2)]),
        ],
        axis=1,
    ),
    high_bits=2,
    flipped=byte_bits(192, 16)[:, 7],
    header=in_words(byte_bits(192, 18)),
    steps=(128, 256),
)

Q6_K = WeightFormat(
    name="Q6_K",
    ggml_type=14,
    block_size=256,
    type_size=210,
    dequantize=dequantize,
    quantize=quantize,
    gpu=GPU,
)
