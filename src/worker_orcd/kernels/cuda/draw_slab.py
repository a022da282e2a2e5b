"""
How a step's draws are told to a GPU: parameters by row, and what changes single logits.

The host has two sides of both, used in turn, so that the draws of a step can be written down while those of
the step before are still to be copied.

`ints` and `reals` are (fields, rows) of 8-byte numbers. `entries` has, for rows with penalties, bias or
excluded tokens only, a record for each token that changes, each token once. Such a row costs the host a sort
of its token ids a step: 0.13 ms for a thousand, 0.7 ms for ten thousand. Biases of one token that is named
twice are added to each other first.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.kernels.cuda.inputs import HostSide
from worker_orcd.kernels.draw import Draw, TokenIds, bias_outside, too_many_logprobs
from worker_orcd.sequence import MAX_LOGPROBS, RowFailure

CHUNK = 4096  # logits that one program reads
GROUPS = 32  # of a chunk
LIMITS = 16  # that the end of what is kept is sought between, at a time
ROUNDS = 2
MAX_VOCAB = 64 * CHUNK
SMALLEST_ENTRIES = 4096  # that there is room for from the start
MOST_ENTRIES = 1 << 20  # and if rows may be long: 4096 different tokens of each of 256; beyond, room grows
EXTRA_ENTRIES = 1088  # of a row, beside its tokens: biases and tokens that are never drawn


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


class Real(enum.IntEnum):
    """Fields of `reals`."""

    SCALE = 0  # log2(e) / temperature; 0: the highest logit is taken
    RAW_SCALE = 1  # log2(e)
    TOP_P = 2
    MIN_X = 3  # log2(min_p)
    REPETITION = 4
    PRESENCE = 5


# Flags of a row.
SAMPLES, FILTERED, LOGPROBS = 1, 2, 4
# Flags of an entry: in prompt or output; in the output; never drawn.
SEEN, USED, EXCLUDED = 1, 2, 4
# How a row went.
OK, NO_NUMBERS, NONE_LEFT = 0, 1, 2

_LOG2E = 1.4426950408889634
_LARGEST_SCALE = 1e300  # at which any two logits differ by more than a weight can
_ENTRY = np.dtype([("id", "<i4"), ("flags", "<i4"), ("frequency", "<f4"), ("bias", "<f4")])


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which kernels a step needs; what a row draws does not depend on it."""

    adjusts: bool = False  # a row has entries
    filters: bool = False  # a row has top-k, top-p or min-p
    logprobs: bool = False


def entries_needed(vocab_size: int, max_rows: int, longest: int) -> int:
    """Room for the entries of `max_rows` rows of up to `longest` tokens, within `MOST_ENTRIES`."""
    needed = max_rows * min(vocab_size, longest + EXTRA_ENTRIES)
    return max(SMALLEST_ENTRIES, min(needed, MOST_ENTRIES))


def parameter_bytes(max_rows: int) -> int:
    """On the device, beside entries."""
    return 8 * (len(Int) + len(Real)) * max_rows


def entry_bytes(num_entries: int) -> int:
    """On the device: of each its record, and its logit as it was."""
    return num_entries * (_ENTRY.itemsize + 4)


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
        self.make_room(num_entries, device)

    def make_room(self, num_entries: int, device: torch.device) -> None:
        self.entries = HostSide(num_entries * _ENTRY.itemsize, device)
        self.records = self.entries.buffer.numpy().view(_ENTRY)


class DrawSlab:
    """Parameters of up to `max_rows` draws, on the host and on the device."""

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device, num_entries: int = SMALLEST_ENTRIES
    ) -> None:
        """`num_entries`: how many there is room for at first."""
        self.vocab_size, self.max_rows, self.device = vocab_size, max_rows, device
        self._sides = [
            _Side(max_rows, device, num_entries) for _ in range(2)
        ]  # the last is that of the step being made
        self._on_device = torch.zeros_like(self._sides[0].parameters.buffer, device=device)
        split = 8 * len(Int) * max_rows
        self.ints, self.reals = self._on_device[:split], self._on_device[split:]
        self.entries_moved = 0
        self._make_room(num_entries)

    def _make_room(self, num_entries: int) -> None:
        self.entries = torch.zeros(num_entries * _ENTRY.itemsize, dtype=torch.uint8, device=self.device)
        self.saved = torch.zeros(num_entries, dtype=torch.float32, device=self.device)

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
        self._fill_entries(draws, failures)
        return (
            Wanted(
                adjusts=side.num_entries > 0,
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

    def _fill_entries(self, draws: Sequence[Draw], failures: dict[int, RowFailure]) -> None:
        parts: list[NDArray[np.void]] = []
        side = self._sides[-1]
        side.num_entries = 0
        for row, draw in enumerate(draws):
            params = draw.params
            if (draw.token_ids is None and not draw.excluded and not params.logit_bias) or row in failures:
                continue
            entries = entries_of(draw, self.vocab_size)
            side.ints[Int.ENTRY_START, row] = side.num_entries
            side.ints[Int.ENTRY_COUNT, row] = len(entries)
            side.reals[Real.REPETITION, row] = np.float32(params.repetition_penalty)
            side.reals[Real.PRESENCE, row] = np.float32(params.presence_penalty)
            side.num_entries += len(entries)
            parts.append(entries)
        if side.num_entries > len(self.saved):
            self._make_room(2 * side.num_entries)
            self.entries_moved += 1
        if side.num_entries > len(side.records):
            side.make_room(len(self.saved), self.device)
        if parts:
            np.concatenate(parts, out=side.records[: side.num_entries])

    def upload(self) -> None:
        """Start the copies to the device: one, or two where there are entries."""
        side = self._sides[-1]
        self._on_device.copy_(side.parameters.buffer, non_blocking=True)
        side.parameters.queued()
        if side.num_entries:
            num_bytes = side.num_entries * _ENTRY.itemsize
            self.entries[:num_bytes].copy_(side.entries.buffer[:num_bytes], non_blocking=True)
            side.entries.queued()


def entries_of(draw: Draw, vocab_size: int) -> NDArray[np.void]:
    """What changes single logits, by rising id. Ids outside the vocabulary are left out."""
    seen = used = counts = np.empty(0, np.int64)
    if draw.token_ids is not None:
        seen, _ = _counted(draw.token_ids)
        used, counts = _counted(draw.token_ids[draw.num_prompt_tokens :])
    biased = np.array([token_id for token_id, _ in draw.params.logit_bias], np.int64)
    excluded = np.array(list(draw.excluded), np.int64)
    ids = seen
    if len(biased) + len(excluded):
        ids, _ = _counted(np.concatenate((seen, biased, excluded)))
    entries = np.zeros(len(ids), _ENTRY)
    entries["id"] = ids
    entries["flags"][np.searchsorted(ids, seen)] |= SEEN
    at = np.searchsorted(ids, used)
    entries["flags"][at] |= USED
    entries["flags"][np.searchsorted(ids, excluded)] |= EXCLUDED
    with np.errstate(all="ignore"):
        entries["frequency"][at] = np.float32(draw.params.frequency_penalty) * counts.astype(np.float32)
        bias = np.array([value for _, value in draw.params.logit_bias], np.float64).astype(np.float32)
        np.add.at(entries["bias"], np.searchsorted(ids, biased), bias)
    return entries[np.searchsorted(ids, 0) : np.searchsorted(ids, vocab_size)]


def _counted(ids: TokenIds) -> tuple[TokenIds, NDArray[np.int64]]:
    """Each id once, rising, and how often it is there. Takes less time than `numpy.unique`."""
    ids = np.sort(ids)
    starts = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    starts = np.concatenate(([0] if len(ids) else [], starts)).astype(np.int64)
    return ids[starts], np.diff(starts, append=len(ids))
