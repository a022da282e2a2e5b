"""
Products with the matrices of experts: each token times those of the experts it goes to.

Device code (Triton). A *pair* is a token and one of its slots: pair p is slot p % SLOTS of token p // SLOTS.
A program has rows of one expert's matrix and

* one pair, whose expert it reads: for a few tokens, nothing is sorted; or
* some of the pairs of one expert, as `sort` has put them together: an expert's weights are read about once.

Sums are those of `linear`: a chunk's is `chunk_sum`, chunks are added in ascending order, so that which way a
step goes does not change a bit. Then, in this order: bias, gated unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.elementwise import applied, rounded
from worker_orcd.kernels.cuda.linear import chunk_sum, sum_of_parts
from worker_orcd.kernels.cuda.overlap import release, wait


@triton.jit
def sort(experts, order, tiles, pairs, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
         OVERLAP: tl.constexpr):  # fmt: skip
    """Pairs by expert, within an expert ascending. A program an expert; no program needs another.

    `tiles` is (pairs // WIDTH + programs, 4): expert, first entry in `order`, and how many entries, at most
    WIDTH. An expert whose pairs start at entry f has tiles from f // WIDTH + its number on: enough for all
    of them, and where the next one starts without either knowing the other's. What is over has no entries.
    COUNT blocks of BLOCK pairs are at least `pairs`.
    """
    wait(OVERLAP)
    expert = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    own = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in tl.static_range(COUNT):
        to = tl.load(experts + i * BLOCK + place, mask=i * BLOCK + place < pairs, other=0x7FFFFFFF)
        below += (to < expert).to(tl.int32)
        own += (to == expert).to(tl.int32)
    first = tl.sum(below, 0)
    count = tl.sum(own, 0)
    at = first
    for i in tl.range(0, COUNT):
        pair = i * BLOCK + place
        to = tl.load(experts + pair, mask=pair < pairs, other=0x7FFFFFFF)
        mine = (to == expert).to(tl.int32)
        tl.store(order + at + tl.cumsum(mine, 0) - 1, pair, mask=mine == 1)
        at += tl.sum(mine, 0)
    start = first // WIDTH + expert
    end = (first + count) // WIDTH + expert + 1
    for j in tl.range(0, COUNT * BLOCK // WIDTH + 2, 128):
        k = j + tl.arange(0, 128)
        entry = tiles + (start + k) * 4
        inside = start + k < end
        left = tl.maximum(count - k * WIDTH, 0)
        tl.store(entry, expert + k * 0, mask=inside)
        tl.store(entry + 1, first + k * WIDTH, mask=inside)
        tl.store(entry + 2, tl.minimum(left, WIDTH), mask=inside)


@triton.jit
def finish(total, y, bias, pair, pair_mask, stride, n, pn, SLOTS: tl.constexpr, PAIRED: tl.constexpr,
           GLU: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """From finished sums to y: (tokens, slots, outputs), or if PAIRED, without GLU, (tokens, 2, slots, …).

    `n` and `bias` are the expert's. PAIRED: eight rows are gates, the next eight what goes with them. GLU is
    an operation of `elementwise.applied`.
    """
    out = pn * ROWS + tl.arange(0, ROWS)
    width = n
    if BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0)[:, None]
    if PAIRED:
        width = n // 2
    if GLU != "":
        pairs = tl.permute(tl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        total = tl.reshape(applied(gate, up, 0.0, GLU), (ROWS // 2, TOKENS))
        column = pn * (ROWS // 2) + tl.arange(0, ROWS // 2)
        mask = column < width
    else:
        mask = out < n
        column = out
        if PAIRED:
            column = out // 8 % 2 * (SLOTS * width) + out // 16 * 8 + out % 8
    at = pair // SLOTS * stride + pair % SLOTS * width
    tl.store(y + at[None, :] + column[:, None], rounded(total, y), mask=mask[:, None] & pair_mask)


@triton.jit
def expert_sum(w, h, s, shifts, x, expert, pair, pair_mask, pn, n, x_stride, K: tl.constexpr,
               FORMAT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
               PLANES: tl.constexpr, HIGH: tl.constexpr, SHARE: tl.constexpr, HEADER: tl.constexpr,
               SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
               UNROLL: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
               PORTABLE: tl.constexpr):  # fmt: skip
    """ROWS rows of the expert's matrix times the pairs: all of K, or if SPLIT this program's chunk."""
    rows = tl.arange(0, ROWS)
    tiles = (n + 63) // 64
    if ROWS == 64:
        tile = pn + rows * 0
        row = rows
    else:
        tile = tl.minimum(pn * (ROWS // 64) + rows // 64, tiles - 1)
        row = rows % 64
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    PARTS: tl.constexpr = BLOCK // STEP if BLOCK > STEP else 1
    above = expert.to(tl.int64) * tiles  # of other experts
    w += above * (STEPS * 64 * (STEP // PLANES))
    h += above * (STEPS * (64 // SHARE) * (STEP // PLANES))
    s += above * (STEPS // PARTS * 16 * HEADER)
    x += (pair // SLOTS * x_stride)[None, :]
    if not SHARED:
        x += (pair % SLOTS * K)[None, :]
    if CHUNKS == 1 or SPLIT:
        return chunk_sum(w, h, s, shifts, x, pair_mask, tile, row, tl.program_id(2), K, FORMAT, BLOCK, STEP,
                         CHUNKS, PLANES, HIGH, SHARE, HEADER, ROWS, TOKENS, STAGES, UNROLL,
                         PORTABLE)  # fmt: skip
    else:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for chunk in range(CHUNKS):
            total += chunk_sum(w, h, s, shifts, x, pair_mask, tile, row, chunk, K, FORMAT, BLOCK, STEP,
                               CHUNKS, PLANES, HIGH, SHARE, HEADER, ROWS, TOKENS, STAGES, UNROLL,
                               PORTABLE)  # fmt: skip
        return total


@triton.jit
def product(w, h, s, shifts, x, y, bias, experts, order, tiles, partials, counters, n, pairs, x_stride,
            y_stride, K: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
            CHUNKS: tl.constexpr, PLANES: tl.constexpr, HIGH: tl.constexpr, SHARE: tl.constexpr,
            HEADER: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
            STAGES: tl.constexpr, UNROLL: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
            WIDTH: tl.constexpr, PAIRED: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
            PORTABLE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Programs: (row tiles of an expert, pairs, chunks if SPLIT); with WIDTH, for what `sort` has put
    together, (row tiles of an expert, its tiles times WIDTH / TOKENS).

    x is (tokens, K) if SHARED, else (tokens, SLOTS, K), y see `finish`; strides are from token to token. Each
    expert has whole tiles of 64 rows, of which `n` count.
    """
    wait(OVERLAP)
    pn = tl.program_id(0)
    place = tl.arange(0, TOKENS)
    if WIDTH == 0:
        expert = tl.load(experts + tl.program_id(1))
        pair = tl.program_id(1) + place * 0
        pair_mask = (place == 0)[None, :]
    else:
        tile = tiles + tl.program_id(1) // (WIDTH // TOKENS) * 4
        skipped = tl.program_id(1) % (WIDTH // TOKENS) * TOKENS
        left = tl.load(tile + 2) - skipped
        if left <= 0:
            return
        expert = tl.load(tile)
        pair = tl.load(order + tl.load(tile + 1) + skipped + place, mask=place < left, other=0)
        pair_mask = (place < left)[None, :]
    bias += expert * n
    total = expert_sum(w, h, s, shifts, x, expert, pair, pair_mask, pn, n, x_stride, K, FORMAT, BLOCK, STEP,
                       CHUNKS, PLANES, HIGH, SHARE, HEADER, SPLIT, ROWS, TOKENS, STAGES, UNROLL, SLOTS,
                       SHARED, PORTABLE)  # fmt: skip
    release(OVERLAP)
    if CHUNKS == 1 or not SPLIT:
        finish(total, y, bias, pair, pair_mask, y_stride, n, pn, SLOTS, PAIRED, GLU, BIAS, ROWS, TOKENS)
    else:
        out = pn * ROWS + tl.arange(0, ROWS)
        mask = (out < n)[:, None] & pair_mask
        part = partials + pair[None, :] * n + out[:, None]
        tl.store(part + tl.program_id(2) * pairs * n, total, mask=mask)
        tl.debug_barrier()  # all of this program's part is written before it counts as finished
        counter = counters + tl.program_id(1) * tl.num_programs(0) + pn
        finished = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if finished == CHUNKS - 1:
            total = sum_of_parts(part, pairs * n, mask, CHUNKS, CHUNKS if TOKENS <= 16 else 1, ROWS,
                                 TOKENS)  # fmt: skip
            finish(total, y, bias, pair, pair_mask, y_stride, n, pn, SLOTS, PAIRED, GLU, BIAS, ROWS, TOKENS)
            tl.store(counter, 0)
