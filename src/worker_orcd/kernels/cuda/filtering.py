"""
What top-k, top-p and min-p leave of a row and the draw among it, and the most likely tokens.

Device code (Triton). Sorted by falling logit and then rising id, what each filter keeps is a beginning of
the row, and so is what all keep: the tokens above a last logit, and of those equal to it the first ids.
Nothing is sorted to find it. Logits stand as integers in the same order, `key_of`, and a bound is narrowed by
adding up the weights (integers: see `sampling`), or the number, of what is above it.

* `find_floor` has only the highest logit and the weight of each group: a logit that surely is low enough.
* `collect` lists what is above it, in any order.
* `choose` has a list of a few thousand in registers: the end of what is kept, and the draw. Where the list
  has no room for all, see `cutting`.
* `list_top` takes the most likely tokens out of a list, for log probabilities (RAW).
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda import draw_slab as slab
from worker_orcd.kernels.cuda.sampling import (
    CHUNK,
    FILTERED,
    FLAGS,
    GROUP,
    GROUPS,
    INF,
    LOGPROBS,
    LOWEST,
    MIN_X,
    NO_NUMBERS,
    OK,
    ONE,
    RAW_SCALE,
    SCALE,
    exponent,
    finite,
    fixed,
    keeps,
    key_of,
    power,
    uniform,
    value_of,
)
from worker_orcd.sequence import MAX_LOGPROBS

TOP_K = tl.constexpr(int(slab.Int.TOP_K))
NUM_TOP = tl.constexpr(int(slab.Int.NUM_TOP))
TOP_P = tl.constexpr(int(slab.Real.TOP_P))
MAX_TOP = tl.constexpr(MAX_LOGPROBS)
TILE = tl.constexpr(1024)  # logits read at a time where few of a chunk are wanted
LIMITS = tl.constexpr(slab.LIMITS)
ROUNDS = tl.constexpr(slab.ROUNDS)

NOTHING = tl.constexpr(0x7FFFFFFF)  # above the key of infinity
NEVER = tl.constexpr(-(1 << 62))  # below all pairs of key and id


@triton.jit
def find_floor(ints, reals, chunk_max, group_max, group_sum, floors, counts, highs, masses,
               more_counts, sums, VOCAB: tl.constexpr, ROWS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
               RAW: tl.constexpr):  # fmt: skip
    """Programs: (rows). A key that all that is wanted reaches, the highest logit and the sum of weights.

    Any of these will do: as many groups as top-k keeps have their highest above it; what is below weighs
    less than top-p drops; min-p drops what is below. But top-p counts on all that top-k leaves.
    """
    row = tl.program_id(0)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & (LOGPROBS if RAW else FILTERED)) == 0:
        return
    group = tl.arange(0, CHUNKS_PADDED * GROUPS)
    mask = group < CHUNKS * GROUPS
    tops = tl.load(group_max + row * CHUNKS * GROUPS + group, mask=mask, other=-INF)
    of_chunk = tl.load(chunk_max + row * CHUNKS + group // GROUPS, mask=mask, other=-INF)
    highest = tl.max(tops, 0)
    tl.store(highs + row, highest)
    tl.store(counts + row, 0)
    tl.store(floors + row, NOTHING)
    if not RAW:
        tl.store(more_counts + row, 0)
        place = tl.arange(0, ROUNDS * LIMITS)
        tl.store(sums + row * ROUNDS * LIMITS + place, tl.zeros((ROUNDS * LIMITS,), tl.int64))
    if finite(highest) == 0:
        return
    scale = tl.load(reals + (RAW_SCALE if RAW else SCALE) * ROWS + row)
    of_group = tl.load(group_sum + row * CHUNKS * GROUPS + group, mask=mask, other=0).to(tl.float64)
    mass = of_group * power(exponent(of_chunk, highest, scale))
    total = tl.sum(mass, 0)
    tl.store(masses + row, total)
    if RAW:
        top_k = tl.maximum(tl.load(ints + NUM_TOP * ROWS + row), 1)
        top_p = 1.0
        min_x = -INF
    else:
        top_k = tl.load(ints + TOP_K * ROWS + row)
        top_p = tl.load(reals + TOP_P * ROWS + row)
        min_x = tl.load(reals + MIN_X * ROWS + row)
    dropped = (1.0 - top_p) * total - 1e-7 * total  # more than rounding can take away
    tl.store(floors + row, floor_of(tops, mass, highest, scale, top_k, top_p, min_x, dropped, RAW))


@triton.jit
def floor_of(tops, mass, highest, scale, top_k, top_p, min_x, dropped, RAW: tl.constexpr):
    """From each group's highest and weight, and the weight that may be dropped."""
    by_k = top_k > 0
    by_p = (top_k == 0) & (top_p < 1.0)
    by_min = (min_x > -INF) & ((top_k == 0) | (top_p >= 1.0))
    # Of each group, beside its highest.
    rest = tl.maximum(mass - ONE * power(exponent(tops, highest, scale)), 0.0)
    keys = key_of(tops)
    low = tl.full((), LOWEST, tl.int64)
    high = key_of(highest).to(tl.int64)
    for _ in range(16):  # to a hundredth of the logit; lists are a little longer for it
        middle = low + (high - low + 1) // 2
        key = middle.to(tl.int32)
        x = exponent(value_of(key), highest, scale)
        safe = by_k & (tl.sum((keys >= key).to(tl.int32), 0) >= top_k)
        if not RAW:
            most = tl.minimum(rest, (GROUP - 1) * (ONE * power(x) + 1.0))
            safe |= by_p & (tl.sum(tl.where(keys < key, mass, most), 0) <= dropped)
            safe |= by_min & (x < min_x)
        high = tl.where(safe, high, tl.maximum(middle - 1, low))
        low = tl.where(safe, middle, low)
    return low.to(tl.int32)


@triton.jit
def collect(logits, ints, chunk_max, group_max, floors, counts, values, ids, stride, VOCAB: tl.constexpr,
            ROWS: tl.constexpr, CAPACITY: tl.constexpr, RAW: tl.constexpr):  # fmt: skip
    """Programs: (chunks, rows). Lists what reaches the floor; `counts` goes on where a list is full."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & (LOGPROBS if RAW else FILTERED)) == 0:
        return
    floor = tl.load(floors + row)
    if key_of(tl.load(chunk_max + row * CHUNKS + chunk)) < floor:
        return
    append(logits + row.to(tl.int64) * stride, chunk, group_max + (row * CHUNKS + chunk) * GROUPS, floor,
           NOTHING, counts + row, values + row * CAPACITY, ids + row * CAPACITY, VOCAB, CAPACITY)  # fmt: skip


@triton.jit
def append(line, chunk, tops, low, high, count, values, ids, VOCAB: tl.constexpr, CAPACITY: tl.constexpr):
    """List what of a chunk has a key of at least `low` and below `high`."""
    for part in range(0, CHUNK, TILE):
        group = part // GROUP + tl.arange(0, TILE // GROUP)
        if key_of(tl.max(tl.load(tops + group), 0)) >= low:
            at = chunk * CHUNK + part + tl.arange(0, TILE)
            value = tl.load(line + at, mask=at < VOCAB, other=-INF)
            key = key_of(value)
            wanted = (at < VOCAB) & (key >= low) & (key < high)
            rank = tl.cumsum(wanted.to(tl.int32), 0)
            before = tl.atomic_add(count, tl.max(rank, 0), sem="relaxed")
            place = before + rank - 1
            mask = wanted & (place < CAPACITY)
            tl.store(values + place, value, mask=mask)
            tl.store(ids + place, at, mask=mask)


# -- lists in registers ------------------------------------------------------------------------------------


@triton.jit
def last_key(key, amount, goal, low, high):
    """The highest key with at least `goal` of `amount` at or above it, and how much is above it."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum(tl.where(key >= middle.to(tl.int32), amount, 0), 0) >= goal
        high = tl.where(enough, high, middle - 1)
        low = tl.where(enough, middle, low)
    return low.to(tl.int32), tl.sum(tl.where(key > low.to(tl.int32), amount, 0), 0)


@triton.jit
def first_id(token, amount, goal, VOCAB: tl.constexpr):
    """The lowest id up to which there is at least `goal` of `amount`; VOCAB - 1 if there is less."""
    low = goal.to(tl.int32) * 0
    high = low + (VOCAB - 1)
    while low < high:
        middle = (low + high) // 2
        enough = tl.sum(tl.where(token <= middle, amount, 0), 0) >= goal
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def choose(ints, reals, floors, counts, highs, masses, values, ids, tokens, statuses, VOCAB: tl.constexpr,
           ROWS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (rows). The token of each filtered row whose list is complete."""
    row = tl.program_id(0)
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & FILTERED) == 0:
        return
    highest = tl.load(highs + row)
    is_finite = finite(highest)
    tl.store(statuses + row, tl.where(is_finite, OK, NO_NUMBERS))
    if is_finite == 0:
        tl.store(tokens + row, 0)
        return
    count = tl.load(counts + row)
    if count > CAPACITY:
        return
    scale = tl.load(reals + SCALE * ROWS + row)
    top_k = tl.load(ints + TOP_K * ROWS + row).to(tl.int32)
    top_p = tl.load(reals + TOP_P * ROWS + row)
    min_x = tl.load(reals + MIN_X * ROWS + row)
    mass = tl.load(masses + row)
    low = tl.load(floors + row)
    high = key_of(highest)
    slot = tl.arange(0, CAPACITY)
    there = slot < count
    value = tl.load(values + row * CAPACITY + slot, mask=there, other=-INF)
    token = tl.load(ids + row * CAPACITY + slot, mask=there, other=VOCAB)
    key = tl.where(there, key_of(value), LOWEST - 1)
    x = exponent(value, highest, scale)
    weight = tl.where(there, fixed(power(x)), 0)
    end = tl.full((), LOWEST, tl.int32)
    last = tl.full((), VOCAB, tl.int32)
    if top_k > 0:
        end, above = last_key(key, there.to(tl.int32), tl.minimum(top_k, count), low, high)
        last = first_id(token, (key == end).to(tl.int32), tl.minimum(top_k, count) - above, VOCAB)
        mass = tl.sum(tl.where(keeps(key, token, end, last), weight, 0), 0).to(tl.float64)
    if top_p < 1.0:
        goal = tl.maximum(tl.ceil(top_p * mass).to(tl.int64), 1)
        goal = tl.minimum(goal, tl.sum(weight, 0))
        end, above = last_key(key, weight, goal, low, high)
        last = first_id(token, (key == end).to(tl.int32), ties_kept(end, highest, scale, goal - above), VOCAB)
    weight = tl.where(keeps(key, token, end, last) & (x >= min_x), weight, 0)
    total = tl.sum(weight, 0)
    target = tl.minimum((uniform(ints, row, ROWS) * total.to(tl.float64)).to(tl.int64), total - 1)
    tl.store(tokens + row, first_id(token, weight, target + 1, VOCAB))


@triton.jit
def ties_kept(key, highest, scale, goal):
    """How many tokens of a logit weigh `goal`."""
    each = tl.maximum(fixed(power(exponent(value_of(key), highest, scale))), 1)
    return tl.minimum((goal + each - 1) // each, 0x7FFFFFFF).to(tl.int32)


# -- log probabilities -------------------------------------------------------------------------------------


@triton.jit
def pair_of(value, token):
    """One int64 of a logit and an id, in the order of what is more likely."""
    return (key_of(value).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def list_top(logits, ints, counts, values, ids, top_ids, top_logits, stride, VOCAB: tl.constexpr,
             ROWS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (rows). The NUM_TOP tokens of highest logit, highest first, of equal ones the lower id."""
    row = tl.program_id(0)
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & LOGPROBS) == 0:
        return
    wanted = tl.load(ints + NUM_TOP * ROWS + row)
    count = tl.load(counts + row)
    line = logits + row.to(tl.int64) * stride
    slot = tl.arange(0, CAPACITY)
    there = slot < count
    value = tl.load(values + row * CAPACITY + slot, mask=there, other=0.0)
    token = tl.load(ids + row * CAPACITY + slot, mask=there, other=0)
    pair = tl.where(there, pair_of(value, token), NEVER)
    before = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    place = wanted * 0
    wanted = tl.where(count > 0, wanted, 0)
    while place < wanted:
        best = pair
        if count > CAPACITY:
            best = tl.full((CAPACITY,), NEVER, tl.int64)
            for first in range(0, VOCAB, CAPACITY):
                at = first + slot
                value = tl.load(line + at, mask=at < VOCAB, other=0.0)
                other = tl.where(at < VOCAB, pair_of(value, at), NEVER)
                best = tl.maximum(best, tl.where(other < before, other, NEVER))
        before = tl.max(tl.where(best < before, best, NEVER), 0)
        tl.store(top_ids + row * MAX_TOP + place, 0x7FFFFFFF - (before & 0x7FFFFFFF).to(tl.int32))
        tl.store(top_logits + row * MAX_TOP + place, value_of(before >> 32))
        place += 1
