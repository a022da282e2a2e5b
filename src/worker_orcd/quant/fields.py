"""The bit fields that blocks are made of.

All bytes are little-endian. Formats store several small integers in a byte as *planes*: the lowest bits of
consecutive bytes are consecutive weights, then come the next bits of the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def halves(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    """The float16 at byte `start` of each block. (n, type_size) -> (n, 1)."""
    field = np.ascontiguousarray(blocks[:, start : start + 2])  # (n, 2)
    return field.view("<f2").astype(np.float32)


def half_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What `halves` reads: (n, 1) or (n,) -> (n, 2). Values beyond float16 become infinite."""
    with np.errstate(over="ignore"):
        return values.reshape(-1, 1).astype("<f2").view(np.uint8)


def planes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unsigned integers of `bits` bits (1, 2 or 4), plane by plane. (..., m) -> (..., 8 // bits * m)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]  # (planes, 1)
    values = (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)  # (..., planes, m)
    return values.reshape(*packed.shape[:-1], -1)


def pack_planes(values: NDArray[np.integer[Any]], bits: int) -> NDArray[np.uint8]:
    """What `planes` reads: (..., 8 // bits * m) of `bits` bits -> (..., m)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]  # (planes, 1)
    small = values.astype(np.uint8, copy=False)
    parts = small.reshape(*values.shape[:-1], 8 // bits, -1) << shifts  # (..., planes, m)
    return np.bitwise_or.reduce(parts, axis=-2)


def bits_in_order(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Single bits, the lowest of the first byte first. (n, m) -> (n, 8 * m)."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def pack_bits(bits: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """What `bits_in_order` reads: (n, 8 * m) -> (n, m)."""
    return np.packbits(bits.astype(np.uint8, copy=False), axis=-1, bitorder="little")


def k_scales_and_mins(packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The 6-bit scales and minimums of the eight sub-blocks of Q4_K and Q5_K. (n, 12) -> (n, 8) twice.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minimums 0-3 in their low six bits. Bytes 8-11 hold the low four
    bits of scales 4-7 (low nibble) and minimums 4-7 (high nibble); their upper two are the top of bytes 0-7.
    """
    first, second, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]  # (n, 4)
    scales = np.concatenate([first & 63, (low & 15) | (first >> 6) << 4], axis=1)  # (n, 8)
    mins = np.concatenate([second & 63, (low >> 4) | (second >> 6) << 4], axis=1)  # (n, 8)
    return scales.astype(np.float32), mins.astype(np.float32)


def pack_k_scales(scales: NDArray[np.uint8], mins: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What `k_scales_and_mins` reads: (n, 8) of 6 bits twice -> (n, 12)."""
    first = (scales[:, :4] & 63) | scales[:, 4:] >> 4 << 6
    second = (mins[:, :4] & 63) | mins[:, 4:] >> 4 << 6
    low = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    return np.concatenate([first, second, low], axis=1).astype(np.uint8, copy=False)
