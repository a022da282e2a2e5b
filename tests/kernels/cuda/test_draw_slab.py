"""Room for what changes single logits: taken once, and what happens to rows that find none."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from worker_orcd.kernels.cuda.draw_slab import (
    MAX_VOCAB,
    MOST_ENTRIES,
    MOST_UNCOUNTED,
    SAMPLES,
    SMALLEST_ENTRIES,
    DrawSlab,
    Int,
    entries_needed,
)
from worker_orcd.kernels.draw import Draw
from worker_orcd.kernels.entries import EXCLUDED, Entries
from worker_orcd.sequence import SamplingParams


def draw_of(token_ids: Iterable[int] = (), excluded: Iterable[int] = ()) -> Draw:
    """With a penalty, where there are tokens."""
    seen = list(token_ids)
    params = SamplingParams(presence_penalty=1.0 if seen else 0.0)
    entries = Entries(params, 1, MAX_VOCAB)
    entries.take_in(seen)
    return Draw(params=params, position=9, excluded=frozenset(excluded), entries=entries if seen else None)


def test_room_for_entries_never_grows_and_who_finds_none_fails_alone() -> None:
    filled = DrawSlab(MAX_VOCAB, 5, torch.device("cpu"))
    held = [filled.entries.data_ptr(), filled.saved.data_ptr(), len(filled.saved)]
    many = draw_of(range(SMALLEST_ENTRIES - 1))
    wanted, failures = filled.fill([draw_of(), many, many, draw_of(excluded=[70_000]), draw_of()])
    assert wanted.adjusts and list(failures) == [2]
    assert failures[2].code == "VRAM_OOM"
    filled.upload()
    records = filled.entries.numpy().view("<i4").reshape(-1, 4)
    assert records[:, 0].tolist() == [*range(SMALLEST_ENTRIES - 1), 70_000]
    assert records[-1, 1] == EXCLUDED
    flags = filled.ints.numpy().view("<i8").reshape(len(Int), -1)[Int.FLAGS]
    assert [bool(flag & SAMPLES) for flag in flags.tolist()] == [True, True, False, True, True]
    assert filled.fill([many])[1] == {}  # alone it has room
    assert held == [filled.entries.data_ptr(), filled.saved.data_ptr(), len(filled.saved)]


def test_any_row_alone_has_room() -> None:
    """Whatever its penalties, biases and stop tokens name."""
    vocab = SMALLEST_ENTRIES + 10
    filled = DrawSlab(vocab, 1, torch.device("cpu"), entries_needed(vocab, 1, 1 << 20))
    everything = draw_of(range(vocab), range(64))
    assert filled.fill([everything])[1] == {}
    assert MOST_ENTRIES >= MAX_VOCAB + MOST_UNCOUNTED
