"""Random blocks of every weight format, written directly as bytes: random codes, and scales that fit.

Nothing is quantised, so a gigabyte takes seconds. The weights that the blocks stand for have a mean of 0 and
the standard deviation asked for. Codes are uniform; scales vary within a tensor, as they do in files. Where
codes are not centred, a minimum centres them, or the signs of the scales are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant import BY_NAME
from worker_orcd.quant.fields import pack_k_scales
from worker_orcd.quant.iq4_nl import VALUES
from worker_orcd.quant.mxfp4 import DOUBLED_VALUES

Blocks = NDArray[np.uint8]  # (n, type_size)
Fill = Callable[[Blocks, np.random.Generator, float], None]

_SPREAD = 0.2  # scales are uniform between 1 - this and 1 + this
_SPREAD_RMS = math.sqrt(1 + _SPREAD**2 / 3)


def random_blocks(
    type_name: str, generator: np.random.Generator, num_blocks: int, std: float, mean: float = 0.0
) -> Blocks:
    """(num_blocks, type_size) uint8. `mean` is for F32, F16 and BF16; ValueError elsewhere."""
    weight_format = BY_NAME[type_name]
    floats = _FLOATS.get(type_name)
    if floats is not None:
        values = generator.standard_normal(num_blocks, np.float32) * np.float32(std) + np.float32(mean)
        return floats(values).view(np.uint8).reshape(num_blocks, weight_format.type_size)
    if mean:
        raise ValueError(f"random {type_name} blocks have a mean of 0; asked for {mean}")
    blocks = random_bytes(generator, num_blocks * weight_format.type_size).reshape(num_blocks, -1)
    _FILLS[type_name](blocks, generator, std)
    return blocks


def random_bytes(generator: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """(count,) uint8, eight at a time."""
    words = generator.integers(0, 2**64 - 1, -(-count // 8), np.uint64, endpoint=True)
    return words.view(np.uint8)[:count]


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2")


_FLOATS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.generic]]] = {
    "F32": lambda values: values.astype("<f4"),
    "F16": lambda values: values.astype("<f2"),
    "BF16": _bfloat16,
}


def _scales(generator: np.random.Generator, n: int, rms: float) -> NDArray[np.float32]:
    """(n,) positive scales of this root mean square."""
    return (generator.random(n, np.float32) * (2 * _SPREAD) + (1 - _SPREAD)) * np.float32(rms / _SPREAD_RMS)


def _signs(generator: np.random.Generator, n: int) -> NDArray[np.float32]:
    """(n,) of -1 and 1."""
    return (random_bytes(generator, n) & 1).astype(np.float32) * 2 - 1


def _put_half(blocks: Blocks, start: int, values: NDArray[np.float32]) -> None:
    blocks[:, start : start + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _signed(rms_of_codes: float) -> Fill:
    """Codes with an offset have one more negative value than positive ones: the scale's sign is random."""

    def fill(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
        scales = _scales(generator, len(blocks), std / rms_of_codes)
        _put_half(blocks, 0, scales * _signs(generator, len(blocks)))

    return fill


def _with_minimum(levels: int) -> Fill:
    """Codes from 0 to `levels` - 1, and a minimum that makes their mean 0."""

    def fill(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
        scales = _scales(generator, len(blocks), std / _uniform_rms(levels))
        _put_half(blocks, 0, scales)
        _put_half(blocks, 2, scales * np.float32(-(levels - 1) / 2))

    return fill


def _uniform_rms(levels: int, mean: float = 0.0) -> float:
    """Of equally likely integers in a row, around `mean`."""
    return math.sqrt((levels**2 - 1) / 12 + mean**2)


def _fill_q8_0(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
    """-128, which quantisers never write, becomes 0."""
    codes = blocks[:, 2:].view(np.int8)
    np.multiply(codes, codes != -128, out=codes)
    rms = _uniform_rms(255) * math.sqrt(255 / 256)
    _put_half(blocks, 0, _scales(generator, len(blocks), std / rms))


def _k_with_minimum(levels: int, sub_blocks: int) -> Fill:
    """Q2_K, Q4_K, Q5_K: each sub-block's minimum is its scale; the block's minimum centres the codes."""
    low, high = (8, 16) if sub_blocks == 16 else (32, 64)  # the upper half of what a sub-block's scale may be
    rms = _uniform_rms(levels) * _uniform_rms(high - low, mean=(low + high - 1) / 2)

    def fill(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
        scales = generator.integers(low, high, (len(blocks), sub_blocks), np.uint8)
        d = _scales(generator, len(blocks), std / rms)
        dmin = d * np.float32((levels - 1) / 2)
        if sub_blocks == 16:
            blocks[:, :16] = scales | scales << 4
            _put_half(blocks, 80, d)
            _put_half(blocks, 82, dmin)
        else:
            blocks[:, 4:16] = pack_k_scales(scales, scales)
            _put_half(blocks, 0, d)
            _put_half(blocks, 2, dmin)

    return fill


def _fill_q3_k(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
    """Scales of 6 bits with offset 32: between 16 and 31 in size, of either sign."""
    n = len(blocks)
    size = generator.integers(16, 32, (n, 16), np.uint8).view(np.int8)
    sign = (random_bytes(generator, 16 * n).reshape(n, 16).view(np.int8) & 1) * 2 - 1
    scales = (size * sign.astype(np.int8) + np.int8(32)).view(np.uint8)  # (n, 16), 1 to 63
    blocks[:, 96:104] = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    high = (scales >> 4).reshape(n, 4, 4)
    blocks[:, 104:108] = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    rms = _uniform_rms(8, mean=0.5) * _uniform_rms(16, mean=23.5)
    _put_half(blocks, 108, _scales(generator, n, std / rms))


def _fill_q6_k(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
    n = len(blocks)
    size = generator.integers(32, 64, (n, 16), np.uint8).view(np.int8)
    sign = (random_bytes(generator, 16 * n).reshape(n, 16).view(np.int8) & 1) * 2 - 1
    blocks[:, 192:208] = (size * sign.astype(np.int8)).view(np.uint8)
    rms = _uniform_rms(64, mean=0.5) * _uniform_rms(32, mean=47.5)
    _put_half(blocks, 208, _scales(generator, n, std / rms))


def _fill_mxfp4(blocks: Blocks, generator: np.random.Generator, std: float) -> None:
    """Scales are powers of two: the two nearest ones, in shares that give the right mean square."""
    scale = std / math.sqrt(float(np.mean(DOUBLED_VALUES**2)) / 4)
    exponent = math.floor(math.log2(scale))
    share = (scale**2 / 4.0**exponent - 1) / 3  # of the larger one
    larger = generator.random(len(blocks), np.float32) < share
    blocks[:, 0] = np.clip(127 + exponent + larger.astype(np.int16), 0, 254)


_FILLS: dict[str, Fill] = {
    "Q4_0": _signed(_uniform_rms(16, mean=0.5)),
    "Q4_1": _with_minimum(16),
    "Q5_0": _signed(_uniform_rms(32, mean=0.5)),
    "Q5_1": _with_minimum(32),
    "Q8_0": _fill_q8_0,
    "Q2_K": _k_with_minimum(4, sub_blocks=16),
    "Q3_K": _fill_q3_k,
    "Q4_K": _k_with_minimum(16, sub_blocks=8),
    "Q5_K": _k_with_minimum(32, sub_blocks=8),
    "Q6_K": _fill_q6_k,
    "IQ4_NL": _signed(math.sqrt(float(np.mean(VALUES**2)))),
    "MXFP4": _fill_mxfp4,
}
