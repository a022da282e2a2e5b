"""
How a step's draws are told to a GPU: parameters by row, and what changes single logits.

The host has two sides of both, used in turn, so that the draws of a step can be written down while those of
the step before are still to be copied.

`ints` and `reals` are (fields, rows) of 8-byte numbers. `entries` has, for rows with penalties, bias or
excluded tokens only, a record for each token that changes, each token once, in no order. The host copies what
it keeps of a sequence (`kernels.entries`), with room behind it for the tokens that it does not know yet: the
device counts those, see `sampling.count_drawn`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.cuda.inputs import HostSide
from worker_orcd.kernels.draw import Draw, bias_outside, no_room, too_many_logprobs
from worker_orcd.kernels.entries import BIAS, COUNT, ENTRY, EXCLUDED, FLAGS, ID, WORDS
from worker_orcd.sequence import MAX_LOGPROBS, RowFailure

MAX_DRAWS = 8  # rounds of a step
CHUNK = 4096  # logits that one program reads
GROUPS = 32  # of a chunk
LIMITS = 16  # that the end of what is kept is sought between, at a time
ROUNDS = 2
MAX_VOCAB = 64 * CHUNK
SMALLEST_ENTRIES = 4096  # that there is room for
MOST_ENTRIES = 1 << 20  # and if rows may be long: 4096 different tokens of each of 256, or 4 vocabularies
EXTRA_ENTRIES = 1088  # of a row, beside its tokens: biases and tokens that are never drawn
MOST_UNCOUNTED = 2 * MAX_DRAWS - 1  # tokens: those of the step before, and of all rounds but the last


class Int(enum.IntEnum):
    """Fields of `ints`."""

    SEED = 0  # uint64
    POSITION = 1  # of the token to draw; a round moves it on
    FLAGS = 2  # 0: no draw
    TOP_K = 3  # 0: off
    NUM_TOP = 4
    ENTRY_START = 5
    ENTRY_COUNT = 6
    LAST = 7  # position of the last token that the row draws in the step
    # Where the row counts tokens: how many of the last drawn are in no entry yet, and the row that drew them.
    UNKNOWN = 8
    PREVIOUS = 9


class Real(enum.IntEnum):
    """Fields of `reals`."""

    SCALE = 0  # log2(e) / temperature; 0: the highest logit is taken
    RAW_SCALE = 1  # log2(e)
    TOP_P = 2
    MIN_X = 3  # log2(min_p)
    REPETITION = 4  # and behind it the others
    PRESENCE = 5
    FREQUENCY = 6


# Flags of a row.
SAMPLES, FILTERED, LOGPROBS, COUNTS = 1, 2, 4, 8
# How a row went.
OK, NO_NUMBERS, NONE_LEFT = 0, 1, 2

_LOG2E = 1.4426950408889634
_LARGEST_SCALE = 1e300  # at which any two logits differ by more than a weight can


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which kernels a step needs; what a row draws does not depend on it."""

    adjusts: bool = False  # a row has entries
    counts: bool = False  # and tokens that are in none yet
    filters: bool = False  # a row has top-k, top-p or min-p
    logprobs: bool = False


def entries_needed(vocab_size: int, max_rows: int, longest: int) -> int:
    """Room for the entries of `max_rows` rows of up to `longest` tokens, within `MOST_ENTRIES`."""
    needed = max_rows * min(vocab_size + MOST_UNCOUNTED, longest + EXTRA_ENTRIES)
    return max(SMALLEST_ENTRIES, min(needed, MOST_ENTRIES))


def parameter_bytes(max_rows: int) -> int:
    """On the device, beside entries."""
    return 8 * (len(Int) + len(Real)) * max_rows


def entry_bytes(num_entries: int) -> int:
    """On the device: of each its record, and its logit as it was."""
    return num_entries * (ENTRY.itemsize + 4)


class _Side:
    """What the host writes down of one step."""

    def __init__(self, max_rows: int, device: torch.device, num_entries: int) -> None:
        self.parameters = HostSide(parameter_bytes(max_rows), device)
        split = 8 * len(Int) * max_rows
        numbers = self.parameters.buffer
        self.ints = numbers[:split].numpy().view(np.int64).reshape(len(Int), max_rows)
        self.reals = numbers[split:].numpy().view(np.float64).reshape(len(Real), max_rows)
        self.reals[Real.RAW_SCALE] = _LOG2E
        self.num_entries = 0
        self.entries = HostSide(num_entries * ENTRY.itemsize, device)
        numbers: Any = self.entries.buffer.numpy()
        self.words = memoryview(numbers).cast("i")


class DrawSlab:
    """Parameters of up to `max_rows` draws, on the host and on the device."""

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device, num_entries: int = SMALLEST_ENTRIES
    ) -> None:
        """`num_entries`: how many there is room for; it never becomes more."""
        self.vocab_size, self.max_rows, self.device = vocab_size, max_rows, device
        self._sides = [
            _Side(max_rows, device, num_entries) for _ in range(2)
        ]  # the last is that of the step being made
        self._on_device = torch.zeros_like(self._sides[0].parameters.buffer, device=device)
        split = 8 * len(Int) * max_rows
        self.ints, self.reals = self._on_device[:split], self._on_device[split:]
        self.entries = torch.zeros(num_entries * ENTRY.itemsize, dtype=torch.uint8, device=device)
        self.saved = torch.zeros(num_entries, dtype=torch.float32, device=device)

    def fill(self, draws: Sequence[Draw]) -> tuple[Wanted, dict[int, RowFailure]]:
        """One draw a row. Rows that fail already are not drawn; their index and failure are returned.

        Waits until the step before the last has been copied.
        """
        n = len(draws)
        if n > self.max_rows:
            raise ValueError(f"{n} draws, but there is room for {self.max_rows}")
        self._sides.reverse()
        side = self._sides[-1]
        side.parameters.wait()
        side.entries.wait()
        ints, reals = side.ints[:, :n], side.reals[:, :n]
        all_params = [draw.params for draw in draws]
        ints.view(np.uint64)[Int.SEED] = [params.seed for params in all_params]
        ints[Int.POSITION] = positions = np.array([draw.position for draw in draws], np.int64)
        ints[Int.LAST] = positions + [draw.count - 1 for draw in draws]
        top_k = np.array([params.top_k for params in all_params], np.int64)
        num_top = np.array([-1 if p.logprobs is None else p.logprobs for p in all_params], np.int64)
        temperature = np.array([params.temperature for params in all_params], np.float64)
        top_p = reals[Real.TOP_P] = np.array([params.top_p for params in all_params], np.float64)
        min_p = np.array([params.min_p for params in all_params], np.float64)
        ints[Int.TOP_K] = top_k = np.where((top_k > 0) & (top_k < self.vocab_size), top_k, 0)
        ints[Int.NUM_TOP] = np.minimum(num_top, self.vocab_size)
        random = temperature > 0.0
        with np.errstate(divide="ignore", over="ignore"):
            scale = np.minimum(_LOG2E / temperature, _LARGEST_SCALE)
            reals[Real.MIN_X] = np.log2(min_p)
        reals[Real.SCALE] = np.where(random, scale, 0.0)
        filtered = random & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
        flags = SAMPLES | np.where(filtered, FILTERED, 0) | np.where(num_top >= 0, LOGPROBS, 0)
        side.ints[Int.FLAGS] = 0
        side.ints[Int.ENTRY_COUNT] = 0
        ints[Int.FLAGS] = flags
        failures = self._refuse(draws, num_top)
        counts = self._fill_entries(draws, failures)
        return (
            Wanted(
                adjusts=side.num_entries > 0,
                counts=counts,
                filters=bool(filtered.any()),
                logprobs=bool((num_top >= 0).any()),
            ),
            failures,
        )

    def _refuse(self, draws: Sequence[Draw], num_top: NDArray[np.int64]) -> dict[int, RowFailure]:
        failures = {
            int(row): too_many_logprobs(int(num_top[row])) for row in np.flatnonzero(num_top > MAX_LOGPROBS)
        }
        for row, draw in enumerate(draws):
            bias = draw.params.logit_bias
            if bias and any(not 0 <= token_id < self.vocab_size for token_id, _ in bias):
                failures[row] = bias_outside(self.vocab_size)
        self._sides[-1].ints[Int.FLAGS, list(failures)] = 0
        return failures

    def _fill_entries(self, draws: Sequence[Draw], failures: dict[int, RowFailure]) -> bool:
        """Whether there are tokens for the device to count."""
        side = self._sides[-1]
        changed: list[tuple[int, Draw, int]] = []
        side.num_entries = 0
        for row, draw in enumerate(draws):
            if row in failures or (draw.entries is None and not draw.excluded):
                continue
            uncounted = _uncounted(draw)
            room = _known(draw, self.vocab_size) + uncounted
            if side.num_entries + room > len(self.saved):
                failures[row] = no_room()
                side.ints[Int.FLAGS, row] = 0
                continue
            side.num_entries += room
            changed.append((row, draw, uncounted))
        if not changed:
            return False
        rows, starts, counts = [row for row, _, _ in changed], list[int](), list[int]()
        start = 0
        for _, draw, uncounted in changed:
            starts.append(start)
            counts.append(write_entries(draw, side.words, start, self.vocab_size))
            start += _known(draw, self.vocab_size) + uncounted
        side.ints[Int.ENTRY_START, rows] = starts
        side.ints[Int.ENTRY_COUNT, rows] = counts
        penalties = [
            (draw.params.repetition_penalty, draw.params.presence_penalty, draw.params.frequency_penalty)
            for _, draw, _ in changed
        ]
        with np.errstate(over="ignore"):
            side.reals[Real.REPETITION : Real.FREQUENCY + 1, rows] = np.array(penalties, np.float32).T
        counting = [(row, draw) for row, draw, uncounted in changed if uncounted]
        rows = [row for row, _ in counting]
        side.ints[Int.FLAGS, rows] |= COUNTS
        side.ints[Int.UNKNOWN, rows] = [draw.num_unknown for _, draw in counting]
        side.ints[Int.PREVIOUS, rows] = [draw.previous for _, draw in counting]
        return bool(counting)

    def upload(self) -> None:
        """Start the copies to the device: one, or two where there are entries."""
        side = self._sides[-1]
        self._on_device.copy_(side.parameters.buffer, non_blocking=True)
        side.parameters.queued()
        if side.num_entries:
            num_bytes = side.num_entries * ENTRY.itemsize
            self.entries[:num_bytes].copy_(side.entries.buffer[:num_bytes], non_blocking=True)
            side.entries.queued()


def _known(draw: Draw, vocab_size: int) -> int:
    """Entries that the host writes, at most: a token has one."""
    return min(vocab_size, (0 if draw.entries is None else len(draw.entries)) + len(draw.excluded))


def _uncounted(draw: Draw) -> int:
    """Entries that the device may add to those. Raises Internal where more than can be is unknown."""
    found = draw.num_uncounted
    if not 0 <= draw.num_unknown <= MAX_DRAWS or found > MOST_UNCOUNTED:
        raise Internal(f"{draw.num_unknown} tokens before a draw of {draw.count} are not known")
    return found


def write_entries(draw: Draw, out: memoryview, start: int, vocab_size: int) -> int:
    """Of the tokens that the host knows, to the entries from `start` on. How many they are."""
    entries, count = draw.entries, 0
    if entries is not None:
        count = len(entries)
        out[WORDS * start : WORDS * (start + count)] = entries.words
    for token_id in draw.excluded:
        place = None if entries is None else entries.place_of(token_id)
        if place is not None:
            out[WORDS * (start + place) + FLAGS] |= EXCLUDED
        elif 0 <= token_id < vocab_size:
            at = WORDS * (start + count)
            out[at + ID], out[at + FLAGS], out[at + COUNT], out[at + BIAS] = token_id, EXCLUDED, 0, 0
            count += 1
    return count
