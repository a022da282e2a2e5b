"""
The matrix product of many tokens: both operands from shared memory, brought there by TMA.

Device code (Gluon), for compute capability 9.0. Weights are float16 or bfloat16 in tiles of 64 rows and
steps of 64 columns, as `quant.gpu_layout` has such formats and `unpack` makes them of others. They are the
left operand, as in `linear`; a chunk's sum starts at zeros, goes through its columns in ascending order, and
is added to those before it: the bits are `linear`'s, and so is what is done to a sum on its way out.

One warp asks for operands, the others multiply; a program goes from tile to tile. The ring of STAGES steps
that they share knows no tiles, so the next tile's operands come while the last one's sums leave.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from worker_orcd.kernels.cuda.cache_type import KEY_SCALE
from worker_orcd.kernels.cuda.elementwise import applied, rounded
from worker_orcd.kernels.cuda.fp8 import stored

STEP = gl.constexpr(64)  # columns that are multiplied at a time: 128 bytes, what shared memory swizzles
_KEYS = gl.constexpr(KEY_SCALE)


@gluon.jit
def place(index, rows, tokens, ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr):
    """The first row and token of a tile. GROUP row tiles share what they read of the activations."""
    row_tiles = gl.cdiv(rows, ROWS)
    of_group = GROUP * gl.cdiv(tokens, TOKENS)
    first = index // of_group * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    inside = index % of_group
    return (first + inside % size) * ROWS, inside // size * TOKENS


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The next slot of the ring; the phase of its barriers changes with every round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load_tiles(w, x, weights, columns, ready, empty, rows, tokens, K: gl.constexpr, ROWS: gl.constexpr,
               TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """The part of the warp that asks for operands."""
    STEPS: gl.constexpr = K // STEP
    slot = 0
    phase = 1  # nothing has to be read before the first round
    for index in range(gl.program_id(0), gl.cdiv(rows, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
        row, token = place(index, rows, tokens, ROWS, TOKENS, GROUP)
        for step in range(STEPS):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, ROWS // 64 * w.block_type.nbytes + x.block_type.nbytes)
            for part in gl.static_range(ROWS // 64):
                tma.async_copy_global_to_shared(
                    w, [((row // 64 + part) * STEPS + step) * 64, 0], bar,
                    weights.index(slot).slice(part * 64, 64, 0),
                )  # fmt: skip
            tma.async_copy_global_to_shared(x, [token, step * STEP], bar, columns.index(slot))
            slot, phase = following(slot, phase, STAGES)


@gluon.jit
def pieces_of(total, ROWS: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr):
    """The sums of TOKENS / COUNT tokens each, in order, in registers as they are. COUNT: 1, 2, 4 or 8."""
    pieces = (total,)
    for level in gl.static_range(3):
        if 2**level < COUNT:
            parts = ()
            for i in gl.static_range(2**level):
                first, second = token_halves(pieces[i], ROWS, TOKENS // 2**level)
                parts = parts + (first, second)
            pieces = parts
    return pieces


@gluon.jit
def token_halves(total, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(total, (ROWS, 2, TOKENS // 2)), (0, 2, 1)))


@gluon.jit
def halves(total, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """As `linear.halves`: both are in the registers of one thread. [ROWS / 2, TOKENS] each"""
    low, high = gl.split(gl.permute(gl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1)))
    return gl.reshape(low, (ROWS // 2, TOKENS)), gl.reshape(high, (ROWS // 2, TOKENS))


@gluon.jit
def finish(total, y, bias, residual, row, token, n, tokens, stride, cache, positions, slots, table, values,
           PAIRED: gl.constexpr, GLU: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
           ROWS: gl.constexpr, TOKENS: gl.constexpr, HEAD: gl.constexpr, HEADS: gl.constexpr,
           KV_HEADS: gl.constexpr, CACHE_BLOCK: gl.constexpr, ROTATED: gl.constexpr):  # fmt: skip
    """As `linear.finish`, of the tile that begins at `row` and `token`."""
    out = row + gl.arange(0, ROWS, gl.SliceLayout(1, total.type.layout))
    if BIAS:
        total += gl.expand_dims(gl.load(bias + out, mask=out < n, other=0.0), 1)
    if HEADS > 0 or GLU != "":
        low, high = halves(total, ROWS, TOKENS)
        half = row // 2 + gl.arange(0, ROWS // 2, gl.SliceLayout(1, low.type.layout))
        at = token + gl.arange(0, TOKENS, gl.SliceLayout(0, low.type.layout))
        if HEADS > 0:
            store_heads(low, high, y, n, tokens, stride, cache, positions, slots, table, values, at, half,
                        HEAD, HEADS, KV_HEADS, CACHE_BLOCK, ROTATED)  # fmt: skip
        else:
            mask = gl.expand_dims(half < n // 2, 1) & gl.expand_dims(at < tokens, 0)
            value = applied(low, high, 0.0, GLU)
            to = y + gl.expand_dims(at, 0) * stride + gl.expand_dims(half, 1)
            gl.store(to, rounded(value, y), mask=mask)
    else:
        at = token + gl.arange(0, TOKENS, gl.SliceLayout(0, total.type.layout))
        mask = gl.expand_dims(out < n, 1) & gl.expand_dims(at < tokens, 0)
        column = out
        if PAIRED:
            column = out // 8 % 2 * (n // 2) + out // 16 * 8 + out % 8
        elif HEAD:
            column = out // HEAD * HEAD + out // 8 % 2 * (HEAD // 2) + out % HEAD // 16 * 8 + out % 8
        to = gl.expand_dims(at, 0) * stride + gl.expand_dims(column, 1)
        if RESIDUAL:
            total += gl.load(residual + to, mask=mask, other=0.0)
        gl.store(y + to, rounded(total, y), mask=mask)


@gluon.jit
def store_heads(low, high, q, n, tokens, stride, cache, positions, slots, table, values, token, half,
                HEAD: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, CACHE_BLOCK: gl.constexpr,
                ROTATED: gl.constexpr):  # fmt: skip
    """As `linear.store_heads`."""
    HALF: gl.constexpr = HEAD // 2
    head = half // HALF
    column = half % HALF
    there = token < tokens
    live = gl.expand_dims(half < n // 2, 1) & gl.expand_dims(there, 0)
    if ROTATED:
        turned = live & gl.expand_dims(head < HEADS + KV_HEADS, 1)
        position = gl.load(positions + token, mask=there, other=0)
        angle = table + (gl.expand_dims(position.to(gl.int64), 0) * HEAD + gl.expand_dims(column, 1))
        cos = gl.load(angle, mask=turned, other=1.0)
        sin = gl.load(angle + HALF, mask=turned, other=0.0)
        first = gl.where(turned, low * cos - high * sin, low)
        high = gl.where(turned, high * cos + low * sin, high)
        low = first
    is_q = live & gl.expand_dims(head < HEADS, 1)
    to = q + (gl.expand_dims(token, 0) * stride + gl.expand_dims(head * HEAD + column, 1))
    gl.store(to, rounded(low, q), mask=is_q)
    gl.store(to + HALF, rounded(high, q), mask=is_q)
    slot = gl.load(slots + token, mask=there, other=0)
    place_of = (slot // CACHE_BLOCK).to(gl.int64) * (KV_HEADS * CACHE_BLOCK * HEAD)
    place_of += slot % CACHE_BLOCK * HEAD
    is_v = head >= HEADS + KV_HEADS
    kv_head = gl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    inside = kv_head * (CACHE_BLOCK * HEAD) + column + gl.where(is_v, values, 0)
    kept = cache + (gl.expand_dims(place_of, 0) + gl.expand_dims(inside, 1))
    is_kv = live & gl.expand_dims(head >= HEADS, 1)
    scale = gl.expand_dims(gl.where(is_v, 1.0, _KEYS), 1)
    gl.store(kept, stored(low, cache, scale), mask=is_kv)
    gl.store(kept + HALF, stored(high, cache, scale), mask=is_kv)


@gluon.jit
def multiply_tiles(weights, columns, ready, empty, y, bias, residual, first, rows, n, tokens, stride, cache,
                   positions, slots, table, values, K: gl.constexpr, CHUNKS: gl.constexpr,
                   ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
                   WARPS: gl.constexpr, PAIRED: gl.constexpr, GLU: gl.constexpr, BIAS: gl.constexpr,
                   RESIDUAL: gl.constexpr, HEAD: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
                   CACHE_BLOCK: gl.constexpr, ROTATED: gl.constexpr):  # fmt: skip
    """The part of the warps that multiply: every tile of this program, step by step as they get `ready`."""
    COUNT: gl.constexpr = K // STEP // CHUNKS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    slot = 0
    phase = 0
    before = STAGES - 1
    for index in range(gl.program_id(0), gl.cdiv(rows, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
        total = gl.zeros((ROWS, TOKENS), gl.float32, layout)
        for _ in range(CHUNKS):
            acc = gl.zeros((ROWS, TOKENS), gl.float32, layout)
            for i in range(COUNT):
                mbarrier.wait(ready.index(slot), phase)
                acc = warpgroup_mma(
                    weights.index(slot), columns.index(slot).permute((1, 0)), acc, is_async=True
                )
                acc = warpgroup_mma_wait(1, deps=(acc,))
                gl.thread_barrier()  # of all warps: one of them says for all that they have read it
                mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
                before = slot
                slot, phase = following(slot, phase, STAGES)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(before), count=1)
            if CHUNKS == 1:
                total = acc
            else:
                total += acc
        row, token = place(index, rows, tokens, ROWS, TOKENS, GROUP)
        # Registers have no room for the addresses of more tokens at a time.
        PIECE: gl.constexpr = 32 if HEADS > 0 else 64
        pieces = pieces_of(total, ROWS, TOKENS, TOKENS // PIECE)
        for i in gl.static_range(TOKENS // PIECE):
            finish(pieces[i], y, bias, residual, first + row, token + i * PIECE, n, tokens, stride, cache,
                   positions, slots, table, values, PAIRED, GLU, BIAS, RESIDUAL, ROWS, PIECE, HEAD, HEADS,
                   KV_HEADS, CACHE_BLOCK, ROTATED)  # fmt: skip


@gluon.jit
def wide(w, x, y, bias, residual, first, rows, n, tokens, stride, cache, positions, slots, table, values,
         K: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr,
         STAGES: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr, PAIRED: gl.constexpr,
         GLU: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, HEAD: gl.constexpr,
         HEADS: gl.constexpr, KV_HEADS: gl.constexpr, CACHE_BLOCK: gl.constexpr,
         ROTATED: gl.constexpr):  # fmt: skip
    """Of `rows` rows of a weight of n, from its row `first` on. Programs: one a multiprocessor, at most.

    w: a descriptor of their tiles, ([tile][step][64 rows], 64 columns). x: of (tokens, K).
    """
    gl.static_assert(K % (STEP * CHUNKS) == 0 and gl.num_warps() == WARPS)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, STEP], w.layout)
    columns = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (weights, columns, ready, empty, y, bias, residual, first, rows, n, tokens, stride, cache,
                 positions, slots, table, values, K, CHUNKS, ROWS, TOKENS, STAGES, GROUP, WARPS, PAIRED, GLU,
                 BIAS, RESIDUAL, HEAD, HEADS, KV_HEADS, CACHE_BLOCK, ROTATED),
            ),
            (
                load_tiles,
                (w, x, weights, columns, ready, empty, rows, tokens, K, ROWS, TOKENS, STAGES, GROUP),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
