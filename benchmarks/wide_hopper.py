"""
Products of many tokens, experiments: both operands from shared memory, brought there by TMA.

Device code (Gluon), for compute capability 9.0, see `gpu_wide.py`. Weights are the left operand, as in
`linear.linear`; a chunk's sum starts at zeros, goes through its columns in ascending order, and is added to
those before it: the bits are `linear`'s.

* `product`: all warps do all; the next loads are asked for once the multiplication before has ended
* `apart`: one warp asks for loads, the others multiply, and go on to the next tile (a persistent kernel)
* `fused`: as `apart`, but four warps make the weights from packed words, so there is no scratch matrix
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from worker_orcd.kernels.cuda.dequantise import four_planes
from worker_orcd.kernels.cuda.elementwise import rounded
from worker_orcd.kernels.cuda.formats import high_half, low_half, packed_product, twice

STEP = gl.constexpr(64)  # columns that are multiplied at a time: 128 bytes, what shared memory swizzles
# Each plane of a word of nibbles on its own, as `dequantise._codes` has all of them.
_LOW = gl.constexpr("""{ .reg .b32 y, c; mov.b32 c, 0x64006400;
shr.u32 y, $1, UP; lop3.b32 $0, y, 0x000f000f, c, 0xEA; sub.f16x2 $0, $0, c; }""")
_HIGH = gl.constexpr("""{ .reg .b32 y, c, m, a;
mov.b32 c, 0x64006400; mov.b32 m, 0x2c002c00; mov.b32 a, 0xd400d400;
shr.u32 y, $1, UP; lop3.b32 $0, y, 0x00f000f0, c, 0xEA; fma.rn.f16x2 $0, $0, m, a; }""")
_OUT1_IN1 = gl.constexpr("=&r,r")
_TIMES = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")
_OUT1_IN2 = gl.constexpr("=r,r,r")
_LESS = gl.constexpr("{ .reg .b32 m; neg.f16x2 m, $3; fma.rn.f16x2 $0, $1, $2, m; }")
_OUT1_IN3 = gl.constexpr("=r,r,r,r")


@gluon.jit
def place(index, n, tokens, ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr):
    """The first row and token of a tile. GROUP row tiles share what they read of the activations."""
    row_tiles = gl.cdiv(n, ROWS)
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
def store(total, y, row, token, n, tokens, stride, ROWS: gl.constexpr, TOKENS: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    out = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    at = token + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    mask = gl.expand_dims(out < n, 1) & gl.expand_dims(at < tokens, 0)
    to = y + gl.expand_dims(at, 0) * stride + gl.expand_dims(out, 1)
    gl.store(to, rounded(total, y), mask=mask)


@gluon.jit
def narrowed(values, dtype: gl.constexpr):
    """As `elementwise.rounded`."""
    if dtype == gl.float16:
        values = tl.clamp(values, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)


@gluon.jit
def ask(w, x, step, row, token, bar, weights, columns, live):
    """For a step of both operands."""
    mbarrier.expect(bar, w.block_type.nbytes + x.block_type.nbytes, pred=live)
    tma.async_copy_global_to_shared(w, [row, step * STEP], bar, weights, live)
    tma.async_copy_global_to_shared(x, [token, step * STEP], bar, columns, live)


@gluon.jit
def product(w, x, y, n, tokens, stride, K: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
            TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
            WARPS: gl.constexpr):  # fmt: skip
    """`y` (tokens, n) = x (tokens, K) @ w (n, K).T, w and x as descriptors. Programs: tiles."""
    STEPS: gl.constexpr = K // STEP
    COUNT: gl.constexpr = STEPS // CHUNKS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    gl.static_assert(K % (STEP * CHUNKS) == 0 and gl.num_warps() == WARPS and STAGES <= STEPS)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, STEP], w.layout)
    columns = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        mbarrier.init(ready.index(each), count=1)
    row, token = place(gl.program_id(0), n, tokens, ROWS, TOKENS, GROUP)
    for early in gl.static_range(STAGES):
        ask(w, x, early, row, token, ready.index(early), weights.index(early), columns.index(early), True)
    total = gl.zeros((ROWS, TOKENS), gl.float32, layout)
    slot = 0
    phase = 0
    before = STAGES - 1
    for chunk in range(CHUNKS):
        acc = gl.zeros((ROWS, TOKENS), gl.float32, layout)
        for i in range(COUNT):
            mbarrier.wait(ready.index(slot), phase)
            acc = warpgroup_mma(weights.index(slot), columns.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before has been multiplied: its place is free.
            step = chunk * COUNT + i - 1
            live = (step >= 0) & (step + STAGES < STEPS)
            ask(w, x, step + STAGES, row, token, ready.index(before), weights.index(before),
                columns.index(before), live)  # fmt: skip
            before = slot
            slot, phase = following(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if CHUNKS == 1:
            total = acc
        else:
            total += acc
    store(total, y, row, token, n, tokens, stride, ROWS, TOKENS, layout)


@gluon.jit
def multiply_tiles(weights, columns, ready, empty, outs, y, n, tokens, stride, K: gl.constexpr,
                   CHUNKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
                   GROUP: gl.constexpr, WARPS: gl.constexpr, STAGED: gl.constexpr):  # fmt: skip
    """The part of the warps that multiply: every tile of this program, step by step as they get `ready`.

    If STAGED, y is a descriptor, and a tile goes to `outs`, from where it is stored while the next is begun.
    """
    COUNT: gl.constexpr = K // STEP // CHUNKS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    slot = 0
    phase = 0
    before = STAGES - 1
    for index in range(gl.program_id(0), gl.cdiv(n, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
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
        row, token = place(index, n, tokens, ROWS, TOKENS, GROUP)
        if STAGED:
            tma.store_wait(pendings=0)
            gl.thread_barrier()  # the tile before has left, as those know that sent it
            outs.permute((1, 0)).store(narrowed(total, y.dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y, [token, row], outs)
        else:
            store(total, y, row, token, n, tokens, stride, ROWS, TOKENS, layout)
    if STAGED:
        tma.store_wait(pendings=0)


@gluon.jit
def load_tiles(w, x, weights, columns, ready, empty, n, tokens, K: gl.constexpr, ROWS: gl.constexpr,
               TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """The part of the warp that asks for operands."""
    slot = 0
    phase = 1  # nothing has to be read before the first round
    for index in range(gl.program_id(0), gl.cdiv(n, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
        row, token = place(index, n, tokens, ROWS, TOKENS, GROUP)
        for step in range(K // STEP):
            mbarrier.wait(empty.index(slot), phase)
            ask(w, x, step, row, token, ready.index(slot), weights.index(slot), columns.index(slot), True)
            slot, phase = following(slot, phase, STAGES)


@gluon.jit
def apart(w, x, y, n, tokens, stride, K: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
          TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr,
          STAGED: gl.constexpr):  # fmt: skip
    """As `product`. Programs: as many as there are multiprocessors, at most."""
    gl.static_assert(K % (STEP * CHUNKS) == 0 and gl.num_warps() == WARPS)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, STEP], w.layout)
    columns = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    if STAGED:
        outs = gl.allocate_shared_memory(y.dtype, [TOKENS, ROWS], y.layout)
    else:
        outs = columns
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (weights, columns, ready, empty, outs, y, n, tokens, stride, K, CHUNKS, ROWS, TOKENS, STAGES,
                 GROUP, WARPS, STAGED),
            ),
            (
                load_tiles,
                (w, x, weights, columns, ready, empty, n, tokens, K, ROWS, TOKENS, STAGES, GROUP),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def spread(values, like):
    """A value a sub-block, for all of its columns."""
    wide, _ = gl.broadcast(gl.expand_dims(values, 2), like)
    return wide


@gluon.jit
def packed_at(row, n, ROWS: gl.constexpr, rows_layout: gl.constexpr):
    """Each row's tile of 64, and its place there."""
    rows = gl.arange(0, ROWS, rows_layout)
    tile = gl.minimum(row // 64 + rows // 64, (n + 63) // 64 - 1)
    return tile, rows % 64


@gluon.constexpr_function
def plane_text(P):
    return (_LOW if P % 2 == 0 else _HIGH).value.replace("UP", str(8 * (P // 2)))


@gluon.jit
def q4_columns(words, first, upper, factor, sub, P: gl.constexpr):
    """Plane P of Q4_K's step of a block: two sub-blocks of 32 columns a row. [ROWS, 2, 32]

    `first`: the word with low nibbles of the plane's scales and minimums, see `quant.gpu_layout`.
    """
    TEXT: gl.constexpr = plane_text(P)
    codes = gl.inline_asm_elementwise(TEXT, _OUT1_IN1, [words], dtype=gl.float16, is_pure=True, pack=2)
    nibbles = (first >> (4 * (2 * P % 4 + sub))) & 0x000F000F
    if P == 0:
        top = (upper << 4) >> (2 * sub)
    else:
        top = upper >> (4 * P - 4 + 2 * sub)
    bits = nibbles | (top & 0x00300030)
    pair = packed_product(bits, 0, factor, False)
    return gl.inline_asm_elementwise(
        _LESS,
        _OUT1_IN3,
        [codes, spread(low_half(pair), words), spread(high_half(pair), words)],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def q6_columns(planes, words, first, factor, sub, P: gl.constexpr):
    """Plane P of Q6_K's step of half a block: two sub-blocks of 16 columns a row. [ROWS, 2, 16]"""
    bits = (first >> (8 * (P % 2 * 2 + sub))) & 0xFF
    scale = low_half(packed_product(bits, 128, twice(factor), False))
    return gl.inline_asm_elementwise(
        _TIMES, _OUT1_IN2, [planes[P], spread(scale, words)], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def hand_over(values, slot, phase, x, token, column, weights, columns, ready, empty, ROWS: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """Weights of 64 columns, and ask for the activations that go with them."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(ready.index(slot), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [token, column], ready.index(slot), columns.index(slot))
    weights.index(slot).store(gl.reshape(values, (ROWS, STEP)))
    fence_async_shared()
    gl.thread_barrier()  # of all warps: one of them says for all that it is written
    mbarrier.arrive(ready.index(slot), count=1)
    return following(slot, phase, STAGES)


@gluon.jit
def make_q4_tiles(w, h, s, shifts, x, weights, columns, ready, empty, n, tokens, K: gl.constexpr,
                  ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
                  MAKERS: gl.constexpr):  # fmt: skip
    """The part of the warps that make weights, of Q4_K."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 2, 4], [MAKERS, 1, 1], [2, 1, 0])
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    STEPS: gl.constexpr = K // 256
    word = gl.expand_dims(
        gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1
    )
    of_two = gl.arange(0, 2, gl.SliceLayout(0, pairs))
    sub = gl.expand_dims(of_two, 0)
    slot = 0
    phase = 1
    for index in range(gl.program_id(0), gl.cdiv(n, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
        first_row, token = place(index, n, tokens, ROWS, TOKENS, GROUP)
        tile, row = packed_at(first_row, n, ROWS, gl.SliceLayout(1, pairs))
        begin = gl.expand_dims(tile * STEPS * 4096 + row * 64, 1) + sub * 32
        wp = w + (gl.expand_dims(begin, 2) + word)
        sp = s + (gl.expand_dims(tile * STEPS * 256 + row, 1) + sub * 0)
        words = gl.load(wp)
        for step in range(STEPS):
            s0 = gl.load(sp)
            s1 = gl.load(sp + 64)
            upper = gl.load(sp + 128)
            factor = gl.load(sp + 192)
            wp += gl.where(step + 1 < STEPS, 4096, 0)
            following_words = gl.load(wp)  # on their way while these are made
            for p in gl.static_range(4):
                values = q4_columns(words, s0 if p < 2 else s1, upper, factor, sub, p)
                slot, phase = hand_over(values, slot, phase, x, token, step * 256 + p * 64, weights, columns,
                                        ready, empty, ROWS, STAGES)  # fmt: skip
            words = following_words
            sp += 256


@gluon.jit
def make_q6_tiles(w, h, s, shifts, x, weights, columns, ready, empty, n, tokens, K: gl.constexpr,
                  ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
                  MAKERS: gl.constexpr):  # fmt: skip
    """Likewise, of Q6_K in steps of half a block."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 2, 2], [MAKERS, 1, 1], [2, 1, 0])
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    STEPS: gl.constexpr = K // 128
    word = gl.expand_dims(
        gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1
    )
    of_two = gl.arange(0, 2, gl.SliceLayout(0, pairs))
    sub = gl.expand_dims(of_two, 0)
    slot = 0
    phase = 1
    for index in range(gl.program_id(0), gl.cdiv(n, ROWS) * gl.cdiv(tokens, TOKENS), gl.num_programs(0)):
        first_row, token = place(index, n, tokens, ROWS, TOKENS, GROUP)
        tile, row = packed_at(first_row, n, ROWS, gl.SliceLayout(1, pairs))
        begin = gl.expand_dims(tile * STEPS * 2048 + row * 32, 1) + sub * 16
        wp = w + (gl.expand_dims(begin, 2) + word)
        begin = gl.expand_dims(tile * STEPS * 1024 + row // 2 * 32, 1) + sub * 16
        hp = h + (gl.expand_dims(begin, 2) + word)
        sp = s + (gl.expand_dims(tile * (STEPS // 2) * 288 + row, 1) + sub * 0)
        lp = s + (gl.expand_dims(tile * (STEPS // 2) * 288 + 256 + row // 2, 1) + sub * 0)
        up = gl.expand_dims((row % 2 * 16).to(gl.uint32), 1)
        shift = gl.expand_dims(gl.expand_dims((row % 2 * 2).to(gl.uint16), 1), 2)
        words = gl.load(wp)
        high = gl.load(hp)
        for step in range(STEPS):
            wp += gl.where(step + 1 < STEPS, 2048, 0)
            hp += gl.where(step + 1 < STEPS, 1024, 0)
            following_words = gl.load(wp)  # on their way while these are made
            following_high = gl.load(hp)
            part = step % 2
            s0 = gl.load(sp + part * 128)
            s1 = gl.load(sp + part * 128 + 64)
            factor = gl.load(lp) >> up
            far, _ = gl.broadcast(shift, words)
            planes = four_planes(words, high, far, 2, 32, False)
            for p in gl.static_range(2):
                first = s0 if p == 0 else s1
                a = q6_columns(planes, words, first, factor, sub, 2 * p)
                b = q6_columns(planes, words, first, factor, sub, 2 * p + 1)
                both = gl.permute(gl.join(a, b), (0, 3, 1, 2))
                slot, phase = hand_over(both, slot, phase, x, token, step * 128 + p * 64, weights, columns,
                                        ready, empty, ROWS, STAGES)  # fmt: skip
            words = following_words
            high = following_high
            sp += part * 288
            lp += part * 288


@gluon.jit
def fused(w, h, s, shifts, x, y, n, tokens, stride, K: gl.constexpr, FORMAT: gl.constexpr,
          CHUNKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
          GROUP: gl.constexpr, WARPS: gl.constexpr, STAGED: gl.constexpr, MAKERS: gl.constexpr,
          REGISTERS: gl.constexpr):  # fmt: skip
    """As `apart`, of packed weights. MAKERS warps with so many REGISTERS make operands of them."""
    gl.static_assert(K % (256 * CHUNKS) == 0 and gl.num_warps() == WARPS)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, STEP], weights_layout)
    columns = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2)  # the makers, and what they asked for
        mbarrier.init(empty.index(i), count=1)
    gl.static_assert(FORMAT == "Q4_K" or FORMAT == "Q6_K")
    if STAGED:
        outs = gl.allocate_shared_memory(y.dtype, [TOKENS, ROWS], y.layout)
    else:
        outs = columns
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (weights, columns, ready, empty, outs, y, n, tokens, stride, K, CHUNKS, ROWS, TOKENS, STAGES,
                 GROUP, WARPS, STAGED),
            ),
            (
                make_q4_tiles if FORMAT == "Q4_K" else make_q6_tiles,
                (w, h, s, shifts, x, weights, columns, ready, empty, n, tokens, K, ROWS, TOKENS, STAGES,
                 GROUP, MAKERS),
            ),
        ],
        [MAKERS],
        [REGISTERS],
    )  # fmt: skip
