"""
Attention of a step: every query over its row's keys in the paged cache, prompts and single tokens alike.

Device code (Triton). Keys come in tiles of 64 and tiles in splits, both at absolute positions
(`split_start`). A softmax starts afresh in each split; splits are merged in ascending order by one formula
(`merge`). A tile of which a query sees nothing changes nothing for it, bit for bit. So what is computed for a
query depends on its position alone, whoever computes it:

* `plan`, once a step, cuts its rows into units: a tile of queries over all that they see or over some splits.
* `attend` has a fixed number of programs, which take the units in turn, for each group of heads. A unit of
  all splits merges them in registers. Others leave each split in memory; the program that finishes last
  merges what all have left. Who that is changes nothing. Counters return to zero.

A tile's rows are queries times the heads that share keys. Sums over keys are matrix products too, with ones:
their order is the instruction's, whatever the tile. No product is left to the compiler to fuse with a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.fp8 import decoded
from worker_orcd.kernels.cuda.overlap import wait

KEYS = tl.constexpr(64)  # of a tile
TURNS = tl.constexpr(8)
RECORD = tl.constexpr(16)  # integers a unit; the first one holds their number
NEVER = tl.constexpr(-1e30)  # the maximum of no scores
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_start(split):
    """The position of a split's first key. Splits are 128 long at first, up to 2048 further on."""
    near = tl.maximum(split * 128, split * 256 - 1024)
    far = tl.maximum(split * 512 - 6144, split * 1024 - 28672)
    return tl.maximum(tl.maximum(near, far), split * 2048 - 122880)


@triton.jit
def split_of(position):
    """The split of a key: `split_start` is convex, so its inverse is the least of the inverses."""
    near = tl.minimum(position // 128, (position + 1024) // 256)
    far = tl.minimum((position + 6144) // 512, (position + 28672) // 1024)
    return tl.minimum(tl.minimum(near, far), (position + 122880) // 2048)


# -- the work of a step ------------------------------------------------------------------------------------


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """The tile of the first key that a query sees."""
    if WINDOW > 0:
        return tl.maximum(position - (WINDOW - 1), 0) // KEYS
    else:
        return position * 0


@triton.jit
def plan(query_start, context_lens, work, rows, programs, LANES: tl.constexpr, QUERIES: tl.constexpr,
         WINDOW: tl.constexpr, CAPACITY: tl.constexpr, START: tl.constexpr, SPLITTING: tl.constexpr,
         MAX_ROWS: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr = 0):  # fmt: skip
    """Programs: rows. Writes the units of each row to `work`, the last queries of a row first.

    A row is cut into as many units as are done soonest: of the numbers that leave all programs about equally
    many units, once to TURNS times, the best one, if a unit begins in the time of START tiles of keys, and
    that of a cut row takes SPLITTING more. It stays whole if there is no room for what its parts would leave.
    """
    wait(OVERLAP)
    row = tl.program_id(0)
    every = tl.arange(0, MAX_ROWS)
    start = tl.load(query_start + every, mask=every < rows, other=0)
    tokens = tl.load(query_start + every + 1, mask=every < rows, other=0) - start
    context = tl.load(context_lens + every, mask=every < rows, other=0)
    query_tiles = (tokens + QUERIES - 1) // QUERIES
    end = (context + KEYS - 1) // KEYS
    last_query = tl.maximum(context - tokens + (query_tiles - 1) * QUERIES, 0)
    longest = tl.where(tokens > 0, end - first_seen(last_query, WINDOW), 0)
    splits = split_of((end - 1) * KEYS) - split_of(first_seen(context - tokens, WINDOW) * KEYS) + 1
    splits = tl.where(tokens > 0, splits, 1)
    share = tl.sum(query_tiles.to(tl.int64) * longest).to(tl.float32) * LANES / programs  # tiles, a program
    share = tl.maximum(share, 0.001)
    length = tl.maximum(longest, 1).to(tl.float32)
    cuts = tl.full((MAX_ROWS,), 1.0, tl.float32)
    least = tl.full((MAX_ROWS,), float("inf"), tl.float32)
    for turns in tl.static_range(1, TURNS + 1):
        some = tl.minimum(tl.maximum(tl.floor(turns * length / share), 1.0), splits.to(tl.float32))
        most = tl.ceil(share * some / length - 0.001)  # units of a program
        cost = most * (START + length / some) + tl.where(some > 1.0, SPLITTING, 0.0)
        cuts = tl.where(cost < least, some, cuts)
        least = tl.minimum(cost, least)
    pieces = cuts.to(tl.int32)
    run = (splits + pieces - 1) // pieces
    need = tl.where((tokens > 0) & (run < splits), splits * tokens, 0)
    taken = tl.cumsum(need, 0)
    run = tl.where((need > 0) & (taken <= CAPACITY), run, splits)
    runs = (splits + run - 1) // run
    units = tl.where(tokens > 0, query_tiles * runs, 0)
    if row == 0:
        tl.store(work, tl.sum(units))
    mine = every == row
    count = tl.sum(tl.where(mine, units, 0))
    to = work + RECORD + tl.sum(tl.where(every < row, units, 0)) * RECORD
    first_token, row_tokens = tl.sum(tl.where(mine, start, 0)), tl.sum(tl.where(mine, tokens, 0))
    row_splits, row_run = tl.sum(tl.where(mine, splits, 0)), tl.sum(tl.where(mine, run, 0))
    row_runs, row_tiles = tl.sum(tl.where(mine, runs, 0)), tl.sum(tl.where(mine, query_tiles, 0))
    first_position = tl.sum(tl.where(mine, context, 0)) - row_tokens
    base = tl.sum(tl.where(mine, taken - need, 0))
    for begin in range(0, count, CHUNK):
        unit = begin + tl.arange(0, CHUNK)
        query = (row_tiles - 1 - unit // row_runs) * QUERIES
        here = tl.minimum(row_tokens - query, QUERIES)
        position = first_position + query
        first = first_seen(position, WINDOW)
        last = (position + here - 1) // KEYS + 1
        own = split_of(first * KEYS)
        own_splits = split_of((last - 1) * KEYS) - own + 1
        number = (own_splits + row_run - 1) // row_run
        split = unit % row_runs * row_run
        begins = split_start(own + split) // KEYS
        ends = split_start(own + split + row_run) // KEYS
        last = tl.minimum(last, tl.where(number > 1, ends, last))
        # The other queries of the row may see more: then nothing is left for this one.
        first = tl.where(split < own_splits, tl.maximum(first, begins), last)
        record = to + unit * RECORD
        mask = unit < count
        tl.store(record, first_token + query, mask=mask)
        tl.store(record + 1, here, mask=mask)
        tl.store(record + 2, position, mask=mask)
        tl.store(record + 3, unit * 0 + row, mask=mask)
        tl.store(record + 4, first, mask=mask)
        tl.store(record + 5, last, mask=mask)
        tl.store(record + 6, number, mask=mask)
        tl.store(record + 7, split, mask=mask)
        tl.store(record + 8, own_splits, mask=mask)
        tl.store(record + 9, base + query * row_splits, mask=mask)


# -- the softmax of a split, and of all ---------------------------------------------------------------------


@triton.jit
def merge(TOP, SUM, ACC0, ACC1, top, sums, acc0, acc1, D1: tl.constexpr):
    """All splits so far, and the next one. A split of which a row sees nothing changes nothing."""
    higher = tl.maximum(TOP, top)
    x = tl.exp2(TOP - higher)
    y = tl.exp2(top - higher)
    SUM = tl.fma(SUM, x, sums * y)
    ACC0 = tl.fma(ACC0, x[:, None], acc0 * y[:, None])
    if D1 > 0:
        ACC1 = tl.fma(ACC1, x[:, None], acc1 * y[:, None])
    return higher, SUM, ACC0, ACC1


@triton.jit
def within(rows, column, COLUMNS: tl.constexpr, ALL: tl.constexpr):
    """The mask of `rows`, (n, 1), where a `column` of ALL is one of the COLUMNS that there are."""
    if COLUMNS < ALL:
        return rows & (column < COLUMNS)[None, :]
    else:
        return rows


@triton.jit
def finish(out, sinks, token, head, live, TOP, SUM, ACC0, ACC1, column, HEADS: tl.constexpr, D: tl.constexpr,
           V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """Divides by the sum and writes. No zero is negative: whether one was may depend on the tile."""
    if SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0)
        SUM += tl.exp2(tl.fma(sink, LOG2_E, -TOP))
    over = (1.0 / SUM)[:, None]
    to = out + ((token * HEADS + head) * D + column)[:, None]
    v0 = tl.arange(0, V0)
    there = within(live[:, None], v0, V, V0 + V1)
    tl.store(to + v0[None, :], tl.fma(ACC0, over, 0.0).to(out.dtype.element_ty), mask=there)
    if V1 > 0:
        to1 = to + (V0 + tl.arange(0, V1))[None, :]
        tl.store(to1, tl.fma(ACC1, over, 0.0).to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def combine(parts, sums, out, sinks, base, splits, token, tokens, first_head, heads, part,
            HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
            V1: tl.constexpr, VALUE_PARTS: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
            AT_ONCE: tl.constexpr):  # fmt: skip
    """Merges what the programs of all `splits` have left: ROWS rows at a time, AT_ONCE splits loaded."""
    for begin in range(0, tokens * GROUP, ROWS):
        row = begin + tl.arange(0, ROWS)
        query = row // GROUP
        live = (query < tokens) & (row % GROUP < heads)
        head = first_head + row % GROUP
        TOP = tl.full((ROWS,), NEVER, tl.float32)
        SUM = tl.zeros((ROWS,), tl.float32)
        ACC0 = tl.zeros((ROWS, V0), tl.float32)
        ACC1 = ACC0
        if V1 > 0:
            ACC1 = tl.zeros((ROWS, V1), tl.float32)
        at = ((base + query) * HEADS + head) * VALUE_PARTS + part
        step = tokens * (HEADS * VALUE_PARTS)
        for split in range(0, splits, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                there = at + (split + i) * step
                mask = live & (split + i < splits)
                # Not from L1, which may hold an older step's.
                top = tl.load(sums + there * 2, mask=mask, other=NEVER, cache_modifier=".cg")
                some = tl.load(sums + there * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
                from0 = parts + there[:, None] * (V0 + V1) + tl.arange(0, V0)[None, :]
                acc0 = tl.load(from0, mask=mask[:, None], other=0.0, cache_modifier=".cg")
                acc1 = acc0
                if V1 > 0:
                    from1 = parts + there[:, None] * (V0 + V1) + (V0 + tl.arange(0, V1))[None, :]
                    acc1 = tl.load(from1, mask=mask[:, None], other=0.0, cache_modifier=".cg")
                TOP, SUM, ACC0, ACC1 = merge(TOP, SUM, ACC0, ACC1, top, some, acc0, acc1, V1)
        finish(out, sinks, token + query, head, live, TOP, SUM, ACC0, ACC1, part * V, HEADS, D, V, V0, V1,
               SINKS)  # fmt: skip


@triton.jit
def leave(parts, sums, slot, live, top, some, acc0, acc1, V0: tl.constexpr, V1: tl.constexpr):
    """Writes a split for `combine`. `slot`: of each row."""
    tl.store(sums + slot * 2, top, mask=live)
    tl.store(sums + slot * 2 + 1, some, mask=live)
    to = parts + slot[:, None] * (V0 + V1)
    tl.store(to + tl.arange(0, V0)[None, :], acc0, mask=live[:, None])
    if V1 > 0:
        tl.store(to + (V0 + tl.arange(0, V1))[None, :], acc1, mask=live[:, None])


@triton.jit
def paged(tile, BLOCK_SIZE: tl.constexpr):
    """Of each key of a tile: the entry of the block table, and the place in its block."""
    key = tl.arange(0, KEYS)
    if KEYS % BLOCK_SIZE == 0:
        return tile * (KEYS // BLOCK_SIZE) + key // BLOCK_SIZE, key % BLOCK_SIZE
    elif BLOCK_SIZE // KEYS * KEYS == BLOCK_SIZE:
        return tile // (BLOCK_SIZE // KEYS) + key * 0, tile * KEYS % BLOCK_SIZE + key
    else:
        return (tile * KEYS + key) // BLOCK_SIZE, (tile * KEYS + key) % BLOCK_SIZE


# -- attention ---------------------------------------------------------------------------------------------


@triton.jit
def attend_unit(q, cache, table, record, sinks, out, parts, sums, counters, lane, scale, values, block_stride,
                q_stride, table_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
                D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
                V1: tl.constexpr, VALUE_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                WINDOW: tl.constexpr, SINKS: tl.constexpr, NATIVE: tl.constexpr, MERGED: tl.constexpr,
                AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One unit, for the heads of `lane`. What it is does not wait for the kernel before."""
    GROUP: tl.constexpr = (HEADS // KV_HEADS + HEAD_TILES - 1) // HEAD_TILES  # heads of a tile
    LANES: tl.constexpr = KV_HEADS * HEAD_TILES * VALUE_PARTS
    dtype: tl.constexpr = q.dtype.element_ty
    token = tl.load(record, cache_modifier=".cg")
    tokens = tl.load(record + 1, cache_modifier=".cg")
    position = tl.load(record + 2, cache_modifier=".cg")
    cache_row = tl.load(record + 3, cache_modifier=".cg")
    first = tl.load(record + 4, cache_modifier=".cg")
    last = tl.load(record + 5, cache_modifier=".cg")
    number = tl.load(record + 6, cache_modifier=".cg")  # of units that have these queries
    split = tl.load(record + 7, cache_modifier=".cg")  # this unit's first
    splits = tl.load(record + 8, cache_modifier=".cg")
    base = tl.load(record + 9, cache_modifier=".cg")

    part = lane % VALUE_PARTS
    head_tile = lane // VALUE_PARTS % HEAD_TILES
    kv_head = lane // (VALUE_PARTS * HEAD_TILES)
    first_head = kv_head * (HEADS // KV_HEADS) + head_tile * GROUP
    heads = tl.minimum(GROUP, HEADS // KV_HEADS - head_tile * GROUP)
    row = tl.arange(0, ROWS)
    query = row // GROUP
    head = first_head + row % GROUP
    live = (query < tokens) & (row % GROUP < heads)
    seen = position + query  # and all before

    d0 = tl.arange(0, D0)
    d1 = tl.arange(0, D1 if D1 > 0 else 16)
    v0 = tl.arange(0, V0)
    v1 = tl.arange(0, V1 if V1 > 0 else 16)
    qp = q + ((token + query) * q_stride + head * D)[:, None]
    kp = cache + kv_head * (BLOCK_SIZE * D)
    vp = kp + values + part * V
    table += cache_row * table_stride
    end = position + tokens
    # A tile ahead: keys are requested without waiting for where they are.
    entry, _ = paged(first, BLOCK_SIZE)
    block = tl.load(
        table + entry, mask=first * KEYS + tl.arange(0, KEYS) < end, other=0, cache_modifier=".cg"
    )
    wait(OVERLAP)
    q0 = tl.load(qp + d0[None, :], mask=within(live[:, None], d0, D, D0 + D1), other=0.0)
    q1 = q0
    if D1 > 0:
        q1 = tl.load(qp + D0 + d1[None, :], mask=live[:, None], other=0.0)

    ones = tl.full((KEYS, 16), 1.0, dtype)
    factor = scale * LOG2_E
    while first < last:  # once for all splits that are merged here, or once for each that is left in memory
        border = split_start(split_of(first * KEYS) + 1) // KEYS
        stop = last
        if number > 1:
            stop = tl.minimum(last, border)
        TOP = tl.full((ROWS,), NEVER, tl.float32)
        SUM = tl.zeros((ROWS,), tl.float32)
        ACC0 = tl.zeros((ROWS, V0), tl.float32)
        ACC1 = ACC0
        top = TOP
        acc0 = ACC0
        acc1 = ACC0
        if V1 > 0:
            ACC1 = tl.zeros((ROWS, V1), tl.float32)
            acc1 = ACC1
        some = tl.zeros((ROWS, 16), tl.float32)
        for tile in range(first, stop):  # in the kernel's stages
            if tile == border:
                TOP, SUM, ACC0, ACC1 = merge(TOP, SUM, ACC0, ACC1, top, tl.max(some, 1), acc0, acc1, V1)
                top = tl.full((ROWS,), NEVER, tl.float32)
                some = tl.zeros((ROWS, 16), tl.float32)
                acc0 = tl.zeros((ROWS, V0), tl.float32)
                if V1 > 0:
                    acc1 = tl.zeros((ROWS, V1), tl.float32)
                else:
                    acc1 = acc0
                border = split_start(split_of(tile * KEYS) + 1) // KEYS
            key = tile * KEYS + tl.arange(0, KEYS)
            there = (key < end)[:, None]
            if WINDOW > 0:  # before it blocks may be anybody's: what is there may not be numbers
                there = there & (key > position - WINDOW)[:, None]
            _, place = paged(tile, BLOCK_SIZE)
            at = (block.to(tl.int64) * block_stride + place * D)[:, None]
            entry, _ = paged(tile + 1, BLOCK_SIZE)
            block = tl.load(table + entry, mask=key + KEYS < end, other=0)
            column = within(there, d0, D, D0 + D1)
            k0 = decoded(tl.load(kp + at + d0[None, :], mask=column, other=0.0), dtype, NATIVE)
            s = tl.dot(q0, tl.trans(k0))
            if D1 > 0:
                k1 = decoded(tl.load(kp + at + D0 + d1[None, :], mask=there, other=0.0), dtype, NATIVE)
                s = tl.dot(q1, tl.trans(k1), s)
            hidden = tile * KEYS + (KEYS - 1) > position
            if WINDOW > 0:
                hidden = hidden | (tile * KEYS <= end - 1 - WINDOW)
            if hidden:
                visible = key[None, :] <= seen[:, None]
                if WINDOW > 0:
                    visible = visible & (key[None, :] > seen[:, None] - WINDOW)
                s = tl.where(visible, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * factor)
            old = tl.exp2(top - higher)[:, None]
            p = tl.exp2(tl.fma(s, factor, -higher[:, None])).to(dtype)
            some = tl.dot(p, ones, some * old)
            column = within(there, v0, V, V0 + V1)
            w0 = decoded(tl.load(vp + at + v0[None, :], mask=column, other=0.0), dtype, NATIVE)
            acc0 = tl.dot(p, w0, acc0 * old)
            if V1 > 0:
                w1 = decoded(tl.load(vp + at + V0 + v1[None, :], mask=there, other=0.0), dtype, NATIVE)
                acc1 = tl.dot(p, w1, acc1 * old)
            else:
                acc1 = acc0
            top = higher
        first = stop
        # Anew, from what the compiler does not know to be 0: registers are too few to keep it all meanwhile.
        row = tl.arange(0, ROWS) + (stop >> 30)
        query = row // GROUP
        head = first_head + row % GROUP
        live = (query < tokens) & (row % GROUP < heads)
        if number == 1:
            TOP, SUM, ACC0, ACC1 = merge(TOP, SUM, ACC0, ACC1, top, tl.max(some, 1), acc0, acc1, V1)
            finish(out, sinks, token + query, head, live, TOP, SUM, ACC0, ACC1, part * V, HEADS, D, V, V0, V1,
                   SINKS)  # fmt: skip
        else:
            slot = ((base + split * tokens + query) * HEADS + head) * VALUE_PARTS + part
            leave(parts, sums, slot, live, top, tl.max(some, 1), acc0, acc1, V0, V1)
            split += 1
            if first == last:
                tl.debug_barrier()  # all that this program leaves is written before it counts as finished
                counter = counters + base * LANES + lane
                if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1:
                    combine(parts, sums, out, sinks, base, splits, token, tokens, first_head, heads, part,
                            HEADS, GROUP, D, V, V0, V1, VALUE_PARTS, SINKS, MERGED, AT_ONCE)  # fmt: skip
                    tl.store(counter, 0)


@triton.jit
def attend(q, cache, table, work, sinks, out, parts, sums, counters, scale, values, block_stride, q_stride,
           table_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
           D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
           V1: tl.constexpr, VALUE_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
           WINDOW: tl.constexpr, SINKS: tl.constexpr, NATIVE: tl.constexpr, MERGED: tl.constexpr,
           AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr = 0):  # fmt: skip
    """Any number of programs. The queries have D columns, a program gives V of the values'.

    They are computed with as D0 + D1 and V0 + V1, which are as many; or more, zeros, and then in one piece.

    A cache of bytes holds e4m3 numbers (`fp8.decoded`); `scale` makes up for what keys were multiplied by.

    They take turns forth and back, so that the first, longest, units do not all fall to the same ones.
    """
    LANES: tl.constexpr = KV_HEADS * HEAD_TILES * VALUE_PARTS
    items = tl.load(work, cache_modifier=".cg") * LANES
    programs = tl.num_programs(0)
    turns = (items + programs - 1) // programs
    for turn in range(turns):
        place = tl.program_id(0)
        if turn % 2 == 1:
            place = programs - 1 - place
        item = turn * programs + place
        if item < items:
            record = work + RECORD + item // LANES * RECORD
            attend_unit(q, cache, table, record, sinks, out, parts, sums, counters, item % LANES, scale,
                        values, block_stride, q_stride, table_stride, HEADS, KV_HEADS, HEAD_TILES, D, D0, D1,
                        V, V0, V1, VALUE_PARTS, ROWS, BLOCK_SIZE, WINDOW, SINKS, NATIVE, MERGED, AT_ONCE,
                        OVERLAP)  # fmt: skip
    wait(OVERLAP)  # a kernel that had nothing to do must not end before those before it
