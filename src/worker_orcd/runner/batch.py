"""
Writes a step into a backend's input buffers; refuses what would make a kernel read or write out of bounds.

All of it is numpy on whole arrays: a step of 64 decodes costs a fraction of a millisecond.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Counts, Limits
from worker_orcd.sequence import Row, Step

Ints = NDArray[np.int64]


class Batch:
    """The inputs of one step at a time, as numpy views of a backend's buffers."""

    def __init__(self, inputs: BatchInputs, limits: Limits, *, num_blocks: int, vocab_size: int) -> None:
        self._limits = limits
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._token_ids: NDArray[np.int32] = inputs.token_ids.numpy()
        self._positions: NDArray[np.int32] = inputs.positions.numpy()
        self._slots: NDArray[np.int32] = inputs.slots.numpy()
        self._query_start: NDArray[np.int32] = inputs.query_start.numpy()
        self._context_lens: NDArray[np.int32] = inputs.context_lens.numpy()
        self._block_tables: NDArray[np.int32] = inputs.block_tables.numpy()
        self._logit_tokens: NDArray[np.int32] = inputs.logit_tokens.numpy()

    def fill(self, step: Step, *, every_logit: bool = False) -> Counts:
        """Logits are wanted of the last token of each row that samples; of every token if `every_logit`.

        Raises Internal where the step breaks a rule of the seam between scheduler and runner.
        """
        num_rows = len(step.rows)
        if not 0 < num_rows <= self._limits.max_rows:
            raise Internal(f"a step of {num_rows} rows; 1 to {self._limits.max_rows} are allowed")
        lengths = np.array([row.num_tokens for row in step.rows], dtype=np.int64)  # (num_rows,)
        computed = np.array([row.sequence.num_computed_tokens for row in step.rows], dtype=np.int64)
        if lengths.min() < 1 or computed.min() < 0:
            raise Internal("a row of no tokens, or of a sequence with fewer than none computed")
        num_tokens = int(lengths.sum())
        if num_tokens > self._limits.max_tokens:
            raise Internal(f"a step of {num_tokens} tokens; at most {self._limits.max_tokens} are allowed")
        self._fill_tokens(step, num_tokens)
        ends = np.cumsum(lengths)  # (num_rows,)
        self._query_start[1 : num_rows + 1] = ends
        self._context_lens[:num_rows] = computed + lengths
        self._fill_blocks(step, computed + lengths)
        self._fill_places(lengths, computed, ends)
        return Counts(num_tokens, num_rows, self._fill_logit_tokens(step, ends, every_logit))

    def _fill_tokens(self, step: Step, num_tokens: int) -> None:
        token_ids = np.fromiter(chain.from_iterable(map(_new_tokens, step.rows)), dtype=np.int64)
        if len(token_ids) != num_tokens:
            raise Internal("a row reaches beyond the tokens of its sequence")
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise Internal(f"a token id outside the vocabulary of {self._vocab_size}")
        self._token_ids[:num_tokens] = token_ids

    def _fill_blocks(self, step: Step, context_lens: Ints) -> None:
        """The blocks of each row's context; entries beyond stay as they are, nothing reads them."""
        counts = -(-context_lens // self._limits.block_size)  # (num_rows,)
        if counts.max() > self._limits.max_blocks_per_row:
            raise Internal(f"a context of {context_lens.max()} tokens is longer than a row may be")
        tables = [
            row.sequence.block_ids[:count] for row, count in zip(step.rows, counts.tolist(), strict=True)
        ]
        blocks = np.fromiter(chain.from_iterable(tables), dtype=np.int64)
        if len(blocks) != counts.sum():
            raise Internal("a row's context reaches beyond its blocks")
        if blocks.min() < 1 or blocks.max() >= self._num_blocks:
            raise Internal(f"a block id outside 1 … {self._num_blocks - 1}")
        rows, columns = _places_in_runs(counts)
        self._block_tables[rows, columns] = blocks

    def _fill_places(self, lengths: Ints, computed: Ints, ends: Ints) -> None:
        """Positions and slots of all tokens."""
        num_tokens, block_size = int(ends[-1]), self._limits.block_size
        rows, offsets = _places_in_runs(lengths)  # (num_tokens,)
        positions = computed[rows] + offsets
        blocks = self._block_tables[rows, positions // block_size].astype(np.int64)
        self._positions[:num_tokens] = positions
        self._slots[:num_tokens] = blocks * block_size + positions % block_size

    def _fill_logit_tokens(self, step: Step, ends: Ints, every_logit: bool) -> int:
        wanted: Ints = ends - 1
        if every_logit:
            wanted = np.arange(int(ends[-1]), dtype=np.int64)
        else:
            wanted = wanted[np.array([row.samples for row in step.rows])]
        if len(wanted) > len(self._logit_tokens):
            raise Internal(f"{len(wanted)} logits wanted; at most {len(self._logit_tokens)} are allowed")
        self._logit_tokens[: len(wanted)] = wanted
        return len(wanted)


def _new_tokens(row: Row) -> list[int]:
    first = row.sequence.num_computed_tokens
    return row.sequence.token_ids[first : first + row.num_tokens]


def _places_in_runs(counts: Ints) -> tuple[Ints, Ints]:
    """For runs of these lengths, one after the other: the run of each element and its place in the run."""
    runs = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return runs, np.arange(len(runs)) - starts[runs]
