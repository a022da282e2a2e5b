"""
From the product of queries, keys and values to where attention reads them: norms, rotation, rounding.

Device code (Triton). Programs: (blocks of HEADS heads, tokens); the blocks of queries come first, then those
of keys, then those of values. A head is normalised and rotated in float32 and rounded once: to what is
pointed to, bytes being e4m3 numbers scaled as `cache_type` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.cache_type import KEY_SCALE
from worker_orcd.kernels.cuda.fp8 import stored
from worker_orcd.kernels.cuda.overlap import wait

_KEYS = tl.constexpr(KEY_SCALE)


@triton.jit
def move_heads(source, target, target_stride, gain, table, eps, head, heads, DIM: tl.constexpr,
               ROTARY: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
               SCALE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Heads `head` (those below `heads`) of a token's row at `source`, to `target` + head * target_stride.

    HALF and REST: powers of two from ROTARY / 2 and from DIM - ROTARY, 0 where there is nothing. All loads
    come first, so that none waits for a sum; and before them those that need not wait for the product.
    """
    valid = (head < heads)[:, None]
    source += head[:, None] * DIM
    target += head[:, None] * target_stride
    if HALF:
        column = tl.arange(0, HALF)
        inside = column < ROTARY // 2
        mask = valid & inside[None, :]
        cos = tl.load(table + column, mask=inside, other=0.0)[None, :]
        sin = tl.load(table + ROTARY // 2 + column, mask=inside, other=0.0)[None, :]
        if NORM:
            low_gain = tl.load(gain + column, mask=inside, other=0.0)[None, :]
            high_gain = tl.load(gain + ROTARY // 2 + column, mask=inside, other=0.0)[None, :]
    wait(OVERLAP)
    if HALF:
        low = tl.load(source + column[None, :], mask=mask, other=0.0)
        high = tl.load(source + (ROTARY // 2 + column)[None, :], mask=mask, other=0.0)
    if REST:
        after = ROTARY + tl.arange(0, REST)
        mask_rest = valid & (after < DIM)[None, :]
        rest = tl.load(source + after[None, :], mask=mask_rest, other=0.0)
        if NORM:
            rest_gain = tl.load(gain + after, mask=after < DIM, other=0.0)[None, :]
    if NORM:
        squares = tl.zeros((head.shape[0],), tl.float32)
        if HALF:
            squares += tl.sum(low * low + high * high, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, DIM * 1.0) + eps))[:, None]
        if HALF:
            low = low * factor * low_gain
            high = high * factor * high_gain
        if REST:
            rest = rest * factor * rest_gain
    if HALF:
        tl.store(target + column[None, :], stored(low * cos - high * sin, target, SCALE), mask=mask)
        at = (ROTARY // 2 + column)[None, :]
        tl.store(target + at, stored(high * cos + low * sin, target, SCALE), mask=mask)
    if REST:
        tl.store(target + after[None, :], stored(rest, target, SCALE), mask=mask_rest)


@triton.jit
def rope_store(qkv, positions, slots, q_gain, k_gain, table, cache, q_out, eps, qkv_stride, q_stride,
               values, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
               ROTARY: tl.constexpr, CACHE_BLOCK: tl.constexpr, Q_NORM: tl.constexpr,
               K_NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
               WIDE: tl.constexpr, OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`qkv` (tokens, (Q_HEADS + 2 * KV_HEADS) * DIM); table (positions, 2, ROTARY / 2): cos, then sin.

    `values`: elements from the keys of the cache to its values. WIDE: a power of two from DIM.
    """
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    row = qkv + token * qkv_stride
    angles = table
    if ROTARY:
        angles += tl.load(positions + token, cache_modifier=".cg").to(tl.int64) * ROTARY
    if block < Q_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)
        move_heads(row, q_out + token * q_stride, DIM, q_gain, angles, eps, head, Q_HEADS, DIM, ROTARY,
                   Q_NORM, HALF, REST, 1.0, OVERLAP)  # fmt: skip
    else:
        slot = tl.load(slots + token, cache_modifier=".cg")
        place = (slot // CACHE_BLOCK).to(tl.int64) * (KV_HEADS * CACHE_BLOCK * DIM)
        to = cache + place + slot % CACHE_BLOCK * DIM
        if block < Q_BLOCKS + KV_BLOCKS:
            head = (block - Q_BLOCKS) * HEADS + tl.arange(0, HEADS)
            move_heads(row + Q_HEADS * DIM, to, CACHE_BLOCK * DIM, k_gain, angles, eps, head, KV_HEADS, DIM,
                       ROTARY, K_NORM, HALF, REST, _KEYS, OVERLAP)  # fmt: skip
        else:
            head = (block - Q_BLOCKS - KV_BLOCKS) * HEADS + tl.arange(0, HEADS)
            column = tl.arange(0, WIDE)
            mask = (head < KV_HEADS)[:, None] & (column < DIM)[None, :]
            start = row + (Q_HEADS + KV_HEADS) * DIM
            wait(OVERLAP)
            value = tl.load(start + head[:, None] * DIM + column[None, :], mask=mask)
            at = to + values + head[:, None] * (CACHE_BLOCK * DIM) + column[None, :]
            tl.store(at, stored(value, cache, 1.0), mask=mask)
