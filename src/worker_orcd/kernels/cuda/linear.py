"""
The matrix product of a step: y = W x for 1 … 4096 tokens, from packed weights.

Device code (Triton). The weights are the left operand, tokens are columns of the right one, so that a few
tokens waste little of a tensor core. K is cut into CHUNKS chunks of equal steps (see `contract`). A chunk's
sum starts at zero; the chunks are added in ascending order, whoever does it:

* CHUNKS = 1: a program has the whole sum.
* SPLIT: a program a chunk writes its part to `partials`; the one that finishes last adds them up. Who that is
  changes nothing. Counters return to zero.
* otherwise a program walks all chunks.

Then, in this order: bias, gated unit or rotated heads or residual.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.cache_type import KEY_SCALE
from worker_orcd.kernels.cuda.elementwise import applied, rounded
from worker_orcd.kernels.cuda.formats import load_weights, load_x, multiply
from worker_orcd.kernels.cuda.fp8 import stored
from worker_orcd.kernels.cuda.overlap import release, wait

_KEYS = tl.constexpr(KEY_SCALE)
_SAME, _OUT1_IN1 = tl.constexpr("mov.b32 $0, $1;"), tl.constexpr("=f,f")


@triton.jit
def chunk_sum(w, h, s, shifts, x, token_mask, tile, row, chunk, K: tl.constexpr, FORMAT: tl.constexpr,
              BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, PLANES: tl.constexpr,
              HIGH: tl.constexpr, SHARE: tl.constexpr, HEADER: tl.constexpr, ROWS: tl.constexpr,
              TOKENS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, PORTABLE: tl.constexpr,
              OVERLAP: tl.constexpr = 0):  # fmt: skip
    """The product of one chunk of K. `tile`, `row`: each row's tile and its place there. [ROWS, TOKENS]

    UNROLL steps are taken at a time: it divides those of a chunk.
    """
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    WIDTH: tl.constexpr = STEP // PLANES
    COUNT: tl.constexpr = STEPS // CHUNKS
    PARTS: tl.constexpr = BLOCK // STEP if BLOCK > STEP else 1  # steps of a header
    TAIL: tl.constexpr = K % STEP != 0
    column = tl.arange(0, WIDTH)
    first = tile * STEPS + chunk * COUNT
    wp = w + (first * (64 * WIDTH) + row * WIDTH)[:, None] + column[None, :]
    hp = h + (first * (64 // SHARE * WIDTH) + row // SHARE * WIDTH)[:, None] + column[None, :]
    sp = s + first // PARTS * (16 * HEADER) + row
    xp = x + chunk * (COUNT * STEP) + column[:, None]
    # Read, not computed: Triton takes an operand to registers only if it all comes from loads.
    if HEADER == 2:
        half = tl.load(shifts + 64 + row).to(tl.uint32)
    else:  # goes to registers as it is
        half = row % 2 * 16
    shift = tl.load(shifts + row)
    shift = tl.broadcast_to(shift[:, None], (ROWS, WIDTH))
    left = K - chunk * (COUNT * STEP)
    wait(OVERLAP)
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for i in tl.range(0, COUNT // UNROLL, num_stages=STAGES):
        for j in tl.static_range(UNROLL):
            at = (chunk * COUNT + i * UNROLL + j) % PARTS
            weights = load_weights(wp, hp, sp, row, half, at, PARTS, HEADER, HIGH)
            some = load_x(xp, token_mask, left, PLANES, WIDTH, TAIL)
            acc = multiply(acc, weights, shift, some, FORMAT, ROWS, WIDTH, PORTABLE)
            acc = settled(acc, PORTABLE)
            wp, hp, sp = advanced(wp, hp, sp, at, WIDTH, SHARE, HEADER, PARTS)
            xp += STEP
            left -= STEP
    release(OVERLAP)
    return acc


@triton.jit
def settled(acc, PORTABLE: tl.constexpr):
    """The sums, once tensor cores have read what they multiply.

    Without it Triton lets the last product of a loop's turn go on into the next one, where weights for the
    next product come into the very registers that it may still be reading. (`gpu_codegen.py` looks for that.)
    """
    if PORTABLE:
        return acc
    return tl.inline_asm_elementwise(_SAME, _OUT1_IN1, [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def advanced(w, h, s, at, WIDTH: tl.constexpr, SHARE: tl.constexpr, HEADER: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    """A step's pointers to the next one's. The step is the `at`-th of its header."""
    if PARTS == 1:
        s += 16 * HEADER
    else:
        s += at * (16 * HEADER)
    return w + 64 * WIDTH, h + 64 // SHARE * WIDTH, s


@triton.jit
def sum_of_parts(part, apart, mask, CHUNKS: tl.constexpr, FLIGHT: tl.constexpr, ROWS: tl.constexpr,
                 TOKENS: tl.constexpr):  # fmt: skip
    """The parts of all chunks in ascending order, which lie `apart` values apart. [ROWS, TOKENS]

    FLIGHT of them are on their way at a time, as many as registers have room for.
    """
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    WHOLE: tl.constexpr = CHUNKS // FLIGHT * FLIGHT
    # Not from L1, which may hold an older step's.
    for first in tl.range(0, WHOLE, FLIGHT, loop_unroll_factor=1):
        for i in tl.static_range(FLIGHT):
            total += tl.load(part + (first + i) * apart, mask=mask, other=0.0, cache_modifier=".cg")
    for chunk in tl.static_range(WHOLE, CHUNKS):
        total += tl.load(part + chunk * apart, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def halves(total, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Of rows of which eight belong to the next eight: the ones and the others. [ROWS / 2, TOKENS] each"""
    pairs = tl.permute(tl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
    low, high = tl.split(pairs)
    return tl.reshape(low, (ROWS // 2, TOKENS)), tl.reshape(high, (ROWS // 2, TOKENS))


@triton.jit
def finish(total, y, bias, residual, n, tokens, stride, cache, positions, slots, table, values, token, pn,
           PAIRED: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
           ROWS: tl.constexpr, TOKENS: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
           KV_HEADS: tl.constexpr, CACHE_BLOCK: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """What is done to a finished sum on its way out. `n` outputs; with GLU half as many columns.

    PAIRED: eight rows are gates, the next eight what goes with them; HEAD: likewise the halves of each head
    of so many rows. GLU is an operation of `elementwise.applied`. `stride`: from a token to the next in y and
    residual. HEADS: see `store_heads`.
    """
    out = pn * ROWS + tl.arange(0, ROWS)
    if BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0)[:, None]
    half = pn * (ROWS // 2) + tl.arange(0, ROWS // 2)
    if HEADS:
        low, high = halves(total, ROWS, TOKENS)
        store_heads(low, high, y, n, tokens, stride, cache, positions, slots, table, values, token, half,
                    HEAD, HEADS, KV_HEADS, CACHE_BLOCK, ROTATED)  # fmt: skip
    elif GLU != "":
        gate, up = halves(total, ROWS, TOKENS)
        mask = (half < n // 2)[:, None] & (token < tokens)[None, :]
        value = applied(gate, up, 0.0, GLU)
        tl.store(y + token[None, :] * stride + half[:, None], rounded(value, y), mask=mask)
    else:
        mask = (out < n)[:, None] & (token < tokens)[None, :]
        column = out
        if PAIRED:
            column = out // 8 % 2 * (n // 2) + out // 16 * 8 + out % 8
        elif HEAD:
            column = out // HEAD * HEAD + out // 8 % 2 * (HEAD // 2) + out % HEAD // 16 * 8 + out % 8
        at = token[None, :] * stride + column[:, None]
        if RESIDUAL:
            total += tl.load(residual + at, mask=mask, other=0.0)
        tl.store(y + at, rounded(total, y), mask=mask)


@triton.jit
def store_heads(low, high, q, n, tokens, stride, cache, positions, slots, table, values, token, half,
                HEAD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, CACHE_BLOCK: tl.constexpr,
                ROTATED: tl.constexpr):  # fmt: skip
    """Columns and those half a head further on: rotated if they are of q or k, and put where they go.

    `half` counts the columns of `low`, in heads of HEAD / 2. As `rope.rope_store` does it, bit for bit.
    """
    HALF: tl.constexpr = HEAD // 2
    head = half // HALF
    column = half % HALF
    there = token < tokens
    live = (half < n // 2)[:, None] & there[None, :]
    if ROTATED:
        turned = live & (head < HEADS + KV_HEADS)[:, None]
        position = tl.load(positions + token, mask=there, other=0)
        angle = table + position.to(tl.int64)[None, :] * HEAD + column[:, None]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        first = tl.where(turned, low * cos - high * sin, low)
        high = tl.where(turned, high * cos + low * sin, high)
        low = first
    is_q = live & (head < HEADS)[:, None]
    to = q + token[None, :] * stride + (head * HEAD + column)[:, None]
    tl.store(to, rounded(low, q), mask=is_q)
    tl.store(to + HALF, rounded(high, q), mask=is_q)
    slot = tl.load(slots + token, mask=there, other=0)
    place = (slot // CACHE_BLOCK).to(tl.int64) * (KV_HEADS * CACHE_BLOCK * HEAD) + slot % CACHE_BLOCK * HEAD
    is_v = head >= HEADS + KV_HEADS
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    inside = kv_head * (CACHE_BLOCK * HEAD) + column + tl.where(is_v, values, 0)
    to = cache + place[None, :] + inside[:, None]
    is_kv = live & (head >= HEADS)[:, None]
    scale = tl.where(is_v, 1.0, _KEYS)[:, None]
    tl.store(to, stored(low, cache, scale), mask=is_kv)
    tl.store(to + HALF, stored(high, cache, scale), mask=is_kv)


@triton.jit
def linear(w, h, s, shifts, x, y, partials, counters, bias, residual, n, tokens, stride, cache, positions,
           slots, table, values, K: tl.constexpr,
           FORMAT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
           PLANES: tl.constexpr, HIGH: tl.constexpr, SHARE: tl.constexpr, HEADER: tl.constexpr,
           SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
           UNROLL: tl.constexpr, PAIRED: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, PORTABLE: tl.constexpr, HEAD: tl.constexpr = 0, HEADS: tl.constexpr = 0,
           KV_HEADS: tl.constexpr = 0, CACHE_BLOCK: tl.constexpr = 0, ROTATED: tl.constexpr = False,
           OVERLAP: tl.constexpr = 0, FLIGHT: tl.constexpr = 1):  # fmt: skip
    """Programs: (row tiles, token tiles, chunks if SPLIT). x (tokens, K) of the format's operand type."""
    pn = tl.program_id(0)
    pt = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    if ROWS == 64:
        tile = pn + rows * 0
        row = rows
    else:
        tile = tl.minimum(pn * (ROWS // 64) + rows // 64, (n + 63) // 64 - 1)
        row = rows % 64
    token = pt * TOKENS + tl.arange(0, TOKENS)
    token_mask = (token < tokens)[None, :]
    xp = x + token[None, :] * K
    if CHUNKS == 1 or SPLIT:
        total = chunk_sum(w, h, s, shifts, xp, token_mask, tile, row, tl.program_id(2), K, FORMAT, BLOCK,
                          STEP, CHUNKS, PLANES, HIGH, SHARE, HEADER, ROWS, TOKENS, STAGES, UNROLL,
                          PORTABLE, OVERLAP)  # fmt: skip
    else:
        wait(OVERLAP)
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for chunk in range(CHUNKS):
            total += chunk_sum(w, h, s, shifts, xp, token_mask, tile, row, chunk, K, FORMAT, BLOCK, STEP,
                               CHUNKS, PLANES, HIGH, SHARE, HEADER, ROWS, TOKENS, STAGES, UNROLL,
                               PORTABLE)  # fmt: skip
    if CHUNKS == 1 or not SPLIT:
        finish(total, y, bias, residual, n, tokens, stride, cache, positions, slots, table, values, token, pn,
               PAIRED, GLU, BIAS, RESIDUAL, ROWS, TOKENS, HEAD, HEADS, KV_HEADS, CACHE_BLOCK,
               ROTATED)  # fmt: skip
    else:
        out = pn * ROWS + rows
        mask = (out < n)[:, None] & token_mask
        part = partials + token[None, :] * n + out[:, None]
        tl.store(part + tl.program_id(2) * tokens * n, total, mask=mask)
        tl.debug_barrier()  # all of this program's part is written before it counts as finished
        counter = counters + pt * tl.num_programs(0) + pn
        finished = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if finished == CHUNKS - 1:
            total = sum_of_parts(part, tokens * n, mask, CHUNKS, FLIGHT, ROWS, TOKENS)
            finish(total, y, bias, residual, n, tokens, stride, cache, positions, slots, table, values, token,
                   pn, PAIRED, GLU, BIAS, RESIDUAL, ROWS, TOKENS, HEAD, HEADS, KV_HEADS, CACHE_BLOCK,
                   ROTATED)  # fmt: skip
            tl.store(counter, 0)
