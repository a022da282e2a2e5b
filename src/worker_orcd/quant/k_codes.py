"""How Q4_K and Q5_K, which differ in the bits of a code only, find their scales and codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.fields import half_bytes, halves, pack_k_scales
from worker_orcd.quant.scales import fit_scale_and_minimum, reciprocal

_STEPS = np.arange(-10, 11) / 10


def k_codes(weights: NDArray[np.float32], top: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first 16 bytes of each block and its codes from 0 to `top`. (n, 256) -> (n, 16), (n, 8, 32)."""
    x = weights.reshape(-1, 32)  # (8 n, 32)
    size = np.sqrt(np.mean(x * x, axis=1, keepdims=True))
    scales, minimums = fit_scale_and_minimum(x, size + np.abs(x), top, (top + _STEPS).tolist())
    scale_fields, scale_codes = _six_bits(scales.reshape(-1, 8))
    minimum_fields, minimum_codes = _six_bits(minimums.reshape(-1, 8))
    fields = np.concatenate([scale_fields, minimum_fields, pack_k_scales(scale_codes, minimum_codes)], axis=1)
    scale = (halves(fields, 0) * scale_codes.astype(np.float32)).reshape(-1, 8, 1)  # as it will be read
    minimum = (halves(fields, 2) * minimum_codes.astype(np.float32)).reshape(-1, 8, 1)
    q = np.rint((weights.reshape(-1, 8, 32) + minimum) * reciprocal(scale))
    return fields, q.clip(0, top).astype(np.uint8)


def _six_bits(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The float16 of a block and the codes of its sub-blocks, whose product is about `values`, (n, 8)."""
    unit = values.max(axis=1, keepdims=True) / np.float32(63)
    return half_bytes(unit), np.rint(values * reciprocal(unit)).clip(0, 63).astype(np.uint8)
