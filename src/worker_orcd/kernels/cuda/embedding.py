"""
Rows of a packed table as float32, in every weight format, exactly as `quant` reads them.

Device code (Triton). Programs: (blocks of columns, tokens). Each weight is put together from its place in the
packed layout (`quant.gpu_layout`) on its own: a row is little work, so this is written to be plain. Products
of a code and a scale have fewer than 24 bits, so only the last operation rounds, as in `quant`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.dequantise import looked_up
from worker_orcd.kernels.cuda.elementwise import rounded
from worker_orcd.kernels.cuda.overlap import wait


@triton.jit
def header(s, row, at, HEADER: tl.constexpr):
    """16 bits of a row's header, the at-th of them. `s`: of the tile and group, uint16."""
    WHOLE: tl.constexpr = HEADER // 4 * 2  # those in words of the row's own; two rows share the last word
    place = at // 2 * 128 + 2 * row + at % 2
    if HEADER % 4:
        place = tl.where(at < WHOLE, place, WHOLE * 64 + row)
    return tl.load(s + place).to(tl.int32)


@triton.jit
def half(s, row, at, HEADER: tl.constexpr):
    """A float16 of the header, as float32."""
    return header(s, row, at, HEADER).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def small_float(word, plane):
    """MXFP4: the plane's E2M1 number, twice. See `word_bits` in `quant.mxfp4`."""
    last = plane == 3
    sign = (word >> tl.where(last, 14, 15 - 3 * plane)) & 1
    exponent = (word >> tl.where(last, 10, 7 - 3 * plane)) & 3
    mantissa = (word >> tl.where(last, 13, 6 - 3 * plane)) & 1
    value = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0)).to(tl.float32)
    return tl.where(sign == 1, -value, value)


@triton.jit
def half_power(e):
    """2**(e - 128), of which the two smallest are subnormal."""
    bits = tl.where(e >= 2, (e - 1) << 23, (1 << 21) << e)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def six_bits(s, row, sub, which, HEADER: tl.constexpr):
    """Q4_K and Q5_K: the sub-block's scale (`which` 0) or minimum (1)."""
    low = (header(s, row, sub // 4 * 2 + which, HEADER) >> (sub % 4 * 4)) & 15
    return (low | (((header(s, row, 4 + which, HEADER) >> (sub * 2)) & 3) << 4)).to(tl.float32)


@triton.jit
def four_bits(s, row, sub, which, HEADER: tl.constexpr):
    """Q2_K: likewise."""
    return ((header(s, row, sub // 4 * 2 + which, HEADER) >> (sub % 4 * 4)) & 15).to(tl.float32)


@triton.jit
def k_value(code, s, row, sub, FORMAT: tl.constexpr, HEADER: tl.constexpr):
    """Of the K formats: `sub` is the weight's sub-block."""
    q = code.to(tl.float32)
    if FORMAT == "Q6_K":
        scale = ((header(s, row, sub // 2, HEADER) >> (sub % 2 * 8)) & 255) - 128
        return half(s, row, 8, HEADER) * scale.to(tl.float32) * (q - 32.0)
    elif FORMAT == "Q3_K":
        low = (header(s, row, sub // 8 * 2 + sub % 2, HEADER) >> (sub % 8 // 2 * 4)) & 15
        top = (header(s, row, 4 + sub % 2, HEADER) >> (sub // 2 * 2)) & 3
        scale = (low | (top << 4)) - 32
        return half(s, row, 6, HEADER) * scale.to(tl.float32) * (q - 4.0)
    elif FORMAT == "Q2_K":
        scale = half(s, row, 8, HEADER) * four_bits(s, row, sub, 0, HEADER)
        return scale * q - half(s, row, 9, HEADER) * four_bits(s, row, sub, 1, HEADER)
    else:
        tl.static_assert(FORMAT == "Q4_K" or FORMAT == "Q5_K")
        scale = half(s, row, 6, HEADER) * six_bits(s, row, sub, 0, HEADER)
        return scale * q - half(s, row, 7, HEADER) * six_bits(s, row, sub, 1, HEADER)


@triton.jit
def block_value(code, s, row, block, FORMAT: tl.constexpr, HEADER: tl.constexpr):
    """Of the formats with blocks of 32: `block` is the weight's block in its step."""
    if FORMAT == "Q4_1" or FORMAT == "Q5_1":
        d = half(s, row, 2 * block, HEADER)
        return d * code.to(tl.float32) + half(s, row, 2 * block + 1, HEADER)
    elif FORMAT == "MXFP4":
        return code * half_power((header(s, row, block // 2, HEADER) >> (block % 2 * 8)) & 255)
    elif FORMAT == "IQ4_NL":
        return half(s, row, block, HEADER) * code.to(tl.float32)
    else:
        ZERO: tl.constexpr = 128 if FORMAT == "Q8_0" else (16 if FORMAT == "Q5_0" else 8)
        tl.static_assert(FORMAT == "Q8_0" or FORMAT == "Q5_0" or FORMAT == "Q4_0")
        return half(s, row, block, HEADER) * (code - ZERO).to(tl.float32)


@triton.jit
def known(index, drawn):
    """The token that `index` means: -1 - i is the one that draw i of the step before gave."""
    found = tl.load(drawn + (-1 - index), mask=index < 0, other=0, cache_modifier=".cg")
    return tl.where(index < 0, found, index)


@triton.jit
def embed(indices, drawn, w, h, s, out, factor, out_stride, K: tl.constexpr, FORMAT: tl.constexpr,
          BLOCK: tl.constexpr, STEP: tl.constexpr, PLANES: tl.constexpr, HIGH: tl.constexpr,
          SHARE: tl.constexpr, HEADER: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
          OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`out` (tokens, K) = rows `indices` of a packed table, times factor. One that is -1 - i means drawn[i].

    See `linear` for the table's parameters; GROUP: the columns that a row's header words are for.
    """
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    WIDTH: tl.constexpr = STEP // PLANES
    LOW: tl.constexpr = 16 // PLANES
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1).to(tl.int64)
    mask = column < K
    index = known(tl.load(indices + token, cache_modifier=".cg"), drawn)
    tile = (index // 64).to(tl.int64)
    row = index % 64
    inside = tl.minimum(column, K - 1)
    step = inside // STEP
    plane = inside % STEP // WIDTH
    word = inside % WIDTH
    bits = tl.load(w + tile * (STEPS * 64 * WIDTH) + (step * 64 + row) * WIDTH + word)
    if PLANES == 1:
        value = bits.to(tl.float32)
    else:
        bits = bits.to(tl.int32)
        if FORMAT == "MXFP4":
            code = small_float(bits, plane)
        else:
            code = (bits >> (plane * LOW)) & ((1 << LOW) - 1)
        if FORMAT == "IQ4_NL":
            code = looked_up(code, 0)
        if HIGH:
            shared = tile * (STEPS * (64 // SHARE) * WIDTH) + (step * (64 // SHARE) + row // SHARE) * WIDTH
            upper = tl.load(h + shared + word).to(tl.int32)
            upper = upper >> (row % SHARE * HIGH + (plane + 1) * LOW % 16)
            code |= (upper & ((1 << HIGH) - 1)) << LOW
        halves = s.to(tl.pointer_type(tl.uint16))
        group = halves + (tile * GROUPS + inside // GROUP) * (32 * HEADER)
        if BLOCK == 256:
            SUB: tl.constexpr = 32 if FORMAT == "Q4_K" or FORMAT == "Q5_K" else 16
            value = k_value(code, group, row, inside % 256 // SUB, FORMAT, HEADER)
        else:
            value = block_value(code, group, row, inside % GROUP // BLOCK, FORMAT, HEADER)
    wait(OVERLAP)
    tl.store(out + token * out_stride + column, rounded(value * factor, out), mask=mask)
