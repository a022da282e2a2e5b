"""
Packed weights as tensor cores take them, before a product of many tokens (`linear_wide`).

Device code (Triton). Operands are made by what `linear` makes them with, so they are the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.dequantise import eight_planes, two_planes
from worker_orcd.kernels.cuda.formats import block_scale, four_operands, load_weights, q2_scaled, q3_scaled


@triton.jit
def operands(words, high, s, shift, FORMAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
             PORTABLE: tl.constexpr):  # fmt: skip
    """The planes of a step, as `formats.multiply` multiplies them."""
    if FORMAT == "Q8_0":
        a, b = two_planes(words, PORTABLE)
        return a * block_scale(s, 0, ROWS, WIDTH), b * block_scale(s, 1, ROWS, WIDTH)
    elif FORMAT == "Q2_K" or FORMAT == "Q3_K":
        if FORMAT == "Q2_K":
            planes = eight_planes(words, high, shift, 0, 0, PORTABLE)
        else:
            planes = eight_planes(words, high, shift, 1, 4, PORTABLE)
        of_all = ()
        for p in tl.static_range(8):
            if FORMAT == "Q2_K":
                of_all = of_all + (q2_scaled(planes[p], s, 2 * p, ROWS, WIDTH, PORTABLE),)
            else:
                of_all = of_all + (q3_scaled(planes[p], s, p, ROWS, WIDTH, PORTABLE),)
        return of_all
    else:
        return four_operands(words, high, s, shift, FORMAT, ROWS, WIDTH, PORTABLE)


@triton.jit
def unpack(w, h, s, shifts, out, K: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
           STEP: tl.constexpr, PLANES: tl.constexpr, HIGH: tl.constexpr, SHARE: tl.constexpr,
           HEADER: tl.constexpr, PORTABLE: tl.constexpr):  # fmt: skip
    """`out`: [tile][step of 64][64 rows][64], as float16 lies on a GPU. Programs: (tiles, steps)."""
    STEPS: tl.constexpr = K // STEP
    WIDTH: tl.constexpr = STEP // PLANES
    PARTS: tl.constexpr = BLOCK // STEP if BLOCK > STEP else 1
    tl.static_assert(K % STEP == 0 and STEPS % PARTS == 0 and K % 64 == 0)
    tile = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    row = tl.arange(0, 64)
    word = tl.arange(0, WIDTH)
    half = row % 2 * 16
    if HEADER == 2:
        half = tl.load(shifts + 64 + row).to(tl.uint32)
    shift = tl.broadcast_to(tl.load(shifts + row)[:, None], (64, WIDTH))
    first = tile * STEPS + step
    wp = w + first * (64 * WIDTH) + row[:, None] * WIDTH + word[None, :]
    hp = h + first * (64 // SHARE * WIDTH) + (row // SHARE * WIDTH)[:, None] + word[None, :]
    sp = s + first // PARTS * (16 * HEADER) + row
    weights = load_weights(wp, hp, sp, row, half, step % PARTS, PARTS, HEADER, HIGH)
    words, high, s0, s1, s2, s3, s4 = weights
    planes = operands(words, high, (s0, s1, s2, s3, s4), shift, FORMAT, 64, WIDTH, PORTABLE)
    for p in tl.static_range(PLANES):
        column = step * STEP + p * WIDTH + word
        to = tile * (64 * K) + row[:, None] * 64 + (column // 64 * 4096 + column % 64)[None, :]
        tl.store(out + to, planes[p].to(out.dtype.element_ty))
