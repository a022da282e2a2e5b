"""
Threads that read a file's mapping side by side.

What a GPU takes in a second, one thread reads in five to ten: it waits for every page to be mapped, one after
the other. numpy lets go of the interpreter's lock while it copies or compares.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
MOST = 8  # threads: more wait for memory
SHARE = 1 << 20  # bytes that are worth a thread


class Hands:
    """The calling thread and some others. Used by one thread at a time; `close` ends the others."""

    def __init__(self, count: int = 0, share: int = SHARE) -> None:
        """`count`: threads in all, or as many as there are cores, up to `MOST`."""
        self._count = count or min(MOST, os.cpu_count() or 1)
        self._share = share
        self._others: ThreadPoolExecutor | None = None  # once there is something to share

    def close(self) -> None:
        if self._others is not None:
            self._others.shutdown()
            self._others = None

    def copy(self, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """(n,) to (n,)."""
        self._each(len(source), 1, lambda part: np.copyto(target[part], source[part]))

    def largest(self, rows: NDArray[np.uint8], column: int) -> int:
        """Of a column of (n, width), read whole; 0 where there are no rows."""
        found = self._each(len(rows), rows.shape[1], lambda part: int(rows[part, column].max(initial=0)))
        return max(found, default=0)

    def _each(self, count: int, size: int, work: Callable[[slice], T]) -> Sequence[T]:
        """`work` on all of `count` things of `size` bytes, in parts."""
        parts = max(1, min(self._count, count * size // self._share))
        ends = [count * part // parts for part in range(parts + 1)]
        slices = [slice(start, end) for start, end in itertools.pairwise(ends)]
        if parts > 1 and self._others is None:
            self._others = ThreadPoolExecutor(self._count - 1, thread_name_prefix="hands")
        others = [] if self._others is None else [self._others.submit(work, part) for part in slices[1:]]
        try:
            first = work(slices[0])
        finally:  # whatever happens, nobody writes any more once this is over
            wait(others)
        return [first, *(other.result() for other in others)]
