"""
Writes a step into a backend's input buffers; refuses what would make a kernel read or write out of bounds.

A token that the step before draws, and nobody knows yet, is written as -(1 + its place among the draws).

All of it is numpy on whole arrays: a step of 64 decodes costs a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Counts, Limits
from worker_orcd.runner.cache_plan import GroupPlan
from worker_orcd.sequence import Row, Step

Ints = NDArray[np.int64]


class Batch:
    """The inputs of one step at a time, as numpy views of a backend's buffers."""

    def __init__(
        self,
        inputs: BatchInputs,
        limits: Limits,
        groups: SequenceABC[GroupPlan],
        *,
        vocab_size: int,
    ) -> None:
        self._limits = limits
        self._groups = tuple(groups)
        self._vocab_size = vocab_size
        self._token_ids: NDArray[np.int32] = inputs.token_ids.numpy()
        self._positions: NDArray[np.int32] = inputs.positions.numpy()
        self._slots: NDArray[np.int32] = inputs.slots.numpy()
        self._query_start: NDArray[np.int32] = inputs.query_start.numpy()
        self._context_lens: NDArray[np.int32] = inputs.context_lens.numpy()
        self._block_tables: NDArray[np.int32] = inputs.block_tables.numpy()
        self._logit_tokens: NDArray[np.int32] = inputs.logit_tokens.numpy()
        self._num_draws = 0  # of the step before

    def fill(self, step: Step, *, every_logit: bool = False) -> Counts:
        """Logits are wanted of the last token of each row that samples; of every token if `every_logit`.

        Block tables reach as far as all rounds of the step write; the rest is as its first round has it.
        Raises Internal where the step breaks a rule of the seam between scheduler and runner.
        """
        num_rows = len(step.rows)
        if not 0 < num_rows <= self._limits.max_rows:
            raise Internal(f"a step of {num_rows} rows; 1 to {self._limits.max_rows} are allowed")
        lengths = np.array([row.num_tokens for row in step.rows], dtype=np.int64)  # (num_rows,)
        computed = np.array([row.start for row in step.rows], dtype=np.int64)
        draws = np.array([row.num_draws for row in step.rows], dtype=np.int64)
        if lengths.min() < 1 or computed.min() < 0:
            raise Internal("a row of no tokens, or of a sequence with fewer than none computed")
        if any(len(row.sequence.block_tables) != len(self._groups) for row in step.rows):
            raise Internal(f"a row without a block table for each of the {len(self._groups)} cache groups")
        num_tokens = int(lengths.sum())
        if num_tokens > self._limits.max_tokens:
            raise Internal(f"a step of {num_tokens} tokens; at most {self._limits.max_tokens} are allowed")
        self._fill_tokens(step, num_tokens)
        ends = np.cumsum(lengths)  # (num_rows,)
        self._query_start[1 : num_rows + 1] = ends
        self._context_lens[:num_rows] = computed + lengths
        rows, offsets = _places_in_runs(lengths)  # (num_tokens,)
        positions = computed[rows] + offsets  # (num_tokens,)
        self._positions[:num_tokens] = positions
        in_the_end = computed + lengths + np.maximum(draws - 1, 0)
        for group in range(len(self._groups)):
            self._fill_blocks(step, group, computed, in_the_end)
            self._fill_slots(group, rows, positions)
        wanted = np.arange(num_tokens, dtype=np.int64) if every_logit else (ends - 1)[draws > 0]
        num_logits = self._fill_logit_tokens(wanted)
        num_rounds = max(1, int(draws.max()))
        if num_rounds > 1 and not num_tokens == num_rows == num_logits:
            raise Internal("a row of many tokens, or that draws none, in a step of several rounds")
        self._num_draws = 0 if every_logit else num_logits
        return Counts(num_tokens, num_rows, num_logits, num_rounds)

    def _fill_tokens(self, step: Step, num_tokens: int) -> None:
        token_ids = np.fromiter(chain.from_iterable(map(_new_tokens, step.rows)), dtype=np.int64)
        if len(token_ids) != num_tokens:
            raise Internal("a row reaches beyond the tokens of its sequence")
        unknown = [-1 - row.previous_draw for row in step.rows if row.previous_draw is not None]
        if unknown and not -self._num_draws <= min(unknown) <= max(unknown) < 0:
            raise Internal(f"a row takes its token from none of the {self._num_draws} draws before it")
        # Of known ones none is negative: those that are must be the unknown ones, and no more.
        if np.count_nonzero(token_ids < 0) != len(unknown) or token_ids.max() >= self._vocab_size:
            raise Internal(f"a token id outside the vocabulary of {self._vocab_size}")
        self._token_ids[:num_tokens] = token_ids

    def _fill_blocks(self, step: Step, group: int, computed: Ints, context_lens: Ints) -> None:
        """The blocks that each row's tokens see; the other entries stay as they are, nothing reads them."""
        block_size, window = self._limits.block_size, self._groups[group].window
        ends = -(-context_lens // block_size)  # (num_rows,)
        if ends.max() > self._limits.max_blocks_per_row:
            raise Internal(f"a context of {context_lens.max()} tokens is longer than a row may be")
        firsts = np.zeros_like(ends)
        if window is not None:
            firsts = np.maximum(computed - window + 1, 0) // block_size
        tables = [
            row.sequence.block_tables[group][first:end]
            for row, first, end in zip(step.rows, firsts.tolist(), ends.tolist(), strict=True)
        ]
        blocks = np.fromiter(chain.from_iterable(tables), dtype=np.int64)
        if len(blocks) != (ends - firsts).sum():
            raise Internal("a row's context reaches beyond its blocks")
        if blocks.min() < 1 or blocks.max() >= self._groups[group].num_blocks:
            raise Internal(f"a block id outside 1 … {self._groups[group].num_blocks - 1}")
        rows, columns = _places_in_runs(ends - firsts)
        if window is not None:
            columns += firsts[rows]
        self._block_tables[group, rows, columns] = blocks

    def _fill_slots(self, group: int, rows: Ints, positions: Ints) -> None:
        """Where each token's K and V go."""
        block_size = self._limits.block_size
        blocks = self._block_tables[group, rows, positions // block_size].astype(np.int64)
        self._slots[group, : len(positions)] = blocks * block_size + positions % block_size

    def _fill_logit_tokens(self, wanted: Ints) -> int:
        if len(wanted) > len(self._logit_tokens):
            raise Internal(f"{len(wanted)} logits wanted; at most {len(self._logit_tokens)} are allowed")
        self._logit_tokens[: len(wanted)] = wanted
        return len(wanted)


def _new_tokens(row: Row) -> list[int]:
    if row.previous_draw is not None:
        return [-1 - row.previous_draw]
    return row.sequence.token_ids[row.start : row.end]


def _places_in_runs(counts: Ints) -> tuple[Ints, Ints]:
    """For runs of these lengths, one after the other: the run of each element and its place in the run."""
    runs = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return runs, np.arange(len(runs)) - starts[runs]
