"""
Products with the matrices of experts in MXFP4, a program a pair: weights go from memory to registers.

Device code (Gluon, which says where each element lies). Each warp has sixteen rows, or 32, and reads their
words just as tensor cores want them, some steps ahead; activations lie in shared memory. The sums are those
of `experts.product` bit for bit, on a GPU of capability 9.0, where that was checked: what a tensor core adds
up at once is a set of sixteen columns, whose order, like that of rows, changes nothing, so neighbouring rows
and columns can be what a thread loads at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from worker_orcd.kernels.cuda.elementwise import applied, rounded
from worker_orcd.kernels.cuda.overlap import release, wait

_FLOATS = gl.constexpr("""{ .reg .b32 b, d, z; mov.b32 z, 0x80008000;
and.b32 $0, $4, 0x81c081c0; fma.rn.bf16x2 $0, $0, $5, z;
shl.b32 b, $4, 3; and.b32 $1, b, 0x81c081c0; fma.rn.bf16x2 $1, $1, $5, z;
shl.b32 b, $4, 6; and.b32 $2, b, 0x81c081c0; fma.rn.bf16x2 $2, $2, $6, z;
shl.b32 b, $4, 1; and.b32 d, b, 0x80008000; shr.u32 b, $4, 3; lop3.b32 d, b, 0x01800180, d, 0xEA;
shr.u32 b, $4, 7; lop3.b32 d, b, 0x00400040, d, 0xEA; fma.rn.bf16x2 $3, d, $6, z; }""")
_OUT4_IN3 = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
LONGEST = gl.constexpr(4096)  # columns; `expert_products` knows it too
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
def activations(x, TOKENS: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr):
    """Sixteen columns of one token, from shared memory, likewise: a tensor core has them TOKENS times."""
    columns: gl.constexpr = columns_layout(TOKENS, WARPS)
    values = gl.expand_dims(x.load(gl.SliceLayout(0, columns)), 0)
    values, _ = gl.broadcast(values, gl.full((TOKENS, 16), 0.0, gl.bfloat16, columns))
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
         mma: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """The sums and 64 columns of weights times activations, plane by plane."""
    first = scale(header, 0, ROWS, layout)
    second = scale(header, 8, ROWS, layout)
    a, b, c, d = gl.inline_asm_elementwise(
        _FLOATS, _OUT4_IN3, [words, first, second], dtype=_BF16x4, is_pure=True, pack=2
    )
    planes = (a, b, c, d)
    for p in gl.static_range(4):
        part = activations(x.slice(p * 16, 16, 0), TOKENS, WARPS, mma)
        acc = mma_v2(operand(planes[p], ROWS, mma), part, acc)
    return acc


@gluon.jit
def finish(total, y, bias, slot, n, pn, SLOTS: gl.constexpr, PAIRED: gl.constexpr, GLU: gl.constexpr,
           BIAS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, flat: gl.constexpr):  # fmt: skip
    """As `experts.finish`, of one pair; `y` is its token's. Rows of `total` are as tensor cores have them."""
    total = gl.permute(gl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 1, 3))
    total = gl.convert_layout(gl.reshape(total, (ROWS, TOKENS)), flat)
    out = pn * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    first = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, flat)) == 0, 0)
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
    target = y + slot * width + gl.expand_dims(column, 1)
    target, _ = gl.broadcast(target, value)
    gl.store(target, rounded(value, y), mask=gl.expand_dims(mask, 1) & first)


@gluon.jit
def stream(w, s, x, y, bias, experts, n, x_stride, y_stride, K: gl.constexpr, CHUNKS: gl.constexpr,
           ROWS: gl.constexpr, TOKENS: gl.constexpr, AHEAD: gl.constexpr, SLOTS: gl.constexpr,
           SHARED: gl.constexpr, PAIRED: gl.constexpr, GLU: gl.constexpr, BIAS: gl.constexpr,
           OVERLAP: gl.constexpr):  # fmt: skip
    """As `experts.product` without WIDTH and SPLIT: (row tiles of an expert, pairs). K is at most LONGEST.

    Steps are of 64 columns; AHEAD of them, which divides those of a chunk, are on their way at any time.
    TOKENS is what a tensor core multiplies at least: one of them counts. Where x is not SHARED, another
    kernel has read `experts` since they were written, so they are there before this one has waited.
    """
    WARPS: gl.constexpr = gl.num_warps()
    STEPS: gl.constexpr = K // 64
    COUNT: gl.constexpr = STEPS // CHUNKS
    gl.static_assert(K % 64 == 0 and K <= LONGEST and COUNT % AHEAD == 0 and ROWS % 64 == 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    layout: gl.constexpr = words_layout(ROWS, WARPS)
    of_pair: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    of_two: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    of_word: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, layout))
    flat: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [WARPS, 1], [0, 1])

    pn = gl.program_id(0)
    pair = gl.program_id(1)
    if SHARED:
        wait(OVERLAP)
    expert = gl.load(experts + pair, cache_modifier=".cg")

    # weights: where a thread's are
    rows = gl.arange(0, ROWS // 2, of_pair)
    half = gl.arange(0, 2, of_two)
    column = gl.arange(0, 16, of_word)
    tiles_of_rows = (n + 63) // 64
    of_tile = gl.minimum(pn * (ROWS // 64) + rows // 32, tiles_of_rows - 1)
    above = expert.to(gl.int64) * tiles_of_rows * STEPS
    at = of_tile * (STEPS * 1024) + rows % 32 * 32
    wp = (
        w
        + above * 1024
        + (
            gl.expand_dims(gl.expand_dims(at, 1), 2)
            + gl.expand_dims(gl.expand_dims(half * 16, 0), 2)
            + gl.expand_dims(gl.expand_dims(column, 0), 0)
        )
    )
    sp = s + above * 32 + (of_tile * (STEPS * 32) + rows % 32)
    words = ()
    headers = ()
    for i in gl.static_range(AHEAD):
        words = words + (gl.load(wp + i * 1024),)
        headers = headers + (gl.load(sp + i * 32),)

    # activations
    if not SHARED:
        wait(OVERLAP)
    line: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffer = gl.allocate_shared_memory(gl.bfloat16, [LONGEST], linear)
    index = gl.arange(0, LONGEST, line)
    row = x + pair // SLOTS * x_stride
    if not SHARED:
        row += pair % SLOTS * K
    async_copy.async_copy_global_to_shared(buffer, row + index, mask=index < K)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.thread_barrier()
    xs = buffer._reinterpret(gl.bfloat16, [LONGEST // 64, 64], linear)

    total = gl.full((ROWS, TOKENS), 0.0, gl.float32, mma)
    at_step = 0
    for _ in range(CHUNKS):
        acc = gl.full((ROWS, TOKENS), 0.0, gl.float32, mma)
        for _ in range(COUNT // AHEAD):
            later = ()
            later_headers = ()
            for i in gl.static_range(AHEAD):
                acc = step(acc, words[i], headers[i], xs.index(at_step + i), ROWS, TOKENS, WARPS, mma,
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
    release(OVERLAP)
    to = y + (pair // SLOTS * y_stride)
    finish(total, to, bias + expert * n, pair % SLOTS, n, pn, SLOTS, PAIRED, GLU, BIAS, ROWS, TOKENS, flat)
