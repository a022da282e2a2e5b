"""Pieces made by several threads come in order, few at a time, and failures come where they belong."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from worker_orcd.gguf.pieces import PieceStream, pieces_of_rows


def piece(number: int) -> NDArray[np.uint8]:
    return np.full(10, number, np.uint8)


def stream(jobs: list[partial[NDArray[np.uint8]]], threads: int = 3) -> PieceStream:
    return PieceStream(jobs, threads=threads, stage="testing", total=10 * len(jobs), on_progress=None)


def test_pieces_come_in_order() -> None:
    with stream([partial(piece, n) for n in range(50)]) as pieces:
        first = [int(p[0]) for p in pieces.take(70)]
        rest = [int(p[0]) for p in pieces.take(430)]
    assert first == list(range(7))
    assert rest == list(range(7, 50))


def test_few_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []
    lock = threading.Lock()

    def count(number: int) -> NDArray[np.uint8]:
        with lock:
            made.append(number)
        return piece(number)

    with stream([partial(count, n) for n in range(100)], threads=2) as pieces:
        taken = pieces.take(1000)
        next(taken)
        next(taken)
        assert len(made) <= 2 + 4 + 1
    assert len(made) < 10


def test_a_failure_is_raised_where_its_piece_is_taken() -> None:
    def fail() -> NDArray[np.uint8]:
        raise ValueError("no such piece")

    jobs = [partial(piece, 0), partial(fail), partial(piece, 2)]
    with stream(jobs) as pieces:
        assert [int(p[0]) for p in pieces.take(10)] == [0]
        with pytest.raises(ValueError, match="no such piece"):
            list(pieces.take(20))


def test_progress() -> None:
    told: list[tuple[str, int, int]] = []
    jobs = [partial(piece, n) for n in range(3)]
    with PieceStream(
        jobs, threads=1, stage="s", total=30, on_progress=lambda *what: told.append(what)
    ) as pieces:
        list(pieces.take(20))
        list(pieces.take(10))
    assert told == [("s", 10, 30), ("s", 20, 30), ("s", 30, 30)]


def test_slices_cover_all_rows() -> None:
    assert list(pieces_of_rows(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(pieces_of_rows(0, 4)) == []
