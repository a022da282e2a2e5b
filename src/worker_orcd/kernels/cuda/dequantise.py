"""
From packed words to operands: codes of weights as float16 or bfloat16, two columns a register.

Device code (Triton). Each function has the instructions we want, as inline assembly, and behind PORTABLE
the same in plain Triton, for the interpreter; the two give the same bits. The trick throughout: an integer q
below 1024 or'ed into the mantissa of float16 1024.0 (0x6400) is 1024 + q exactly, so a mask and a subtraction
make a float; a code b bits up gives 1024 + 2**b * q, and one fused multiply-add makes it q.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def _half(value: float) -> str:
    """A float16 constant twice in a register."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return f"0x{bits:04x}{bits:04x}"


def _mask(bits: int) -> str:
    return f"0x{bits:04x}{bits:04x}"


def _codes(low_bits: int, high_bits: int, zero: int) -> str:
    """Assembly with an output a plane, `code - zero`; inputs are words and, if any, high words and shift."""
    planes = 16 // low_bits
    outputs = [f"${i}" for i in range(planes)]
    word, high, shift = (f"${planes + i}" for i in range(3))
    text = ["{ .reg .b32 y, t, u, s, c, m, a; mov.b32 c, 0x64006400;"]
    near = 10 // low_bits if not high_bits else 8 // low_bits  # planes that are reached without shifting
    text.append(f"shr.u32 y, {word}, {near * low_bits};")
    if high_bits:
        text.append(f"and.b32 s, {shift}, 31; shr.u32 t, {high}, s; prmt.b32 u, t, t, 0x2301;")
    for plane, out in enumerate(outputs):
        source, at = (word, plane * low_bits) if plane < near else ("y", (plane - near) * low_bits)
        text.append(f"lop3.b32 {out}, {source}, {_mask(((1 << low_bits) - 1) << at)}, c, 0xEA;")
        if high_bits:
            extra = _mask(((1 << high_bits) - 1) << (at + low_bits))
            text.append(f"lop3.b32 {out}, {'t' if plane < near else 'u'}, {extra}, {out}, 0xEA;")
        if at == 0:
            text.append(f"mov.b32 a, {_half(1024 + zero)}; sub.f16x2 {out}, {out}, a;")
        else:
            up = 1 << at
            text.append(f"mov.b32 m, {_half(1 / up)}; mov.b32 a, {_half(-(1024 / up + zero))};")
            text.append(f"fma.rn.f16x2 {out}, {out}, m, a;")
    return "\n".join([*text, "}"])


def _constraints(outputs: int, inputs: int) -> tl.constexpr:
    return tl.constexpr(",".join(["=&r"] * outputs + ["r"] * inputs))


_OUT4_IN1, _OUT4_IN3 = _constraints(4, 1), _constraints(4, 3)
_OUT8_IN1, _OUT8_IN3 = _constraints(8, 1), _constraints(8, 3)
_CODES_4_0, _CODES_4_8 = tl.constexpr(_codes(4, 0, 0)), tl.constexpr(_codes(4, 0, 8))
_CODES_5_0, _CODES_5_16 = tl.constexpr(_codes(4, 1, 0)), tl.constexpr(_codes(4, 1, 16))
_CODES_6_32 = tl.constexpr(_codes(4, 2, 32))
_CODES_2_0, _CODES_3_4 = tl.constexpr(_codes(2, 0, 0)), tl.constexpr(_codes(2, 1, 4))

# A byte becomes the mantissa of 1024 + byte; bytes are 128 too large.
_BYTES = tl.constexpr("""{ .reg .b32 c, m; mov.b32 c, 0x64646464; mov.b32 m, 0x64806480;
prmt.b32 $0, $2, c, 0x4240; prmt.b32 $1, $2, c, 0x4341; sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }""")

# Sixteen bytes in four registers are looked up by the lower three bits of a nibble in each half, and the
# nibble's upper bit chooses between the two.
_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # as quant.iq4_nl.VALUES


def _table_registers() -> list[str]:
    table = bytes(value + 128 for value in _TABLE)
    return [f"0x{int.from_bytes(table[i : i + 4], 'little'):08x}" for i in range(0, 16, 4)]


def _table_codes() -> str:
    text = [
        "{ .reg .b32 q, s, x, y, v, w, c, m, t0, t1, t2, t3; mov.b32 c, 0x64006400; mov.b32 m, 0x64806480;"
    ]
    text += [f"mov.b32 t{i}, {value};" for i, value in enumerate(_table_registers())]
    text.append(
        "and.b32 q, $4, 0x77777777; shr.u32 s, $4, 1; and.b32 s, s, 0x44444444; or.b32 s, s, 0x32103210;"
    )
    for result in ("v", "w"):  # the bytes of the even column's planes, then of the odd one's
        text.append("prmt.b32 x, t0, t1, q; prmt.b32 y, t2, t3, q;")
        text.append(f"prmt.b32 {result}, x, y, s; shr.u32 q, q, 16; shr.u32 s, s, 16;")
    for plane in range(4):
        text.append(f"prmt.b32 x, v, w, 0x{4 + plane}{4 + plane}{plane}{plane};")
        text.append("lop3.b32 $" + f"{plane}, x, 0x00ff00ff, c, 0xEA; sub.f16x2 ${plane}, ${plane}, m;")
    return "\n".join([*text, "}"])


_TABLE_CODES = tl.constexpr(_table_codes())
_TABLE_LOW = tl.constexpr(int.from_bytes(bytes(v + 128 for v in _TABLE[:8]), "little", signed=True))
_TABLE_HIGH = tl.constexpr(int.from_bytes(bytes(v + 128 for v in _TABLE[8:]), "little", signed=True))

# The bits of a 4-bit float, moved to where bfloat16 has them, are 2**-126 times too small.
_FLOATS = tl.constexpr("""{ .reg .b32 b, d, z; mov.b32 z, 0x80008000;
and.b32 $0, $4, 0x81c081c0; fma.rn.bf16x2 $0, $0, $5, z;
shl.b32 b, $4, 3; and.b32 $1, b, 0x81c081c0; fma.rn.bf16x2 $1, $1, $6, z;
shl.b32 b, $4, 6; and.b32 $2, b, 0x81c081c0; fma.rn.bf16x2 $2, $2, $7, z;
shl.b32 b, $4, 1; and.b32 d, b, 0x80008000; shr.u32 b, $4, 3; lop3.b32 d, b, 0x01800180, d, 0xEA;
shr.u32 b, $4, 7; lop3.b32 d, b, 0x00400040, d, 0xEA; fma.rn.bf16x2 $3, d, $8, z; }""")
_OUT4_IN5 = _constraints(4, 5)
_OUT2_IN1 = _constraints(2, 1)
_F16x4 = tl.constexpr((tl.float16,) * 4)
_F16x8 = tl.constexpr((tl.float16,) * 8)
_F16x2 = tl.constexpr((tl.float16,) * 2)
_BF16x4 = tl.constexpr((tl.bfloat16,) * 4)


@triton.jit
def plane(words, high, shift, P: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr):
    """Portable: one plane of `code - ZERO` as float16."""
    code = (words.to(tl.int32) >> (P * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        extra = high.to(tl.int32) >> shift.to(tl.int32)
        code |= ((extra >> ((P + 1) * LOW % 16)) & ((1 << HIGH) - 1)) << LOW
    return (code - ZERO).to(tl.float16)


@triton.jit
def four_planes(words, high, shift, HIGH: tl.constexpr, ZERO: tl.constexpr, PORTABLE: tl.constexpr):
    """Words of nibbles, [rows, width] uint16, to four planes of `code - ZERO`, float16."""
    if PORTABLE:
        return (
            plane(words, high, shift, 0, 4, HIGH, ZERO),
            plane(words, high, shift, 1, 4, HIGH, ZERO),
            plane(words, high, shift, 2, 4, HIGH, ZERO),
            plane(words, high, shift, 3, 4, HIGH, ZERO),
        )
    elif HIGH == 0:
        ASM: tl.constexpr = _CODES_4_8 if ZERO == 8 else _CODES_4_0
        return tl.inline_asm_elementwise(ASM, _OUT4_IN1, [words], dtype=_F16x4, is_pure=True, pack=2)
    else:
        ASM: tl.constexpr = _CODES_6_32 if HIGH == 2 else (_CODES_5_16 if ZERO == 16 else _CODES_5_0)
        return tl.inline_asm_elementwise(
            ASM, _OUT4_IN3, [words, high, shift], dtype=_F16x4, is_pure=True, pack=2
        )


@triton.jit
def eight_planes(words, high, shift, HIGH: tl.constexpr, ZERO: tl.constexpr, PORTABLE: tl.constexpr):
    """Words of eight 2-bit codes to eight planes of `code - ZERO`, float16."""
    if PORTABLE:
        return (
            plane(words, high, shift, 0, 2, HIGH, ZERO),
            plane(words, high, shift, 1, 2, HIGH, ZERO),
            plane(words, high, shift, 2, 2, HIGH, ZERO),
            plane(words, high, shift, 3, 2, HIGH, ZERO),
            plane(words, high, shift, 4, 2, HIGH, ZERO),
            plane(words, high, shift, 5, 2, HIGH, ZERO),
            plane(words, high, shift, 6, 2, HIGH, ZERO),
            plane(words, high, shift, 7, 2, HIGH, ZERO),
        )
    elif HIGH == 0:
        return tl.inline_asm_elementwise(_CODES_2_0, _OUT8_IN1, [words], dtype=_F16x8, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(
            _CODES_3_4, _OUT8_IN3, [words, high, shift], dtype=_F16x8, is_pure=True, pack=2
        )


@triton.jit
def two_planes(words, PORTABLE: tl.constexpr):
    """Words of two bytes to two planes of `byte - 128`, float16."""
    if PORTABLE:
        return plane(words, words, words, 0, 8, 0, 128), plane(words, words, words, 1, 8, 0, 128)
    else:
        return tl.inline_asm_elementwise(_BYTES, _OUT2_IN1, [words], dtype=_F16x2, is_pure=True, pack=2)


@triton.jit
def looked_up(words, P: tl.constexpr):
    """Portable: one plane of IQ4_NL's values."""
    index = (words.to(tl.int64) >> (4 * P)) & 15
    table = tl.where(
        index < 8, tl.full(index.shape, _TABLE_LOW, tl.int64), tl.full(index.shape, _TABLE_HIGH, tl.int64)
    )
    return (((table >> ((index & 7) * 8)) & 255) - 128).to(tl.float16)


@triton.jit
def table_planes(words, PORTABLE: tl.constexpr):
    """Words of nibbles to four planes of IQ4_NL's values, float16."""
    if PORTABLE:
        return looked_up(words, 0), looked_up(words, 1), looked_up(words, 2), looked_up(words, 3)
    else:
        return tl.inline_asm_elementwise(_TABLE_CODES, _OUT4_IN1, [words], dtype=_F16x4, is_pure=True, pack=2)


@triton.jit
def small_float(sign, exponent, mantissa):
    """Portable: E2M1 to float32."""
    m = mantissa.to(tl.float32) * 0.5
    normal = (1.0 + m) * tl.where(exponent == 1, 1.0, tl.where(exponent == 2, 2.0, 4.0))
    value = tl.where(exponent == 0, m, normal)
    return tl.where(sign == 1, -value, value)


@triton.jit
def float_planes(words, s0, s1, s2, s3, PORTABLE: tl.constexpr):
    """MXFP4's words times a scale a plane, exactly: bfloat16, or float32 if PORTABLE.

    A scale is `power`'s, of the words' shape.
    """
    if PORTABLE:
        w = words.to(tl.int32)
        return (
            small_float((w >> 15) & 1, (w >> 7) & 3, (w >> 6) & 1) * s0,
            small_float((w >> 12) & 1, (w >> 4) & 3, (w >> 3) & 1) * s1,
            small_float((w >> 9) & 1, (w >> 1) & 3, w & 1) * s2,
            small_float((w >> 14) & 1, (w >> 10) & 3, (w >> 13) & 1) * s3,
        )
    else:
        return tl.inline_asm_elementwise(
            _FLOATS, _OUT4_IN5, [words, s0, s1, s2, s3], dtype=_BF16x4, is_pure=True, pack=2
        )


@triton.jit
def power(word, SHIFT: tl.constexpr, PORTABLE: tl.constexpr):
    """The exponent byte at SHIFT as 2**(e - 1) in bfloat16 (see _FLOATS); if PORTABLE, 2**(e - 127).

    Above 2**1 it stays there: `MAX_EXPONENT` of `weights` is refused at load.
    """
    e = tl.minimum((word >> SHIFT) & 0xFF, 128)
    if PORTABLE:
        return tl.exp2(e.to(tl.float32) - 127.0)
    else:
        return ((e + 126) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
