"""
Matrix products of one token, whose weights go from memory to registers.

Device code (Gluon, which says where each element lies). What a product of few bytes takes is not its bytes
but what waits for what. So a program asks for weights while the kernel before still runs, and reads them just
as tensor cores want them: none of them sees shared memory. A warp has a chunk of sixteen rows, and a program
all chunks of its rows, whose sums meet in shared memory. They are those of `linear.linear` bit for bit, on a
GPU of capability 9.0, where that was checked: what a tensor core adds up at once is a set of sixteen columns,
whose order, like that of rows, changes nothing, so neighbouring rows and columns can be what a thread loads
at once.

A step's columns are cut into cells, of one plane and with one scale a row. Shapes begin with a dimension for
chunks, C: the next power of two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from worker_orcd.kernels.cuda.cache_type import KEY_SCALE
from worker_orcd.kernels.cuda.dequantise import four_planes, two_planes
from worker_orcd.kernels.cuda.elementwise import applied, rounded
from worker_orcd.kernels.cuda.formats import half, high_half, low_half, packed_product, six_bits, twice
from worker_orcd.kernels.cuda.fp8 import stored
from worker_orcd.kernels.cuda.overlap import release, wait

_KEYS = gl.constexpr(KEY_SCALE)
_TIMES = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")
_OUT1_IN2 = gl.constexpr("=r,r,r")
_LESS = gl.constexpr("{ .reg .b32 m; neg.f16x2 m, $3; fma.rn.f16x2 $0, $1, $2, m; }")
_OUT1_IN3 = gl.constexpr("=r,r,r,r")
TOKENS = gl.constexpr(8)  # what a tensor core multiplies at least; one of them counts


@gluon.constexpr_function
def words_layout(C, ROWS, SUB):
    """Of [C, ROWS / 2, 2, SUB] words: two rows and four words of every sixteen a thread."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0]] + ([[0, 0, 0, 16]] if SUB == 32 else [])
    lanes = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    warps = [[0, 8 << i, 0, 0] for i in range((ROWS // 16).bit_length() - 1)]
    warps += [[1 << i, 0, 0, 0] for i in range(C.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [C, ROWS // 2, 2, SUB])


@gluon.constexpr_function
def columns_layout(C, ROWS, SUB):
    """Of [C, TOKENS, SUB] activations: four of every sixteen a thread, the same for all warps of a chunk."""
    registers = [[0, 0, 1], [0, 0, 2]] + ([[0, 0, 16]] if SUB == 32 else [])
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 0, 0]] * ((ROWS // 16).bit_length() - 1)
    warps += [[1 << i, 0, 0] for i in range(C.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [C, 8, SUB])


@gluon.constexpr_function
def cell_width(FORMAT, WIDTH):
    return 16 if FORMAT == "Q6_K" else min(WIDTH, 32)


@gluon.constexpr_function
def power_of_two(count):
    return 1 << (count - 1).bit_length()


@gluon.jit
def operand(cell, C: gl.constexpr, ROWS: gl.constexpr, SUB: gl.constexpr, mma: gl.constexpr):
    """Weights as they were loaded, as what a tensor core multiplies: nothing moves."""
    parts = gl.reshape(cell, (C, ROWS // 16, 8, 2, SUB // 16, 4, 2, 2))
    parts = gl.permute(parts, (0, 1, 3, 2, 4, 6, 5, 7))
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    return gl.convert_layout(gl.reshape(parts, (C, ROWS, SUB)), layout, assert_trivial=True)


@gluon.jit
def activations(x, C: gl.constexpr, ROWS: gl.constexpr, SUB: gl.constexpr, mma: gl.constexpr):
    """A cell's columns of the token, from shared memory, likewise: a tensor core has them TOKENS times."""
    columns: gl.constexpr = columns_layout(C, ROWS, SUB)
    values = gl.expand_dims(x.load(gl.SliceLayout(1, columns)), 1)
    values, _ = gl.broadcast(values, gl.full((C, TOKENS, SUB), 0.0, x.dtype, columns))
    parts = gl.permute(gl.reshape(values, (C, TOKENS, SUB // 16, 4, 2, 2)), (0, 2, 4, 3, 5, 1))
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    return gl.convert_layout(gl.reshape(parts, (C, SUB, TOKENS)), layout, assert_trivial=True)


@gluon.jit
def load_step(wp, hp, sp, lp, live, AT: gl.constexpr, WIDTH: gl.constexpr, SUB: gl.constexpr,
              HIGH: gl.constexpr, SHARE: gl.constexpr, HEADER: gl.constexpr, PARTS: gl.constexpr,
              MASKED: gl.constexpr):  # fmt: skip
    """The AT-th step's words, high words and header words, cell by cell. A header is for PARTS steps."""
    OWN: gl.constexpr = HEADER // 4 // PARTS
    wp += AT * (64 * WIDTH)
    hp += AT * (64 // SHARE * WIDTH)
    sp += AT // PARTS * (16 * HEADER) + AT % PARTS * (OWN * 64)
    lp += AT // PARTS * (16 * HEADER)
    words = ()
    highs = ()
    heads = ()
    for i in gl.static_range(OWN):
        heads = heads + (loaded(sp + i * 64, live, MASKED),)
    if HEADER % 4:
        heads = heads + (loaded(lp, live, MASKED),)
    for j in gl.static_range(WIDTH // SUB):
        words = words + (loaded(wp + j * SUB, live, MASKED),)
        if HIGH:
            highs = highs + (loaded(hp + j * SUB, live, MASKED),)
    return words, highs, heads


@gluon.jit
def loaded(pointers, live, MASKED: gl.constexpr):
    """What `pointers`, whose first dimension is chunks, point to, of those that are `live`."""
    if MASKED:
        RANK: gl.constexpr = len(pointers.shape)
        layout: gl.constexpr = pointers.type.layout
        if RANK == 4:
            of: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
            mask = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.convert_layout(live, of), 1), 2), 3)
        elif RANK == 3:
            of: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
            mask = gl.expand_dims(gl.expand_dims(gl.convert_layout(live, of), 1), 2)
        else:
            of: gl.constexpr = gl.SliceLayout(1, layout)
            mask = gl.expand_dims(gl.convert_layout(live, of), 1)
        mask, _ = gl.broadcast(mask, gl.full(pointers.shape, 0, gl.int32, layout))
        return gl.load(pointers, mask=mask, other=0)
    else:
        return gl.load(pointers)


@gluon.jit
def spread(values, like):
    """A value a row, for all of its columns."""
    wide, _ = gl.broadcast(gl.expand_dims(values, 3), like)
    return wide


@gluon.jit
def times(codes, scales):
    return gl.inline_asm_elementwise(
        _TIMES, _OUT1_IN2, [codes, spread(scales, codes)], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def codes_of(words, high, shift, FORMAT: gl.constexpr):
    """The planes of a cell's words, less the code of zero."""
    if FORMAT == "Q8_0":
        return two_planes(words, False)
    elif FORMAT == "Q4_0":
        return four_planes(words, words, words, 0, 8, False)
    elif FORMAT == "Q4_K":
        return four_planes(words, words, words, 0, 0, False)
    else:
        both, _ = gl.broadcast(gl.expand_dims(high, 2), words)
        up = spread(shift, words)
        if FORMAT == "Q5_0":
            return four_planes(words, both, up, 1, 16, False)
        elif FORMAT == "Q5_K":
            return four_planes(words, both, up, 1, 0, False)
        else:
            gl.static_assert(FORMAT == "Q6_K")
            return four_planes(words, both, up, 2, 32, False)


@gluon.jit
def weights_of(codes, heads, last, AT: gl.constexpr, FORMAT: gl.constexpr):
    """A cell of weights, which begins at column AT of its step. `last`: see `multiply`."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        sub: gl.constexpr = AT // 32
        pair = packed_product(six_bits(heads[sub // 4], heads[2], sub), 0, heads[3], False)
        return gl.inline_asm_elementwise(
            _LESS, _OUT1_IN3, [codes, spread(low_half(pair), codes), spread(high_half(pair), codes)],
            dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif FORMAT == "Q6_K":
        word: gl.constexpr = AT // 64
        pair = packed_product((heads[word] >> (AT // 16 % 2 * 8)) & 0x00FF00FF, 128, twice(last), False)
        if AT // 16 % 4 < 2:
            return times(codes, low_half(pair))
        else:
            return times(codes, high_half(pair))
    else:
        return times(codes, half(heads, AT // 32))


@gluon.jit
def multiply(acc, weights, x, shift, up, AT: gl.constexpr, FORMAT: gl.constexpr, PLANES: gl.constexpr,
             WIDTH: gl.constexpr, SUB: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr,
             mma: gl.constexpr):  # fmt: skip
    """The sums and a step of weights times columns AT … of x, plane by plane, as `formats.multiply`."""
    words, highs, heads = weights
    last = heads[len(heads) - 1]
    if FORMAT == "Q6_K":  # a word for two rows
        last, _ = gl.broadcast(gl.expand_dims(last, 2), heads[0])
        last = last >> up
    codes = ()
    for j in gl.static_range(WIDTH // SUB):
        codes = codes + (codes_of(words[j], highs[j] if len(highs) > 0 else words[j], shift, FORMAT),)
    for p in gl.static_range(PLANES):
        for j in gl.static_range(WIDTH // SUB):
            cell = weights_of(codes[j][p], heads, last, p * WIDTH + j * SUB, FORMAT)
            part = activations(x.slice(AT + p * WIDTH + j * SUB, SUB, 1), C, ROWS, SUB, mma)
            acc = mma_v2(operand(cell, C, ROWS, SUB, mma), part, acc)
    return acc


@gluon.jit
def halves(total, flat: gl.constexpr, ROWS: gl.constexpr):
    """As `linear.halves`. [ROWS / 2] each"""
    low, high = gl.split(gl.permute(gl.reshape(total, (ROWS // 16, 2, 8)), (0, 2, 1)))
    low = gl.convert_layout(gl.reshape(low, (ROWS // 2,)), flat)
    return low, gl.convert_layout(gl.reshape(high, (ROWS // 2,)), flat)


@gluon.jit
def store_heads(low, high, q, cos, sin, place, values, column_of, n, cache, HEAD: gl.constexpr,
                HEADS: gl.constexpr, KV_HEADS: gl.constexpr, CACHE_BLOCK: gl.constexpr,
                ROTATED: gl.constexpr):  # fmt: skip
    """As `linear.store_heads`, of one token, whose angles and place in the cache have been read."""
    HALF: gl.constexpr = HEAD // 2
    head = column_of // HALF
    column = column_of % HALF
    live = column_of < n // 2
    if ROTATED:
        turned = live & (head < HEADS + KV_HEADS)
        rotated = gl.where(turned, low * cos - high * sin, low)
        high = gl.where(turned, high * cos + low * sin, high)
        low = rotated
    is_q = live & (head < HEADS)
    to = q + (head * HEAD + column)
    gl.store(to, rounded(low, q), mask=is_q)
    gl.store(to + HALF, rounded(high, q), mask=is_q)
    is_v = head >= HEADS + KV_HEADS
    kv_head = gl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    to = cache + place + (kv_head * (CACHE_BLOCK * HEAD) + column + gl.where(is_v, values, 0))
    is_kv = live & (head >= HEADS)
    scale = gl.where(is_v, 1.0, _KEYS)
    gl.store(to, stored(low, cache, scale), mask=is_kv)
    gl.store(to + HALF, stored(high, cache, scale), mask=is_kv)


@gluon.jit
def stream(w, h, s, shifts, x, y, partials, counters, bias, residual, n, tokens, stride, cache, positions,
           slots, table, values, K: gl.constexpr,
           FORMAT: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, CHUNKS: gl.constexpr,
           PLANES: gl.constexpr, HIGH: gl.constexpr, SHARE: gl.constexpr, HEADER: gl.constexpr,
           ROWS: gl.constexpr, AHEAD: gl.constexpr, PAIRED: gl.constexpr, GLU: gl.constexpr,
           BIAS: gl.constexpr, RESIDUAL: gl.constexpr, HEAD: gl.constexpr, HEADS: gl.constexpr,
           KV_HEADS: gl.constexpr, CACHE_BLOCK: gl.constexpr, ROTATED: gl.constexpr,
           OVERLAP: gl.constexpr):  # fmt: skip
    """As `linear.linear`, of one token. Programs: row tiles. Of a chunk's steps AHEAD are on their way."""
    C: gl.constexpr = power_of_two(CHUNKS)
    WARPS: gl.constexpr = C * ROWS // 16
    WIDTH: gl.constexpr = STEP // PLANES
    SUB: gl.constexpr = cell_width(FORMAT, WIDTH)
    STEPS: gl.constexpr = K // STEP
    COUNT: gl.constexpr = STEPS // CHUNKS
    PARTS: gl.constexpr = BLOCK // STEP if BLOCK > STEP else 1
    MASKED: gl.constexpr = C > CHUNKS
    gl.static_assert(K % STEP == 0 and (PARTS == 1 or FORMAT == "Q6_K"))
    gl.static_assert(AHEAD <= COUNT and COUNT % PARTS == 0)
    gl.static_assert(64 % ROWS == 0 and gl.num_warps() == WARPS)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C, ROWS // 16, 1], [1, 16, 8])
    layout: gl.constexpr = words_layout(C, ROWS, SUB)
    no_word: gl.constexpr = gl.SliceLayout(3, layout)
    no_row: gl.constexpr = gl.SliceLayout(2, layout)
    of_chunk: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, no_word))
    flat: gl.constexpr = gl.BlockedLayout([16 if GLU != "" or HEADS > 0 else 1], [32], [WARPS], [0])

    # Weights: where a thread's are. Neighbouring rows share a high word, and the last header word.
    pn = gl.program_id(0)
    chunk = gl.arange(0, C, of_chunk)
    live = chunk < CHUNKS
    tile = (pn * ROWS // 64).to(gl.int64)
    pair = pn * ROWS % 64 // 2 + gl.arange(0, ROWS // 2, gl.SliceLayout(0, gl.SliceLayout(2, no_word)))
    two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, no_word)))
    row = gl.expand_dims(gl.expand_dims(pair * 2, 0), 2) + gl.expand_dims(gl.expand_dims(two, 0), 1)
    word = gl.arange(0, SUB, gl.SliceLayout(0, gl.SliceLayout(1, no_row)))
    begin = gl.expand_dims(gl.expand_dims(chunk * COUNT, 1), 2)
    words_at = gl.expand_dims(begin * (64 * WIDTH) + row * WIDTH, 3)
    high_word: gl.constexpr = gl.SliceLayout(2, no_row)
    word_at = gl.expand_dims(gl.expand_dims(word, 0), 1)
    wp = w + tile * (STEPS * 64 * WIDTH) + (words_at + gl.expand_dims(word_at, 2))
    two_at = gl.convert_layout(chunk, gl.SliceLayout(1, high_word), assert_trivial=True)
    of_two = gl.convert_layout(pair, gl.SliceLayout(0, high_word), assert_trivial=True)
    high_at = gl.expand_dims(two_at * (COUNT * (64 // SHARE * WIDTH)), 1) + gl.expand_dims(
        of_two * 2 // SHARE * WIDTH, 0
    )
    hp = h + tile * (STEPS * (64 // SHARE) * WIDTH) + (gl.expand_dims(high_at, 2) + word_at)
    base = s + tile * (STEPS // PARTS * 16 * HEADER)
    sp = base + (begin // PARTS * (16 * HEADER) + row)
    last_at = chunk * (COUNT // PARTS * (16 * HEADER)) + HEADER // 4 * 64
    lp = base + (gl.expand_dims(last_at, 1) + gl.expand_dims(pair, 0))
    shift = (row % SHARE * HIGH).to(gl.uint16)
    up = (row % 2 * 16).to(gl.uint32)
    steps = ()
    for i in gl.static_range(AHEAD):
        steps = steps + (load_step(wp, hp, sp, lp, live, i, WIDTH, SUB, HIGH, SHARE, HEADER, PARTS, MASKED),)
    out = pn * ROWS + gl.arange(0, ROWS, flat)
    if BIAS:
        added = gl.load(bias + out, mask=out < n, other=0.0)

    # What other kernels have written: activations, and what the sum's end wants.
    wait(OVERLAP)
    LONG: gl.constexpr = power_of_two(COUNT * STEP)
    line: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    xs = gl.allocate_shared_memory(x.dtype.element_ty, [C, LONG], shared)
    of = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, line)), 1)
    column = gl.expand_dims(gl.arange(0, LONG, gl.SliceLayout(0, line)), 0)
    there = (of < CHUNKS) & (column < COUNT * STEP)
    async_copy.async_copy_global_to_shared(xs, x + (of * (COUNT * STEP) + column), mask=there)
    async_copy.commit_group()
    half_of = pn * (ROWS // 2) + gl.arange(0, ROWS // 2, flat)
    column_of = out
    if PAIRED:
        column_of = out // 8 % 2 * (n // 2) + out // 16 * 8 + out % 8
    elif HEAD:
        column_of = out // HEAD * HEAD + out // 8 % 2 * (HEAD // 2) + out % HEAD // 16 * 8 + out % 8
    if RESIDUAL:
        before = gl.load(residual + column_of, mask=out < n, other=0.0)
    if HEADS > 0:
        slot = gl.load(slots)
        place = (slot // CACHE_BLOCK).to(gl.int64) * (KV_HEADS * CACHE_BLOCK * HEAD)
        place += slot % CACHE_BLOCK * HEAD
        cos = half_of
        sin = half_of
        if ROTATED:
            position = gl.load(positions).to(gl.int64)
            angle = table + position * HEAD + half_of % (HEAD // 2)
            turned = half_of // (HEAD // 2) < HEADS + KV_HEADS
            cos = gl.load(angle, mask=turned, other=1.0)
            sin = gl.load(angle + HEAD // 2, mask=turned, other=0.0)
    async_copy.wait_group(0)
    gl.thread_barrier()

    acc = gl.full((C, ROWS, TOKENS), 0.0, gl.float32, mma)
    for i in gl.static_range(COUNT):
        acc = multiply(acc, steps[i], xs, shift, up, i * STEP, FORMAT, PLANES, WIDTH, SUB, C, ROWS, mma)
        if i + AHEAD < COUNT:
            steps = steps + (
                load_step(wp, hp, sp, lp, live, i + AHEAD, WIDTH, SUB, HIGH, SHARE, HEADER, PARTS, MASKED),
            )
    release(OVERLAP)

    # One of the columns counts. A tensor core's rows are the even ones of sixteen, then the odd ones.
    of_token: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, mma))
    first = gl.expand_dims(gl.expand_dims(gl.arange(0, TOKENS, of_token) == 0, 0), 1)
    sums = gl.sum(gl.where(first, acc, 0.0), 2)
    sums = gl.permute(gl.reshape(sums, (C, ROWS // 16, 2, 8)), (0, 1, 3, 2))
    if CHUNKS == 1:
        total = gl.convert_layout(gl.reshape(sums, (ROWS,)), flat)
    else:
        parts = gl.allocate_shared_memory(gl.float32, [C, ROWS], shared)
        parts.store(gl.reshape(sums, (C, ROWS)))
        gl.thread_barrier()
        parts = parts._reinterpret(gl.float32, [C, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        total = gl.full((ROWS,), 0.0, gl.float32, flat)
        for i in gl.static_range(CHUNKS):
            total += parts.index(i).load(flat)
    if BIAS:
        total += added
    if HEADS > 0:
        low, high = halves(total, flat, ROWS)
        store_heads(low, high, y, cos, sin, place, values, half_of, n, cache, HEAD, HEADS, KV_HEADS,
                    CACHE_BLOCK, ROTATED)  # fmt: skip
    elif GLU != "":
        gate, up_to = halves(total, flat, ROWS)
        gl.store(y + half_of, rounded(applied(gate, up_to, 0.0, GLU), y), mask=half_of < n // 2)
    else:
        if RESIDUAL:
            total += before
        gl.store(y + column_of, rounded(total, y), mask=out < n)
