"""
Drawing tokens from rows of logits: greedily, or by temperature.

Device code (Triton). The rules are those of `runner.sampler`; this is how they are kept:

* A row is read once, in chunks of 4096 logits (32 groups of 128), a program a chunk.
* The weight of a token is 2**x, x = (logit - highest) * scale, in float64, rounded to a multiple of 2**-44:
  an integer, so that sums of weights are exact, in whatever order. Within a chunk `highest` is the chunk's.
* The chunks' sums, on one scale, are added up in float64 by one program a row, always in the same order.
* So a draw depends on its row alone; which kernels run for other rows does not enter.
* Penalties, bias and exclusion change logits where they lie, and `finish` puts back what was there.

Each kernel takes `ints` and `reals`, the parameters of `draw_slab`: field by field, ROWS entries a field.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels import entries as entries_module
from worker_orcd.kernels.cuda import draw_slab as slab

CHUNK = tl.constexpr(slab.CHUNK)
GROUPS = tl.constexpr(slab.GROUPS)  # of a chunk
GROUP = tl.constexpr(slab.CHUNK // slab.GROUPS)
ENTRIES = tl.constexpr(1024)  # at a time
MAX_DRAWS = tl.constexpr(slab.MAX_DRAWS)

SEED = tl.constexpr(int(slab.Int.SEED))
POSITION = tl.constexpr(int(slab.Int.POSITION))
FLAGS = tl.constexpr(int(slab.Int.FLAGS))
ENTRY_START = tl.constexpr(int(slab.Int.ENTRY_START))
ENTRY_COUNT = tl.constexpr(int(slab.Int.ENTRY_COUNT))
LAST = tl.constexpr(int(slab.Int.LAST))
UNKNOWN = tl.constexpr(int(slab.Int.UNKNOWN))
PREVIOUS = tl.constexpr(int(slab.Int.PREVIOUS))
SCALE = tl.constexpr(int(slab.Real.SCALE))
RAW_SCALE = tl.constexpr(int(slab.Real.RAW_SCALE))
REPETITION = tl.constexpr(int(slab.Real.REPETITION))
MIN_X = tl.constexpr(int(slab.Real.MIN_X))
PRESENCE = tl.constexpr(int(slab.Real.PRESENCE))
FREQUENCY = tl.constexpr(int(slab.Real.FREQUENCY))
SAMPLES = tl.constexpr(slab.SAMPLES)
FILTERED = tl.constexpr(slab.FILTERED)
LOGPROBS = tl.constexpr(slab.LOGPROBS)
COUNTS = tl.constexpr(slab.COUNTS)
SEEN = tl.constexpr(entries_module.SEEN)
EXCLUDED = tl.constexpr(entries_module.EXCLUDED)
OK = tl.constexpr(slab.OK)
NO_NUMBERS = tl.constexpr(slab.NO_NUMBERS)
NONE_LEFT = tl.constexpr(slab.NONE_LEFT)

LOWEST = tl.constexpr(-2139095041)  # the key of minus infinity; there are lower numbers
INF = tl.constexpr(float("inf"))
ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: added, it leaves the nearest integer in the low bits
FIX = tl.constexpr(384.0)  # 1.5 * 2**8: likewise the nearest multiple of 2**-44
FIX_BITS = tl.constexpr(0x4078 << 48)
ONE = tl.constexpr(17592186044416.0)  # 2**44


@triton.jit
def power(x):
    """2**x as float64 for x <= 0, to 4e-14; 2**-1000 stands for whatever is smaller."""
    x = tl.maximum(x, -1000.0)
    whole = x + ROUND
    r = x - (whole - ROUND)  # within a half of zero
    # Chebyshev's of (2**r - 1) / r; 2**0 is 1 exactly.
    y = r * 1.0203121063391729e-07 + 1.3255224878668817e-06
    y = y * r + 1.525268684626772e-05
    y = y * r + 0.00015403455852453838
    y = y * r + 0.0013333558179043112
    y = y * r + 0.009618129159402558
    y = y * r + 0.055504108664760424
    y = y * r + 0.2402265069581299
    y = y * r + 0.6931471805599453
    y = y * r + 1.0
    bits = y.to(tl.int64, bitcast=True) + (whole.to(tl.int64, bitcast=True) << 52)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def fixed(weight):
    """A float64 weight of at most 1 as a multiple of 2**-44, int64."""
    return (weight + FIX).to(tl.int64, bitcast=True) - FIX_BITS


@triton.jit
def exponent(value, highest, scale):
    return (value.to(tl.float64) - highest.to(tl.float64)) * scale


@triton.jit
def finite(value):
    return (value == value) & (value != INF) & (value != -INF)


@triton.jit
def key_of(value):
    """An int32 for a float32, in the same order; both zeros are one. Not for NaN."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keeps(key, token, end, last):
    """Whether a token comes no later than the one of key `end` and id `last`."""
    return (key > end) | ((key == end) & (token <= last))


@triton.jit
def only_kept(value, token, end, last, highest, scale, min_x):
    """Minus infinity in place of the logits that filters drop."""
    kept = keeps(key_of(value), token, end, last) & (exponent(value, highest, scale) >= min_x)
    return tl.where(kept, value, -INF)


@triton.jit
def uniform(ints, row, ROWS: tl.constexpr):
    """`philox.uniform(seed, position)`, float64."""
    seed = tl.load(ints + SEED * ROWS + row)
    position = tl.load(ints + POSITION * ROWS + row)
    high = (position >> 32).to(tl.int32)
    first, second, _, _ = tl.philox(seed, position.to(tl.int32), high, 0, 0)
    bits = (first.to(tl.uint64) << 21) | (second.to(tl.uint64) >> 11)
    return bits.to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def chunk_stats(logits, ints, reals, chunk_max, chunk_sum, group_max, group_sum, stride, VOCAB: tl.constexpr,
                ROWS: tl.constexpr, RAW: tl.constexpr, BY_GROUP: tl.constexpr):  # fmt: skip
    """Programs: (chunks, rows). The highest logit (inf for NaN) of each chunk, and the sum of its weights.

    With BY_GROUP those of its groups too, for the rows that are filtered. RAW: for log probabilities.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & (LOGPROBS if RAW else SAMPLES)) == 0:
        return
    group = tl.arange(0, GROUPS)
    at = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < VOCAB, other=-INF)
    value = tl.where(value == value, value, INF)
    tops = tl.max(value, 1)
    highest = tl.max(tops, 0)
    out = row * CHUNKS + chunk
    tl.store(chunk_max + out, highest)
    scale = tl.load(reals + (RAW_SCALE if RAW else SCALE) * ROWS + row)
    if scale > 0:
        above = tl.where(highest == -INF, 0.0, highest)
        sums = tl.sum(fixed(power(exponent(value, above, scale))), 1)
        tl.store(chunk_sum + out, tl.sum(sums, 0))
        if BY_GROUP and (RAW or (flags & FILTERED) != 0):
            tl.store(group_max + out * GROUPS + group, tops)
            tl.store(group_sum + out * GROUPS + group, sums)


@triton.jit
def draw(logits, ints, reals, chunk_max, chunk_sum, counts, ends, lasts, tokens, statuses, stride,
         VOCAB: tl.constexpr, ROWS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, CAPACITY: tl.constexpr,
         FILTERS: tl.constexpr):  # fmt: skip
    """Programs: (rows). The token of each row, but (FILTERS) not of those that `filtering.choose` drew.

    Of filtered rows the chunks' stats are of what is kept: see `cutting`.
    """
    row = tl.program_id(0)
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & SAMPLES) == 0:
        return
    end = tl.full((), LOWEST, tl.int32)
    last = tl.full((), VOCAB, tl.int32)
    min_x = tl.full((), -INF, tl.float64)
    if FILTERS and (flags & FILTERED) != 0:
        if tl.load(counts + row) <= CAPACITY:
            return
        end = tl.load(ends + row)
        last = tl.load(lasts + row)
        min_x = tl.load(reals + MIN_X * ROWS + row)
    index = tl.arange(0, CHUNKS_PADDED)
    tops = tl.load(chunk_max + row * CHUNKS + index, mask=index < CHUNKS, other=-INF)
    highest = tl.max(tops, 0)
    is_finite = finite(highest)
    tl.store(statuses + row, tl.where(is_finite, OK, NO_NUMBERS))
    scale = tl.load(reals + SCALE * ROWS + row)
    line = logits + row.to(tl.int64) * stride
    if is_finite == 0:
        tl.store(tokens + row, 0)
    elif scale > 0:
        sums = tl.load(chunk_sum + row * CHUNKS + index, mask=index < CHUNKS, other=0)
        chunk, top, within = chunk_of(tops, sums, index, uniform(ints, row, ROWS), highest, scale)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(line + at, mask=at < VOCAB, other=-INF)
        if FILTERS:
            value = only_kept(value, at, end, last, highest, scale, min_x)
        weights = tl.cumsum(fixed(power(exponent(value, top, scale))), 0)
        within = tl.minimum(within, tl.max(weights, 0) - 1)
        tl.store(tokens + row, tl.min(tl.where(weights > within, at, VOCAB - 1), 0))
    else:
        chunk = tl.min(tl.where(tops == highest, index, CHUNKS_PADDED), 0)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(line + at, mask=at < VOCAB, other=-INF)
        tl.store(tokens + row, tl.min(tl.where(value == highest, at, VOCAB - 1), 0))


@triton.jit
def chunk_of(tops, sums, index, fraction, highest, scale):
    """The chunk in which the cumulative weight exceeds `fraction` of all, its highest logit, and how much of
    its sum is below that.
    """
    scaled = sums.to(tl.float64) * power(exponent(tops, highest, scale))
    cumulative = tl.cumsum(scaled, 0)
    target = fraction * tl.max(cumulative, 0)
    some = sums > 0
    chunk = tl.min(tl.where((cumulative > target) & some, index, 0x7FFFFFFF), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(some, index, 0), 0))  # where rounding left none
    before = tl.max(tl.where(index < chunk, cumulative, 0.0), 0)
    top = tl.max(tl.where(index == chunk, tops, -INF), 0)
    within = (target - before) / power(exponent(top, highest, scale))
    return chunk, top, tl.minimum(tl.maximum(within, 0.0), 4.0e18).to(tl.int64)


@triton.jit
def count_drawn(drawn, ints, entries, ROWS: tl.constexpr):
    """Programs: (rows). Counts what a row has drawn since its entries were written, or counted last.

    `drawn` (up to MAX_DRAWS, ROWS): the tokens, the last first. A token that has no entry gets one behind the
    others. Then the row's own next token is what will be unknown, if it shall draw another behind it.
    """
    row = tl.program_id(0)
    if (tl.load(ints + FLAGS * ROWS + row) & COUNTS) == 0:
        return
    unknown = tl.load(ints + UNKNOWN * ROWS + row)
    previous = tl.load(ints + PREVIOUS * ROWS + row)
    start = tl.load(ints + ENTRY_START * ROWS + row)
    count = tl.load(ints + ENTRY_COUNT * ROWS + row).to(tl.int32)
    goes_on = tl.load(ints + POSITION * ROWS + row) < tl.load(ints + LAST * ROWS + row)
    number = tl.arange(0, MAX_DRAWS)
    token = tl.load(drawn + number * ROWS + previous, mask=number < unknown, other=-1)
    same = token[:, None] == token[None, :]
    times = tl.sum(same.to(tl.int32), 1)
    earlier = tl.sum((same & (number[None, :] < number[:, None])).to(tl.int32), 1)
    place = tl.full((MAX_DRAWS,), -1, tl.int32)
    done = count * 0
    while done < count:
        index = done + tl.arange(0, ENTRIES)
        known = tl.load(entries + (start + index) * 4, mask=index < count, other=-2)
        place = tl.maximum(place, tl.max(tl.where(token[:, None] == known[None, :], index[None, :], -1), 1))
        done += ENTRIES
    first = (number < unknown) & (earlier == 0)
    there = first & (place >= 0)
    fresh = first & (place < 0)
    place = tl.where(fresh, count + tl.cumsum(fresh.to(tl.int32), 0) - 1, place)
    entry = entries + (start + place) * 4
    flags = tl.load(entry + 1, mask=there, other=0)
    times += tl.load(entry + 2, mask=there, other=0)
    tl.debug_barrier()  # what follows changes what was read
    tl.store(entry, token, mask=fresh)
    tl.store(entry + 1, flags | SEEN, mask=first)
    tl.store(entry + 2, times, mask=first)
    tl.store(entry + 3, 0, mask=fresh)
    tl.store(ints + ENTRY_COUNT * ROWS + row, count + tl.sum(fresh.to(tl.int32), 0))
    tl.store(ints + UNKNOWN * ROWS + row, goes_on.to(tl.int64))
    tl.store(ints + PREVIOUS * ROWS + row, row)


@triton.jit
def adjust(logits, ints, reals, entries, entry_reals, saved, stride, ROWS: tl.constexpr):
    """Programs: (rows). Penalties, bias and exclusion of the row's entries; `saved` is what was there.

    `entries` and `entry_reals` are one array, of `kernels.entries.ENTRY`.
    """
    row = tl.program_id(0)
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & SAMPLES) == 0:
        return
    start = tl.load(ints + ENTRY_START * ROWS + row)
    count = tl.load(ints + ENTRY_COUNT * ROWS + row)
    repetition = tl.load(reals + REPETITION * ROWS + row)
    presence = tl.load(reals + PRESENCE * ROWS + row).to(tl.float32)
    frequency = tl.load(reals + FREQUENCY * ROWS + row)
    line = logits + row.to(tl.int64) * stride
    done = count * 0
    while done < count:
        index = done + tl.arange(0, ENTRIES)
        mask = index < count
        entry = (start + index) * 4
        token = tl.load(entries + entry, mask=mask, other=0)
        what = tl.load(entries + entry + 1, mask=mask, other=0)
        times = tl.load(entries + entry + 2, mask=mask, other=0)
        bias = tl.load(entry_reals + entry + 3, mask=mask, other=0.0)
        value = tl.load(line + token, mask=mask, other=0.0)
        tl.store(saved + start + index, value, mask=mask)
        # By way of float64, which rounds as float32 would and is not fused with what follows.
        exact = value.to(tl.float64)
        penalised = tl.where(value > 0, exact / repetition, exact * repetition).to(tl.float32)
        value = tl.where((what & SEEN) != 0, penalised, value)
        often = (frequency * times.to(tl.float64)).to(tl.float32)
        value = tl.where(times > 0, (value - presence) - often, value)
        value = tl.where((what & EXCLUDED) != 0, -INF, value + bias)
        tl.store(line + token, value, mask=mask)
        done += ENTRIES


@triton.jit
def finish(logits, ints, entries, saved, tokens, statuses, token_logits, stride, VOCAB: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """Programs: (rows). Puts back what `adjust` changed; the token's own logit; whose fault a failure is."""
    row = tl.program_id(0)
    flags = tl.load(ints + FLAGS * ROWS + row)
    if (flags & SAMPLES) == 0:
        return
    start = tl.load(ints + ENTRY_START * ROWS + row)
    count = tl.load(ints + ENTRY_COUNT * ROWS + row)
    line = logits + row.to(tl.int64) * stride
    done = count * 0
    while done < count:
        index = done + tl.arange(0, ENTRIES)
        mask = index < count
        token = tl.load(entries + (start + index) * 4, mask=mask, other=0)
        tl.store(line + token, tl.load(saved + start + index, mask=mask, other=0.0), mask=mask)
        done += ENTRIES
    tl.debug_barrier()  # what follows reads what was put back
    status = tl.load(statuses + row)
    if status == OK:
        tl.store(token_logits + row, tl.load(line + tl.load(tokens + row)))
    elif count > 0:
        highest = tl.full((CHUNK,), -INF, tl.float32)
        for first in range(0, VOCAB, CHUNK):
            at = first + tl.arange(0, CHUNK)
            value = tl.load(line + at, mask=at < VOCAB, other=-INF)
            highest = tl.maximum(highest, tl.where(value == value, value, INF))
        tl.store(statuses + row, tl.where(finite(tl.max(highest, 0)), NONE_LEFT, NO_NUMBERS))
