"""Philox4x32-10 against the known answers published with Random123 (kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd.runner.philox import Words, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: Words, key: tuple[int, int], expected: Words):
    assert philox4x32(counter, key) == expected


def test_uniform_is_the_first_words_of_seed_and_position():
    word_0, word_1, _, _ = philox4x32((7, 0, 0, 0), (5, 3))
    assert uniform(5 + (3 << 32), 7) == ((word_0 << 32 | word_1) >> 11) / 2**53
    assert (
        uniform(0, 1 << 32)
        == (philox4x32((0, 1, 0, 0), (0, 0))[0] * 2**21 + (philox4x32((0, 1, 0, 0), (0, 0))[1] >> 11)) / 2**53
    )


def test_uniform_has_53_bits():
    assert {int(uniform(1, position) * 2**53) % 2 for position in range(20)} == {0, 1}


def test_uniform_is_uniform_over_positions_and_seeds():
    for values in (
        np.array([uniform(123, position) for position in range(4000)]),
        np.array([uniform(seed, 9) for seed in range(4000)]),
    ):
        assert values.min() >= 0 and values.max() < 1
        counts = np.bincount((values * 20).astype(int), minlength=20)
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
        assert len(np.unique(values)) == len(values)
