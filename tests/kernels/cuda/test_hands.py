"""What is read by several threads is what one would have read, and is over when the call is."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from worker_orcd.kernels.cuda.hands import Hands


def random_bytes(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 99, 100, 199, 1000, 12345])
def test_every_byte_is_copied_and_none_beside(count: int, length: int) -> None:
    hands, source = Hands(count, share=100), random_bytes(length)
    target = np.full(length + 2, 7, np.uint8)
    hands.copy(source, target[1:-1])
    assert np.array_equal(target[1:-1], source) and target[0] == target[-1] == 7
    hands.close()


@pytest.mark.parametrize("count", [1, 3])
def test_the_largest_of_a_column_is_found_wherever_it_is(count: int) -> None:
    hands = Hands(count, share=100)
    for row in (0, 1, 100, 332, 333, 998, 999):
        rows = np.minimum(random_bytes(17000).reshape(1000, 17), 200)
        rows[:, 1] = 255
        rows[row, 0] = 201
        assert hands.largest(rows, 0) == 201
    assert hands.largest(np.zeros((0, 17), np.uint8), 0) == 0
    hands.close()


def test_little_is_no_work_for_others() -> None:
    hands, before = Hands(8, share=100), threading.active_count()
    hands.copy(random_bytes(199), np.empty(199, np.uint8))
    assert threading.active_count() == before
    hands.copy(random_bytes(400), np.empty(400, np.uint8))
    assert threading.active_count() > before
    hands.close()
    assert threading.active_count() == before


def test_a_failure_of_any_of_them_is_told_once_the_others_have_ended() -> None:
    """They write to memory that the caller will use again."""

    class Rows:
        """Fails for one part; the others take long."""

        shape = 4, 1

        def __init__(self, failing: int) -> None:
            self.failing, self.failed, self.ended = failing, threading.Event(), list[int]()

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: tuple[slice, int]) -> NDArray[np.uint8]:
            if index[0].start == self.failing:
                self.failed.set()
                raise OSError("the file has no more")
            self.failed.wait(60)
            time.sleep(0.02)
            self.ended.append(index[0].start)
            return np.zeros(1, np.uint8)

    hands = Hands(4, share=1)
    for failing in range(4):
        rows: Any = Rows(failing)
        with pytest.raises(OSError, match="the file has no more"):
            hands.largest(rows, 0)
        assert sorted(rows.ended) == [part for part in range(4) if part != failing]
    hands.close()
