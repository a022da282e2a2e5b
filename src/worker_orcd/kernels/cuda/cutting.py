"""
Where a row's list in `filtering` has no room for all that may be kept: where what is kept ends.

Device code (Triton). Then `draw` draws, as from a row that is not filtered, from what is kept.

* `tally` adds up how much is above 16 limits; twice, the second time between two of the first. Which rows
  of a step need it is known on the device alone: few programs a row, which return at once for the others.
* `collect_between` lists what is between the two limits that the end is between; `cut` finds the end in it.
* `cut_long` reads the row again for each step: for what even this list has no room for (thousands of equal
  logits), and for a top-k of thousands together with top-p.
* `cut_stats` has the highest logit and the sum of weights of each chunk again, of what is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.filtering import (
    LIMITS,
    NOTHING,
    ROUNDS,
    TILE,
    TOP_K,
    TOP_P,
    append,
    first_id,
    last_key,
    ties_kept,
)
from worker_orcd.kernels.cuda.sampling import (
    CHUNK,
    FILTERED,
    FLAGS,
    GROUPS,
    INF,
    LOWEST,
    MIN_X,
    SCALE,
    exponent,
    fixed,
    keeps,
    key_of,
    only_kept,
    power,
    value_of,
)

OCTAVES = tl.constexpr(46.0)  # below this many a weight is 0
BRANCHES = tl.constexpr(8)  # bounds that `cut_long` tries in one reading of a row


@triton.jit
def is_long(ints, counts, row, ROWS: tl.constexpr, CAPACITY: tl.constexpr):
    """Whether a row is filtered and its list not complete."""
    filtered = (tl.load(ints + FLAGS * ROWS + row) & FILTERED) != 0
    return filtered & (tl.load(counts + row, mask=filtered, other=0) > CAPACITY)


@triton.jit
def goal_of(top_k, top_p, mass):
    """How many tokens, or how much weight, what is kept has at least."""
    weight = tl.maximum(tl.ceil(top_p * mass).to(tl.int64), 1)
    return tl.where(top_k > 0, top_k, weight)


@triton.jit
def bracket(limits, sums, row, goal, low, ROUND: tl.constexpr):
    """After some rounds: the end is at `low` or above and below `high`, and `base` is what is above that."""
    high = tl.full((), NOTHING, tl.int32)
    base = tl.full((), 0, tl.int64)
    for before in tl.static_range(ROUND):
        at = (row * ROUNDS + before) * LIMITS + tl.arange(0, LIMITS)
        limit = tl.load(limits + at)
        found = tl.load(sums + at)
        enough = found >= goal
        base = tl.maximum(base, tl.max(tl.where(enough, 0, found), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, limit), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, limit, low), 0))
    return low, high, base


@triton.jit
def tally(logits, ints, reals, chunk_max, floors, counts, highs, masses, limits, sums, stride,
          VOCAB: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """Programs: (any number, rows). Of the rows with a long list and one filter that counts or weighs."""
    part = tl.program_id(0)
    row = tl.program_id(1)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    if is_long(ints, counts, row, ROWS, CAPACITY) == 0:
        return
    top_k = tl.load(ints + TOP_K * ROWS + row)
    top_p = tl.load(reals + TOP_P * ROWS + row)
    if (top_k > 0) == (top_p < 1.0):
        return
    highest = tl.load(highs + row)
    scale = tl.load(reals + SCALE * ROWS + row)
    goal = goal_of(top_k, top_p, tl.load(masses + row))
    low, high, _ = bracket(limits, sums, row, goal, tl.load(floors + row), ROUND)
    place = tl.arange(0, LIMITS)
    bottom = tl.maximum(value_of(low), highest - (1.0 / scale * OCTAVES).to(tl.float32))
    top = tl.where(high == NOTHING, highest, value_of(high))
    limit = tl.maximum(key_of(bottom + (top - bottom) * (place.to(tl.float32) / LIMITS)), low)
    at = (row * ROUNDS + ROUND) * LIMITS + place
    if part == 0:
        tl.store(limits + at, limit)
    total = tl.zeros((LIMITS,), dtype=tl.int64)
    chunk = part
    while chunk < CHUNKS:
        if key_of(tl.load(chunk_max + row * CHUNKS + chunk)) >= low:
            here = chunk * CHUNK + tl.arange(0, CHUNK)
            value = tl.load(logits + row.to(tl.int64) * stride + here, mask=here < VOCAB, other=-INF)
            key = tl.where(here < VOCAB, key_of(value), LOWEST - 1)
            if top_k > 0:
                amount = tl.full((CHUNK,), 1, tl.int64)
            else:
                amount = fixed(power(exponent(value, highest, scale)))
            for i in range(LIMITS):
                bound = tl.sum(tl.where(place == i, limit, 0), 0)
                total += tl.where(place == i, tl.sum(tl.where(key >= bound, amount, 0), 0), 0)
        chunk += tl.num_programs(0)
    tl.atomic_add(sums + at, total, sem="relaxed")


@triton.jit
def collect_between(logits, ints, reals, chunk_max, group_max, floors, counts, masses, limits, sums,
                    more_counts, values, ids, stride, VOCAB: tl.constexpr, ROWS: tl.constexpr,
                    CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (any number, rows). Lists what the end is among, after both rounds."""
    row = tl.program_id(1)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    if is_long(ints, counts, row, ROWS, CAPACITY) == 0:
        return
    top_k = tl.load(ints + TOP_K * ROWS + row)
    top_p = tl.load(reals + TOP_P * ROWS + row)
    if (top_k > 0) == (top_p < 1.0):
        return
    goal = goal_of(top_k, top_p, tl.load(masses + row))
    low, high, _ = bracket(limits, sums, row, goal, tl.load(floors + row), ROUNDS)
    line = logits + row.to(tl.int64) * stride
    chunk = tl.program_id(0)
    while chunk < CHUNKS:
        if key_of(tl.load(chunk_max + row * CHUNKS + chunk)) >= low:
            append(line, chunk, group_max + (row * CHUNKS + chunk) * GROUPS, low, high, more_counts + row,
                   values + row * CAPACITY, ids + row * CAPACITY, VOCAB, CAPACITY)  # fmt: skip
        chunk += tl.num_programs(0)


@triton.jit
def cut(ints, reals, floors, counts, highs, masses, limits, sums, more_counts, values, ids, ends, lasts,
        VOCAB: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (rows). The key and the id of the last token that is kept, but for min-p."""
    row = tl.program_id(0)
    if is_long(ints, counts, row, ROWS, CAPACITY) == 0:
        return
    tl.store(ends + row, LOWEST)
    tl.store(lasts + row, VOCAB)
    top_k = tl.load(ints + TOP_K * ROWS + row)
    top_p = tl.load(reals + TOP_P * ROWS + row)
    if (top_k > 0) == (top_p < 1.0):
        return
    count = tl.load(more_counts + row)
    if count > CAPACITY:
        return
    highest = tl.load(highs + row)
    scale = tl.load(reals + SCALE * ROWS + row)
    goal = goal_of(top_k, top_p, tl.load(masses + row))
    low, high, base = bracket(limits, sums, row, goal, tl.load(floors + row), ROUNDS)
    slot = tl.arange(0, CAPACITY)
    there = slot < count
    value = tl.load(values + row * CAPACITY + slot, mask=there, other=-INF)
    token = tl.load(ids + row * CAPACITY + slot, mask=there, other=VOCAB)
    key = tl.where(there, key_of(value), LOWEST - 1)
    weight = fixed(power(exponent(value, highest, scale)))
    amount = tl.where(there, tl.where(top_k > 0, 1, weight), 0)
    goal = tl.minimum(goal - base, tl.sum(amount, 0))
    end, above = last_key(key, amount, goal, low, high - 1)
    number = tl.where(top_k > 0, (goal - above).to(tl.int32), ties_kept(end, highest, scale, goal - above))
    tl.store(ends + row, end)
    tl.store(lasts + row, first_id(token, (key == end).to(tl.int32), number, VOCAB))


# -- whole rows --------------------------------------------------------------------------------------------


@triton.jit
def last_key_of_row(line, highest, scale, goal, VOCAB: tl.constexpr, WEIGHTS: tl.constexpr):
    """As `last_key`, over a whole row."""
    low = tl.full((), LOWEST, tl.int64)
    high = key_of(highest).to(tl.int64)
    above = tl.full((), 0, tl.int64)
    while low < high:
        limit = low + ((high - low) * (tl.arange(0, BRANCHES) + 1) + (BRANCHES - 1)) // BRANCHES
        bound = limit.to(tl.int32)[:, None]
        total = tl.zeros((BRANCHES, TILE), dtype=tl.int64)
        for first in tl.range(0, VOCAB, TILE, num_stages=3):
            at = first + tl.arange(0, TILE)
            value = tl.load(line + at, mask=at < VOCAB, other=-INF)
            amount = (at < VOCAB).to(tl.int64)
            if WEIGHTS:
                amount = fixed(power(exponent(value, highest, scale)))
            total += tl.where(key_of(value)[None, :] >= bound, amount[None, :], 0)
        found = tl.sum(total, 1)
        enough = found >= goal
        above = tl.maximum(above, tl.max(tl.where(enough, 0, found), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, limit - 1), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, limit, low), 0))
    return low.to(tl.int32), above


@triton.jit
def last_tie_of_row(line, end, number, VOCAB: tl.constexpr):
    """The id of one of the tokens that equal `end`, `number` counted from 1; VOCAB - 1 if there are fewer."""
    done = number * 0
    found = (number * 0 + (VOCAB - 1)).to(tl.int32)
    for first in range(0, VOCAB, TILE):
        at = first + tl.arange(0, TILE)
        value = tl.load(line + at, mask=at < VOCAB, other=INF)
        ties = done + tl.cumsum((key_of(value) == end).to(tl.int64), 0)
        found = tl.minimum(found, tl.min(tl.where(ties >= number, at, VOCAB - 1), 0))
        done = tl.max(ties, 0)
    return found


@triton.jit
def kept_mass(line, highest, scale, end, last, VOCAB: tl.constexpr):
    total = tl.zeros((TILE,), dtype=tl.int64)
    for first in range(0, VOCAB, TILE):
        at = first + tl.arange(0, TILE)
        value = tl.load(line + at, mask=at < VOCAB, other=-INF)
        weight = fixed(power(exponent(value, highest, scale)))
        total += tl.where(keeps(key_of(value), at, end, last), weight, 0)
    return tl.sum(total, 0)


@triton.jit
def cut_long(logits, ints, reals, counts, highs, masses, more_counts, ends, lasts, stride,
             VOCAB: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (rows). As `cut`, for the rows that it leaves."""
    row = tl.program_id(0)
    if is_long(ints, counts, row, ROWS, CAPACITY) == 0:
        return
    top_k = tl.load(ints + TOP_K * ROWS + row)
    top_p = tl.load(reals + TOP_P * ROWS + row)
    both = (top_k > 0) & (top_p < 1.0)
    if (both == 0) & (tl.load(more_counts + row) <= CAPACITY):
        return
    highest = tl.load(highs + row)
    scale = tl.load(reals + SCALE * ROWS + row)
    mass = tl.load(masses + row)
    line = logits + row.to(tl.int64) * stride
    end = tl.full((), LOWEST, tl.int32)
    last = tl.full((), VOCAB, tl.int32)
    if top_k > 0:
        end, above = last_key_of_row(line, highest, scale, top_k, VOCAB, False)
        last = last_tie_of_row(line, end, top_k - above, VOCAB)
        if both:
            mass = kept_mass(line, highest, scale, end, last, VOCAB).to(tl.float64)
    if top_p < 1.0:
        goal = goal_of(top_k * 0, top_p, mass)
        end, above = last_key_of_row(line, highest, scale, goal, VOCAB, True)
        number = ties_kept(end, highest, scale, goal - above).to(tl.int64)
        last = last_tie_of_row(line, end, number, VOCAB)
    tl.store(ends + row, end)
    tl.store(lasts + row, last)


@triton.jit
def cut_stats(logits, ints, reals, chunk_max, chunk_sum, counts, highs, ends, lasts, stride,
              VOCAB: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Programs: (any number, rows). As `sampling.chunk_stats`, of what is kept of rows with a long list."""
    row = tl.program_id(1)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    if is_long(ints, counts, row, ROWS, CAPACITY) == 0:
        return
    highest = tl.load(highs + row)
    end = tl.load(ends + row)
    last = tl.load(lasts + row)
    min_x = tl.load(reals + MIN_X * ROWS + row)
    scale = tl.load(reals + SCALE * ROWS + row)
    chunk = tl.program_id(0)
    while chunk < CHUNKS:
        out = row * CHUNKS + chunk
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        some = key_of(tl.load(chunk_max + out)) >= end
        value = tl.load(logits + row.to(tl.int64) * stride + at, mask=some & (at < VOCAB), other=-INF)
        value = only_kept(value, at, end, last, highest, scale, min_x)
        top = tl.max(value, 0)
        above = tl.where(top == -INF, 0.0, top)
        tl.store(chunk_max + out, top)
        tl.store(chunk_sum + out, tl.sum(fixed(power(exponent(value, above, scale))), 0))
        chunk += tl.num_programs(0)
