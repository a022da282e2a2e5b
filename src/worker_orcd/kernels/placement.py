"""Where the buffers of a traced forward pass lie in one arena: those never alive together share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer's size, and the first and the last operation that it must exist for."""

    size: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An offset for each, so that no two alive at once overlap; and the size of all. Ordered by `first`.

    Each takes the lowest gap that holds it.
    """
    offsets: list[int] = []
    alive: list[tuple[int, int, int]] = []  # offset, end, last; by offset
    total = 0
    for lifetime in lifetimes:
        alive = [entry for entry in alive if entry[2] >= lifetime.first]
        offset = _lowest_gap(alive, lifetime.size)
        offsets.append(offset)
        alive.append((offset, offset + lifetime.size, lifetime.last))
        alive.sort()
        total = max(total, offset + lifetime.size)
    return offsets, total


def _lowest_gap(alive: Sequence[tuple[int, int, int]], size: int) -> int:
    offset = 0
    for start, end, _ in alive:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset
