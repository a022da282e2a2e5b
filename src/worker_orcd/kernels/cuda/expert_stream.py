"""
Products with the matrices of experts for a few tokens an expert, in MXFP4: weights go from memory to
registers.

Device code (Gluon, which says where each element lies). Each warp has sixteen rows, or 32, and reads their
words just as tensor cores want them, some steps ahead; activations lie in shared memory. The sums are those
of `experts.product` bit for bit: what a tensor core adds up at once is a set of sixteen columns, whose order,
like that of rows, changes nothing, so neighbouring rows and columns can be what a thread loads at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from worker_orcd.kernels.cuda.elementwise import applied, rounded

_FLOATS = gl.constexpr("""{ .reg .b32 b, d, z; mov.b32 z, 0x80008000;
and.b32 $0, $4, 0x81c081c0; fma.rn.bf16x2 $0, $0, $5, z;
shl.b32 b, $4, 3; and.b32 $1, b, 0x81c081c0; fma.rn.bf16x2 $1, $1, $5, z;
shl.b32 b, $4, 6; and.b32 $2, b, 0x81c081c0; fma.rn.bf16x2 $2, $2, $6, z;
shl.b32 b, $4, 1; and.b32 d, b, 0x80008000; shr.u32 b, $4, 3; lop3.b32 d, b, 0x01800180, d, 0xEA;
shr.u32 b, $4, 7; lop3.b32 d, b, 0x00400040, d, 0xEA; fma.rn.bf16x2 $3, d, $6, z; }""")
_OUT4_IN3 = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
_BF16x4 = gl.constexpr((gl.bfloat16,) * 4)


@gluon.constexpr_function
def words_layout(ROWS, WARPS):
    """Of [ROWS / 2, 2, 16] words: two rows and four words a thread."""
    warps, registers = [], [[0, 0, 1], [0, 0, 2], [0, 1, 0]]
    at = 8
    while at < ROWS // 2:
        (warps if at < 8 * WARPS else registers).append([at, 0, 0])
        at *= 2
    lanes = [[0, 0, 4], [0, 0, 8], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS // 2, 2, 16])


@gluon.constexpr_function
def columns_layout(TOKENS, WARPS):
    """Of [TOKENS, 16] activations: four a thread, the same for all warps."""
    registers, at = [[0, 1], [0, 2]], 8
    while at < TOKENS:
        registers.append([at, 0])
        at *= 2
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps, count = [], 1
    while count < WARPS:
        warps.append([0, 0])
        count *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [TOKENS, 16])


@gluon.jit
def operand(plane, ROWS: gl.constexpr, mma: gl.constexpr):
    """Weights as they were loaded, as what a tensor core multiplies: nothing moves."""
    parts = gl.reshape(plane, (ROWS // 16, 8, 2, 4, 2, 2))
    parts = gl.permute(parts, (0, 2, 1, 4, 3, 5))
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    return gl.convert_layout(gl.reshape(parts, (ROWS, 16)), layout, assert_trivial=True)


@gluon.jit
def activations(x, TOKENS: gl.constexpr, WARPS: gl.constexpr, ONE: gl.constexpr, mma: gl.constexpr):
    """Sixteen columns in shared memory, [tokens, 16], or [16] if there is ONE token, likewise."""
    columns: gl.constexpr = columns_layout(TOKENS, WARPS)
    if ONE:
        row = x.load(gl.SliceLayout(0, columns))
        values = gl.expand_dims(row, 0)
        values, _ = gl.broadcast(values, gl.full((TOKENS, 16), 0.0, gl.bfloat16, columns))
    else:
        values = x.load(columns)
    parts = gl.permute(gl.reshape(values, (TOKENS, 4, 2, 2)), (2, 1, 3, 0))
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    return gl.convert_layout(gl.reshape(parts, (16, TOKENS)), layout, assert_trivial=True)


@gluon.jit
def scale(header, SHIFT: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """The exponents at SHIFT of both rows as in `dequantise.power`. [ROWS / 2, 2, 16]"""
    two: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    up = gl.arange(0, 2, two) * 16 + SHIFT
    pairs = gl.expand_dims(header, 1) >> gl.expand_dims(up, 0).to(gl.uint32)
    bits = ((pairs & 0xFF) + 126) << 7
    power = gl.expand_dims(bits.to(gl.uint16).to(gl.bfloat16, bitcast=True), 2)
    power, _ = gl.broadcast(power, gl.full((ROWS // 2, 2, 16), 0.0, gl.bfloat16, layout))
    return power


@gluon.jit
def step(acc, words, header, x, ROWS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr,
         ONE: gl.constexpr, mma: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """The sums and 64 columns of weights times activations, plane by plane."""
    first = scale(header, 0, ROWS, layout)
    second = scale(header, 8, ROWS, layout)
    a, b, c, d = gl.inline_asm_elementwise(
        _FLOATS, _OUT4_IN3, [words, first, second], dtype=_BF16x4, is_pure=True, pack=2
    )
    planes = (a, b, c, d)
    for p in gl.static_range(4):
        part = activations(x.slice(p * 16, 16, 0 if ONE else 1), TOKENS, WARPS, ONE, mma)
        acc = mma_v2(operand(planes[p], ROWS, mma), part, acc)
    return acc


@gluon.jit
def finish(total, y, bias, pair, pair_mask, stride, n, pn, SLOTS: gl.constexpr, PAIRED: gl.constexpr,
           GLU: gl.constexpr, BIAS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr,
           flat: gl.constexpr):  # fmt: skip
    """As `experts.finish`. Rows of `total` are as tensor cores have them."""
    WARPS: gl.constexpr = gl.num_warps()
    total = gl.permute(gl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 1, 3))
    total = gl.convert_layout(gl.reshape(total, (ROWS, TOKENS)), flat)
    out = pn * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    if BIAS:
        total += gl.expand_dims(gl.load(bias + out, mask=out < n, other=0.0), 1)
    if GLU != "":
        halves = gl.permute(gl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
        gate, up = gl.split(halves)
        value = gl.reshape(applied(gate, up, 0.0, GLU), (ROWS // 2, TOKENS))
        value = gl.convert_layout(value, flat)
        column = pn * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, flat))
        width = n // 2
        mask = column < width
    else:
        value = total
        width = n
        mask = out < n
        column = out
        if PAIRED:
            width = n // 2
            column = out // 8 % 2 * (SLOTS * width) + out // 16 * 8 + out % 8
    at = pair // SLOTS * stride + pair % SLOTS * width
    target = y + gl.expand_dims(at, 0) + gl.expand_dims(column, 1)
    gl.store(target, rounded(value, y), mask=gl.expand_dims(mask, 1) & gl.expand_dims(pair_mask, 0))


@gluon.jit
def stream(w, s, x, y, bias, experts, order, tiles, n, pairs, x_stride, y_stride, K: gl.constexpr,
           CHUNKS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, AHEAD: gl.constexpr,
           SLOTS: gl.constexpr, SHARED: gl.constexpr, WIDTH: gl.constexpr, PAIRED: gl.constexpr,
           GLU: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """As `experts.product`; steps are of 64 columns, AHEAD of which are on their way at any time.

    AHEAD divides the steps of a chunk.
    """
    WARPS: gl.constexpr = gl.num_warps()
    STEPS: gl.constexpr = K // 64
    COUNT: gl.constexpr = STEPS // CHUNKS
    ONE: gl.constexpr = WIDTH == 0
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    layout: gl.constexpr = words_layout(ROWS, WARPS)
    of_pair: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    of_two: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    of_word: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, layout))
    flat: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [WARPS, 1], [0, 1])
    of_token: gl.constexpr = gl.SliceLayout(0, flat)

    pn = gl.program_id(0)
    place = gl.arange(0, TOKENS, of_token)
    if ONE:
        expert = gl.load(experts + gl.program_id(1))
        pair = gl.program_id(1) + place * 0
        left = 1
        first = 0
    else:
        tile = tiles + gl.program_id(1) // (WIDTH // TOKENS) * 4
        skipped = gl.program_id(1) % (WIDTH // TOKENS) * TOKENS
        left = gl.load(tile + 2) - skipped
        if left <= 0:
            return
        expert = gl.load(tile)
        first = gl.load(tile + 1) + skipped
        pair = gl.load(order + first + place, mask=place < left, other=0)

    # weights: where a thread's are
    rows = gl.arange(0, ROWS // 2, of_pair)
    half = gl.arange(0, 2, of_two)
    column = gl.arange(0, 16, of_word)
    tiles_of_rows = (n + 63) // 64
    of_tile = gl.minimum(pn * (ROWS // 64) + rows // 32, tiles_of_rows - 1)
    above = expert.to(gl.int64) * tiles_of_rows * STEPS
    at = of_tile * (STEPS * 1024) + rows % 32 * 32
    wp = w + above * 1024 + (
        gl.expand_dims(gl.expand_dims(at, 1), 2)
        + gl.expand_dims(gl.expand_dims(half * 16, 0), 2)
        + gl.expand_dims(gl.expand_dims(column, 0), 0)
    )
    sp = s + above * 32 + (of_tile * (STEPS * 32) + rows % 32)
    words = ()
    headers = ()
    for i in gl.static_range(AHEAD):
        words = words + (gl.load(wp + i * 1024),)
        headers = headers + (gl.load(sp + i * 32),)

    # activations
    if ONE:
        FLAT: gl.constexpr = 4096
        line: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
        linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        buffer = gl.allocate_shared_memory(gl.bfloat16, [FLAT], linear)
        index = gl.arange(0, FLAT, line)
        which = gl.program_id(1)
        row = x + which // SLOTS * x_stride
        if not SHARED:
            row += which % SLOTS * K
        async_copy.async_copy_global_to_shared(buffer, row + index, mask=index < K)
        xs = buffer._reinterpret(gl.bfloat16, [FLAT // 64, 64], linear)
    else:
        copied: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 4, [1, 0])
        xs = gl.allocate_shared_memory(gl.bfloat16, [STEPS, TOKENS, 64], swizzled)
        token = gl.arange(0, TOKENS, gl.SliceLayout(1, copied))
        there = gl.expand_dims(token < left, 1)
        entry = gl.load(order + first + token, mask=token < left, other=0)
        start = entry // SLOTS * x_stride
        if not SHARED:
            start += entry % SLOTS * K
        index = gl.arange(0, 64, gl.SliceLayout(0, copied))
        xp = x + (gl.expand_dims(start, 1) + gl.expand_dims(index, 0))
        there, _ = gl.broadcast(there, xp)
        for copied_step in range(STEPS):
            async_copy.async_copy_global_to_shared(xs.index(copied_step), xp, mask=there)
            xp += 64
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.thread_barrier()

    total = gl.full((ROWS, TOKENS), 0.0, gl.float32, mma)
    at_step = 0
    for _ in range(CHUNKS):
        acc = gl.full((ROWS, TOKENS), 0.0, gl.float32, mma)
        for _ in range(COUNT // AHEAD):
            later = ()
            later_headers = ()
            for i in gl.static_range(AHEAD):
                acc = step(acc, words[i], headers[i], xs.index(at_step + i), ROWS, TOKENS, WARPS, ONE, mma,
                           layout)  # fmt: skip
                more = at_step + AHEAD + i < STEPS
                later = later + (gl.load(wp + (AHEAD + i) * 1024, mask=more, other=0),)
                later_headers = later_headers + (gl.load(sp + (AHEAD + i) * 32, mask=more, other=0),)
            words = later
            headers = later_headers
            wp += AHEAD * 1024
            sp += AHEAD * 32
            at_step += AHEAD
        if CHUNKS == 1:
            total = acc
        else:
            total += acc
    finish(total, y, bias + expert * n, pair, place < left, y_stride, n, pn, SLOTS, PAIRED, GLU, BIAS, ROWS,
           TOKENS, flat)  # fmt: skip
