"""
Products of many tokens, experiments: weights as float16 in a scratch matrix, and steps read piece by piece.

Device code (Triton), see `gpu_wide.py`. Operands are made by what `linear` makes them with, and columns are
multiplied in the same order, so both have its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.dequantise import _half, plane, two_planes
from worker_orcd.kernels.cuda.formats import block_scale, four_operands, k_scaled, load_plane, load_weights
from worker_orcd.kernels.cuda.linear import finish

# As `dequantise._codes`, of the planes that are lowest once the words are shifted. The shift is a byte.
_LOWEST = f"""{{ .reg .b32 y, s, c, a; mov.b32 c, 0x64006400; mov.b32 a, {_half(1024)};
and.b32 s, SHIFT, 31; shr.u32 y, WORD, s; lop3.b32 $0, y, 0x000f000f, c, 0xEA; sub.f16x2 $0, $0, a; """
_SECOND = f"""mov.b32 a, {_half(-64)}; .reg .b32 m; mov.b32 m, {_half(1 / 16)};
lop3.b32 $1, y, 0x00f000f0, c, 0xEA; fma.rn.f16x2 $1, $1, m, a; """
_ONE = tl.constexpr(_LOWEST.replace("WORD", "$1").replace("SHIFT", "$2") + "}")
_TWO = tl.constexpr(_LOWEST.replace("WORD", "$2").replace("SHIFT", "$3") + _SECOND + "}")
_OUT1_IN2, _OUT2_IN2 = tl.constexpr("=&r,r,r"), tl.constexpr("=&r,=&r,r,r")
_F16x2 = tl.constexpr((tl.float16,) * 2)


@triton.jit
def operands(words, high, s, shift, FORMAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
             PORTABLE: tl.constexpr):  # fmt: skip
    """The planes of a step, as `formats.multiply` multiplies them."""
    if FORMAT == "Q8_0":
        a, b = two_planes(words, PORTABLE)
        return a * block_scale(s, 0, ROWS, WIDTH), b * block_scale(s, 1, ROWS, WIDTH)
    else:
        return four_operands(words, high, s, shift, FORMAT, ROWS, WIDTH, PORTABLE)


@triton.jit
def unpack(w, h, s, shifts, out, n, K: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
           STEP: tl.constexpr, PLANES: tl.constexpr, HIGH: tl.constexpr, SHARE: tl.constexpr,
           HEADER: tl.constexpr, TILED: tl.constexpr, STEPS_EACH: tl.constexpr,
           PORTABLE: tl.constexpr):  # fmt: skip
    """A packed matrix of n rows as operands. Programs: (tiles of 64 rows, groups of STEPS_EACH steps).

    Row by row, (n, K), or if TILED as `gpu_layout` has float16: [tile][step of 64][64 rows][64].
    """
    STEPS: tl.constexpr = K // STEP
    WIDTH: tl.constexpr = STEP // PLANES
    PARTS: tl.constexpr = BLOCK // STEP if BLOCK > STEP else 1
    tl.static_assert(K % STEP == 0 and STEPS % PARTS == 0 and STEPS % STEPS_EACH == 0 and K % 64 == 0)
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 64)
    word = tl.arange(0, WIDTH)
    half = row % 2 * 16
    if HEADER == 2:
        half = tl.load(shifts + 64 + row).to(tl.uint32)
    shift = tl.broadcast_to(tl.load(shifts + row)[:, None], (64, WIDTH))
    live = (tile * 64 + row < n)[:, None]
    for i in tl.static_range(STEPS_EACH):
        step = tl.program_id(1) * STEPS_EACH + i
        at = step % PARTS
        first = tile * STEPS + step
        wp = w + first * (64 * WIDTH) + row[:, None] * WIDTH + word[None, :]
        hp = h + first * (64 // SHARE * WIDTH) + (row // SHARE * WIDTH)[:, None] + word[None, :]
        sp = s + first // PARTS * (16 * HEADER) + row
        words, high, s0, s1, s2, s3, s4 = load_weights(wp, hp, sp, row, half, at, PARTS, HEADER, HIGH)
        planes = operands(words, high, (s0, s1, s2, s3, s4), shift, FORMAT, 64, WIDTH, PORTABLE)
        for p in tl.static_range(PLANES):
            column = step * STEP + p * WIDTH + word
            if TILED:
                to = tile * (64 * K) + row[:, None] * 64 + (column // 64 * 4096 + column % 64)[None, :]
                tl.store(out + to, planes[p].to(out.dtype.element_ty))
            else:
                to = (tile * 64 + row)[:, None] * K + column[None, :]
                tl.store(out + to, planes[p].to(out.dtype.element_ty), mask=live)


@triton.jit
def lowest(words, shift, COUNT: tl.constexpr, PORTABLE: tl.constexpr):
    """The lowest plane of the words once they are shifted, or the two lowest, as float16."""
    if PORTABLE:
        words = words >> shift
        return plane(words, words, words, 0, 4, 0, 0), plane(words, words, words, 1, 4, 0, 0)
    elif COUNT == 2:
        return tl.inline_asm_elementwise(_TWO, _OUT2_IN2, [words, shift], dtype=_F16x2, is_pure=True, pack=2)
    else:
        one = tl.inline_asm_elementwise(
            _ONE, _OUT1_IN2, [words, shift], dtype=tl.float16, is_pure=True, pack=2
        )
        return one, one


@triton.jit
def piece_sum(w, s, x, token_mask, tile, row, chunk, K: tl.constexpr, CHUNKS: tl.constexpr,
              PIECES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
              PORTABLE: tl.constexpr):  # fmt: skip
    """As `linear.chunk_sum`, of Q4_K in steps of a block, of which 4 / PIECES planes are taken at a time."""
    STEPS: tl.constexpr = K // 256
    COUNT: tl.constexpr = STEPS // CHUNKS
    PLANES: tl.constexpr = 4 // PIECES
    word = tl.arange(0, 64)
    first = tile * STEPS + chunk * COUNT
    wp = w + (first * 4096 + row * 64)[:, None] + word[None, :]
    sp = s + first * 256 + row
    xp = x + chunk * (COUNT * 256) + word[:, None]
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for i in tl.range(0, COUNT * PIECES, num_stages=STAGES):
        step = i // PIECES
        piece = i % PIECES
        words = tl.load(wp + step * 4096)
        # What is this piece's of six-bit scales and minimums goes where the first sub-blocks have theirs.
        if PIECES == 2:
            s0 = tl.load(sp + step * 256 + piece * 64)
        else:
            s0 = tl.load(sp + step * 256 + piece // 2 * 64) >> (piece % 2 * 8)
        s2 = tl.load(sp + step * 256 + 128) >> (piece * (4 * PLANES))
        s3 = tl.load(sp + step * 256 + 192)
        columns = ()
        for p in tl.static_range(PLANES):
            columns = columns + (load_plane(xp, token_mask, 0, p * 64, 64, False),)
        shift = tl.broadcast_to((piece * (4 * PLANES)).to(tl.uint16), (ROWS, 64))
        planes = lowest(words, shift, PLANES, PORTABLE)
        for p in tl.static_range(PLANES):
            operand = k_scaled(planes[p], (s0, s0, s2, s3), 2 * p, ROWS, 64, PORTABLE)
            acc = tl.dot(operand, columns[p], acc)
        xp += 64 * PLANES
    return acc


@triton.jit
def pieces(w, s, x, y, n, tokens, stride, K: tl.constexpr, CHUNKS: tl.constexpr, PIECES: tl.constexpr,
           ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
           PORTABLE: tl.constexpr):  # fmt: skip
    """As `linear.linear`, of many tokens and Q4_K. Programs: (row tiles, token tiles)."""
    tl.static_assert(K % 256 == 0 and K // 256 % CHUNKS == 0)
    pn = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    tile = tl.minimum(pn * (ROWS // 64) + rows // 64, (n + 63) // 64 - 1)
    row = rows % 64
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token_mask = (token < tokens)[None, :]
    xp = x + token[None, :] * K
    if CHUNKS == 1:
        total = piece_sum(w, s, xp, token_mask, tile, row, 0, K, CHUNKS, PIECES, ROWS, TOKENS, STAGES,
                          PORTABLE)  # fmt: skip
    else:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for chunk in range(CHUNKS):
            total += piece_sum(w, s, xp, token_mask, tile, row, chunk, K, CHUNKS, PIECES, ROWS, TOKENS,
                               STAGES, PORTABLE)  # fmt: skip
    finish(total, y, y, y, n, tokens, stride, y, y, y, y, 0, token, pn, False, "", False, False, ROWS, TOKENS,
           0, 0, 0, 0, False)  # fmt: skip
