"""
One step of a matrix product for each weight format: load packed weights, turn them into operands, multiply.

Device code (Triton). A step's columns are multiplied plane by plane, in ascending order of columns, whatever
the step and the tile: that order is part of the contract (see `contract`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.dequantise import (
    eight_planes,
    float_planes,
    four_planes,
    power,
    table_planes,
    two_planes,
)

_OUT1_IN2 = tl.constexpr("=r,r,r")
_OUT2_IN2 = tl.constexpr("=&r,=&r,r,r")


@triton.jit
def low_half(word):
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def high_half(word):
    return ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def half(words, AT: tl.constexpr):
    """The AT-th float16 of a row's header words. (rows,)"""
    if AT % 2 == 0:
        return low_half(words[AT // 2])
    else:
        return high_half(words[AT // 2])


@triton.jit
def two(a, b, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows] twice to [rows, width]: the first half of the columns has `a`."""
    both = tl.join(a, b)
    return tl.reshape(tl.broadcast_to(both[:, :, None], (ROWS, 2, WIDTH // 2)), (ROWS, WIDTH))


@triton.jit
def four(a, b, c, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    all_four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, 4))
    return tl.reshape(tl.broadcast_to(all_four[:, :, None], (ROWS, 4, WIDTH // 4)), (ROWS, WIDTH))


@triton.jit
def block_scale(words, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The float16 scales of plane P, one a block of 32 columns. [rows, width]"""
    if WIDTH == 64:
        return two(half(words, 2 * P), half(words, 2 * P + 1), ROWS, WIDTH)
    else:
        return tl.broadcast_to(half(words, P * WIDTH // 32)[:, None], (ROWS, WIDTH))


@triton.jit
def packed_product(bits, zero, factor, PORTABLE: tl.constexpr):
    """Two integers below 1024, 16 bits apart, less `zero`, times the halves of `factor`: float16 bits."""
    if PORTABLE:
        low = ((bits & 0x3FF).to(tl.float32) - zero).to(tl.float16) * low_half(factor)
        high = (((bits >> 16) & 0x3FF).to(tl.float32) - zero).to(tl.float16) * high_half(factor)
        low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        ASM: tl.constexpr = (
            "{ .reg .b32 t, c; mov.b32 c, 0x64206420; sub.f16x2 t, $1, c; mul.f16x2 $0, t, $2; }"
        )
        ASM_0: tl.constexpr = (
            "{ .reg .b32 t, c; mov.b32 c, 0x64006400; sub.f16x2 t, $1, c; mul.f16x2 $0, t, $2; }"
        )
        ASM_128: tl.constexpr = (
            "{ .reg .b32 t, c; mov.b32 c, 0x64806480; sub.f16x2 t, $1, c; mul.f16x2 $0, t, $2; }"
        )
        TEXT: tl.constexpr = ASM_0 if zero == 0 else (ASM_128 if zero == 128 else ASM)
        return tl.inline_asm_elementwise(
            TEXT, _OUT1_IN2, [bits | 0x64006400, factor], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def six_bits(nibbles, upper, AT: tl.constexpr):
    """The AT-th pair of 6-bit integers: low nibbles in `nibbles`, the upper two bits in `upper`."""
    if 2 * AT >= 4:
        top = upper >> (2 * AT - 4)
    else:
        top = upper << (4 - 2 * AT)
    return ((nibbles >> (4 * (AT % 4))) & 0x000F000F) | (top & 0x00300030)


@triton.jit
def scaled(q, pair0, pair1, BOTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
           PORTABLE: tl.constexpr):  # fmt: skip
    """Two sub-blocks, or one, as q * scale - minimum; a pair is (scale, minimum), low half first."""
    if not BOTH:
        s = tl.broadcast_to(low_half(pair0)[:, None], (ROWS, WIDTH))
        m = tl.broadcast_to(high_half(pair0)[:, None], (ROWS, WIDTH))
    else:
        s = two(low_half(pair0), low_half(pair1), ROWS, WIDTH)
        m = two(high_half(pair0), high_half(pair1), ROWS, WIDTH)
    if PORTABLE:
        return (q.to(tl.float32) * s.to(tl.float32) - m.to(tl.float32)).to(tl.float16)
    else:
        return tl.math.fma(q, s, -m)


@triton.jit
def with_minimum(q, word, ROWS: tl.constexpr, WIDTH: tl.constexpr, PORTABLE: tl.constexpr):
    """As q * d + m, (d, m) in a word."""
    d = tl.broadcast_to(low_half(word)[:, None], (ROWS, WIDTH))
    m = tl.broadcast_to(high_half(word)[:, None], (ROWS, WIDTH))
    if PORTABLE:
        return (q.to(tl.float32) * d.to(tl.float32) + m.to(tl.float32)).to(tl.float16)
    else:
        return tl.math.fma(q, d, m)


@triton.jit
def k_scaled(q, words, AT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PORTABLE: tl.constexpr):
    """Q4_K and Q5_K: sub-blocks AT and AT + 1; in half a block, plane AT / 2 is one sub-block."""
    if WIDTH == 32:
        p = packed_product(six_bits(words[0], words[2], AT // 2), 0, words[3], PORTABLE)
        return scaled(q, p, p, False, ROWS, WIDTH, PORTABLE)
    a = words[AT // 4]
    p0 = packed_product(six_bits(a, words[2], AT), 0, words[3], PORTABLE)
    p1 = packed_product(six_bits(a, words[2], AT + 1), 0, words[3], PORTABLE)
    return scaled(q, p0, p1, True, ROWS, WIDTH, PORTABLE)


@triton.jit
def q2_scaled(q, words, AT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PORTABLE: tl.constexpr):
    """Q2_K: sub-blocks AT and AT + 1."""
    a = words[AT // 4]
    p0 = packed_product((a >> (4 * (AT % 4))) & 0x000F000F, 0, words[4], PORTABLE)
    p1 = packed_product((a >> (4 * (AT % 4) + 4)) & 0x000F000F, 0, words[4], PORTABLE)
    return scaled(q, p0, p1, True, ROWS, WIDTH, PORTABLE)


@triton.jit
def twice(d):
    """A float16 in the low half of a word, in both halves."""
    return (d & 0xFFFF) * 0x10001


@triton.jit
def q3_scaled(q, words, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PORTABLE: tl.constexpr):
    """Q3_K: the two sub-blocks of plane P."""
    s = packed_product(six_bits(words[P // 4], words[2], P), 32, twice(words[3]), PORTABLE)
    return q * two(low_half(s), high_half(s), ROWS, WIDTH)


@triton.jit
def q6_scaled(q, words, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PORTABLE: tl.constexpr):
    """Q6_K: the four sub-blocks of plane P, a byte each."""
    d = twice(words[4])
    if WIDTH == 32:
        even = packed_product(words[P // 2] & 0x00FF00FF, 128, d, PORTABLE)
        odd = packed_product((words[P // 2] >> 8) & 0x00FF00FF, 128, d, PORTABLE)
        if P % 2 == 0:
            return q * two(low_half(even), low_half(odd), ROWS, WIDTH)
        else:
            return q * two(high_half(even), high_half(odd), ROWS, WIDTH)
    even = packed_product(words[P] & 0x00FF00FF, 128, d, PORTABLE)
    odd = packed_product((words[P] >> 8) & 0x00FF00FF, 128, d, PORTABLE)
    return q * four(low_half(even), low_half(odd), high_half(even), high_half(odd), ROWS, WIDTH)


@triton.jit
def load_weights(w, h, s, rows, shift, part, PARTS: tl.constexpr, HEADER: tl.constexpr, HIGH: tl.constexpr):
    """A step's words, high words, and header: five words a row, as many as there are.

    `rows` is each row's place in its tile; two of them share the last header word if HEADER is not a
    multiple of four bytes: `shift` is how far each row's half is up. If a header is for two steps (PARTS),
    `part` says which of them this is: then the first words are that step's own.
    """
    words = tl.load(w)
    high = words
    if HIGH:
        high = tl.load(h)
    own = 0
    if PARTS == 2:
        own = part * (128 if HEADER == 18 else 64)  # two words of four, or one of two
    s0 = rows
    if HEADER >= 4:
        s0 = tl.load(s + own)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    if HEADER >= 8:
        s1 = tl.load(s + own + 64)
    if HEADER >= 12:
        s2 = tl.load(s + 128)
        if PARTS == 2:
            s2 = s2 >> (8 * part)
    if HEADER >= 16:
        s3 = tl.load(s + 192)
    if HEADER >= 20:
        s4 = tl.load(s + 256)
    if HEADER % 4:
        last = tl.load(s + HEADER // 4 * 64 - rows + rows // 2) >> shift
        if HEADER == 2:
            s0 = last
        elif HEADER == 14:
            s3 = last
        else:
            tl.static_assert(HEADER == 18)
            s4 = last
    return words, high, s0, s1, s2, s3, s4


@triton.jit
def load_plane(x, mask, left, AT: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Columns AT … AT + WIDTH of the activations. `left`: columns to the end of the row, if TAIL."""
    if TAIL:
        mask = mask & (tl.arange(0, WIDTH)[:, None] < left - AT)
    return tl.load(x + AT, mask=mask, other=0.0)


@triton.jit
def load_x(x, mask, left, PLANES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """A step's columns of the activations, plane by plane."""
    planes = ()
    for p in tl.static_range(PLANES):
        planes = planes + (load_plane(x, mask, left, p * WIDTH, WIDTH, TAIL),)
    return planes


@triton.jit
def multiply(acc, weights, shift, x, FORMAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
             PORTABLE: tl.constexpr):  # fmt: skip
    """The sums, [rows, tokens], and a step of weights times activations. `x`: from `load_x`."""
    words, high, s0, s1, s2, s3, s4 = weights
    s = (s0, s1, s2, s3, s4)
    if FORMAT == "F16" or FORMAT == "BF16" or FORMAT == "F32":
        if FORMAT == "F32":
            if PORTABLE:
                acc = tl.dot(words, x[0].to(tl.float32), acc)
            else:
                upper = words.to(tl.bfloat16)
                acc = tl.dot(upper, x[0], acc)
                acc = tl.dot((words - upper.to(tl.float32)).to(tl.bfloat16), x[0], acc)
        elif FORMAT == "BF16" and PORTABLE:
            acc = tl.dot(words.to(tl.float32), x[0].to(tl.float32), acc)
        else:
            acc = tl.dot(words, x[0], acc)
    elif FORMAT == "Q8_0":
        a, b = two_planes(words, PORTABLE)
        acc = tl.dot(a * block_scale(s, 0, ROWS, WIDTH), x[0], acc)
        acc = tl.dot(b * block_scale(s, 1, ROWS, WIDTH), x[1], acc)
    elif FORMAT == "Q2_K" or FORMAT == "Q3_K":
        acc = multiply_eight(acc, words, high, s, shift, x, FORMAT, ROWS, WIDTH, PORTABLE)
    else:
        a, b, c, d = four_operands(words, high, s, shift, FORMAT, ROWS, WIDTH, PORTABLE)
        if FORMAT == "MXFP4" and PORTABLE:
            acc = tl.dot(a, x[0].to(tl.float32), acc)
            acc = tl.dot(b, x[1].to(tl.float32), acc)
            acc = tl.dot(c, x[2].to(tl.float32), acc)
            acc = tl.dot(d, x[3].to(tl.float32), acc)
        else:
            acc = tl.dot(a, x[0], acc)
            acc = tl.dot(b, x[1], acc)
            acc = tl.dot(c, x[2], acc)
            acc = tl.dot(d, x[3], acc)
    return acc


@triton.jit
def four_operands(words, high, s, shift, FORMAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                  PORTABLE: tl.constexpr):  # fmt: skip
    """The operands of the formats that have four planes."""
    if FORMAT == "MXFP4":
        if WIDTH == 16:
            e0 = tl.broadcast_to(power(s[0], 0, PORTABLE)[:, None], (ROWS, WIDTH))
            e2 = tl.broadcast_to(power(s[0], 8, PORTABLE)[:, None], (ROWS, WIDTH))
            return float_planes(words, e0, e0, e2, e2, PORTABLE)
        else:
            e0 = tl.broadcast_to(power(s[0], 0, PORTABLE)[:, None], (ROWS, WIDTH))
            e1 = tl.broadcast_to(power(s[0], 8, PORTABLE)[:, None], (ROWS, WIDTH))
            e2 = tl.broadcast_to(power(s[0], 16, PORTABLE)[:, None], (ROWS, WIDTH))
            e3 = tl.broadcast_to(power(s[0], 24, PORTABLE)[:, None], (ROWS, WIDTH))
            return float_planes(words, e0, e1, e2, e3, PORTABLE)
    elif FORMAT == "Q4_K" or FORMAT == "Q5_K":
        a, b, c, d = four_planes(words, high, shift, 1 if FORMAT == "Q5_K" else 0, 0, PORTABLE)
        return (
            k_scaled(a, s, 0, ROWS, WIDTH, PORTABLE),
            k_scaled(b, s, 2, ROWS, WIDTH, PORTABLE),
            k_scaled(c, s, 4, ROWS, WIDTH, PORTABLE),
            k_scaled(d, s, 6, ROWS, WIDTH, PORTABLE),
        )
    elif FORMAT == "Q6_K":
        a, b, c, d = four_planes(words, high, shift, 2, 32, PORTABLE)
        return (
            q6_scaled(a, s, 0, ROWS, WIDTH, PORTABLE),
            q6_scaled(b, s, 1, ROWS, WIDTH, PORTABLE),
            q6_scaled(c, s, 2, ROWS, WIDTH, PORTABLE),
            q6_scaled(d, s, 3, ROWS, WIDTH, PORTABLE),
        )
    elif FORMAT == "Q4_1" or FORMAT == "Q5_1":
        a, b, c, d = four_planes(words, high, shift, 1 if FORMAT == "Q5_1" else 0, 0, PORTABLE)
        return (
            with_minimum(a, s[0], ROWS, WIDTH, PORTABLE),
            with_minimum(b, s[WIDTH // 32], ROWS, WIDTH, PORTABLE),
            with_minimum(c, s[2 * WIDTH // 32], ROWS, WIDTH, PORTABLE),
            with_minimum(d, s[3 * WIDTH // 32], ROWS, WIDTH, PORTABLE),
        )
    else:
        if FORMAT == "Q4_0":
            a, b, c, d = four_planes(words, high, shift, 0, 8, PORTABLE)
        elif FORMAT == "Q5_0":
            a, b, c, d = four_planes(words, high, shift, 1, 16, PORTABLE)
        else:
            tl.static_assert(FORMAT == "IQ4_NL")
            a, b, c, d = table_planes(words, PORTABLE)
        return (
            a * block_scale(s, 0, ROWS, WIDTH),
            b * block_scale(s, 1, ROWS, WIDTH),
            c * block_scale(s, 2, ROWS, WIDTH),
            d * block_scale(s, 3, ROWS, WIDTH),
        )


@triton.jit
def multiply_eight(acc, words, high, s, shift, x, FORMAT: tl.constexpr, ROWS: tl.constexpr,
                   WIDTH: tl.constexpr, PORTABLE: tl.constexpr):  # fmt: skip
    """`multiply` for the formats that have eight planes."""
    if FORMAT == "Q2_K":
        planes = eight_planes(words, high, shift, 0, 0, PORTABLE)
    else:
        planes = eight_planes(words, high, shift, 1, 4, PORTABLE)
    for p in tl.static_range(8):
        if FORMAT == "Q2_K":
            acc = tl.dot(q2_scaled(planes[p], s, 2 * p, ROWS, WIDTH, PORTABLE), x[p], acc)
        else:
            acc = tl.dot(q3_scaled(planes[p], s, p, ROWS, WIDTH, PORTABLE), x[p], acc)
    return acc
