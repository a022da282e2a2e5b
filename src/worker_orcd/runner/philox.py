"""
The counter-based random generator Philox4x32-10: random words as a pure function of a key and a counter.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10

Words = tuple[int, int, int, int]  # uint32


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random uint32 of a counter of four and a key of two uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK32,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK32,
        )
        k0 = (k0 + _WEYL_0) & _MASK32
        k1 = (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits: the first two words of Philox(key = seed, counter = position).

    `seed` is a uint64, `position` the index in its sequence of the token to be drawn. Low words come first.
    """
    counter = (position & _MASK32, position >> 32 & _MASK32, 0, 0)
    word_0, word_1, _, _ = philox4x32(counter, (seed & _MASK32, seed >> 32 & _MASK32))
    return ((word_0 << 32 | word_1) >> 11) * 2.0**-53
