"""
Eight-bit floats (e4m3fn: four bits of exponent, three of mantissa, no infinity) from and to wider ones.

Device code (Triton). They lie in memory as bytes. GPUs older than compute capability 8.9 have no instruction
for them: there they are taken apart by their bits, with the same result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.cache_type import LARGEST_FP8
from worker_orcd.kernels.cuda.elementwise import rounded

_LARGEST = tl.constexpr(LARGEST_FP8)


@triton.jit
def encoded(value):
    """float32 to bytes: rounded to nearest, ties to even; beyond the range its largest. NaN stays."""
    bits = value.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(value), _LARGEST)
    whole = size.to(tl.uint32, bitcast=True)
    normal = (whole + 0x7FFFF + (whole >> 20 & 1) >> 20) - ((127 - 7) << 3)
    # Below the least normal one, 2**-6, they are multiples of 2**-9: those float32 has from 2**14 on.
    low = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, low, normal)
    code = tl.where(value == value, code, 0x7F)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def stored(value, pointer, scale):
    """float32 to what a cache's `pointer` points to; `scale` is for bytes."""
    if pointer.dtype.element_ty == tl.uint8:
        return encoded(value * scale)
    else:
        return rounded(value, pointer)


@triton.jit
def decoded(value, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Bytes to float16, exactly; what is none stays. NATIVE: by the instruction. NaN need not stay one."""
    if value.dtype != tl.uint8:
        return value
    elif NATIVE:
        return value.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        tl.static_assert(dtype == tl.float16)
        code = value.to(tl.uint16)
        # Exponents of float16 are 8 more: as its bits they are 256 times too small, the lowest ones too.
        half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True)
        return half * 256.0
