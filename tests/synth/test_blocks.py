"""Random blocks: of every format, with the mean and standard deviation asked for, and as files have them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from worker_orcd import quant
from worker_orcd.quant import BY_NAME, WeightFormat
from worker_orcd.quant.fields import k_scales_and_mins, pack_k_scales
from worker_orcd.synth.blocks import random_blocks, random_bytes

WEIGHTS = 1 << 19
each_format = pytest.mark.parametrize("fmt", quant.ALL, ids=lambda fmt: fmt.name)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


def weights_of(fmt: WeightFormat, std: float, seed: int = 1) -> NDArray[np.float64]:
    blocks = random_blocks(fmt.name, generator(seed), WEIGHTS // fmt.block_size, std)
    assert blocks.shape == (WEIGHTS // fmt.block_size, fmt.type_size)
    assert blocks.dtype == np.uint8
    return fmt.dequantize(blocks).astype(np.float64)


@each_format
@pytest.mark.parametrize("std", [1.0, 0.03, 0.0027])
def test_mean_and_standard_deviation(fmt: WeightFormat, std: float) -> None:
    """2^19 weights: the standard error of the mean is 0.0014, of K-quants' blocks (2,048) a percent."""
    weights = weights_of(fmt, std)
    assert abs(weights.mean()) < 0.01 * std
    assert weights.std() == pytest.approx(std, rel=0.015)
    assert np.abs(weights).max() < 6 * std


@each_format
def test_rows_differ(fmt: WeightFormat) -> None:
    """No two rows of 256 weights are alike, as they would be if a pool were used again."""
    rows = weights_of(fmt, 1.0).reshape(-1, 256)
    similarity = np.corrcoef(rows[:64])
    assert np.abs(similarity[~np.eye(64, dtype=bool)]).max() < 0.4


@each_format
def test_the_generator_decides(fmt: WeightFormat) -> None:
    first, again, other = (random_blocks(fmt.name, generator(seed), 64, 0.1) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_may_have_a_mean(name: str) -> None:
    values = BY_NAME[name].dequantize(random_blocks(name, generator(2), 1 << 16, 0.1, mean=1.0))
    assert values.mean() == pytest.approx(1.0, abs=0.002)
    assert values.std() == pytest.approx(0.1, rel=0.02)


def test_blocks_of_codes_may_not() -> None:
    with pytest.raises(ValueError, match="mean of 0; asked for 1"):
        random_blocks("Q4_0", generator(2), 4, 0.1, mean=1.0)


def test_q8_0_has_no_minus_128_and_all_else() -> None:
    codes = random_blocks("Q8_0", generator(3), 20_000, 1.0)[:, 2:].view(np.int8)
    assert set(np.unique(codes).tolist()) == set(range(-127, 128))


def test_mxfp4_uses_two_neighbouring_scales_and_all_codes() -> None:
    blocks = random_blocks("MXFP4", generator(4), 20_000, 0.02)
    exponents = np.unique(blocks[:, 0])
    assert len(exponents) == 2
    assert exponents[1] - exponents[0] == 1
    assert len(np.unique(blocks[:, 1:])) == 256


def test_every_code_of_four_bits_is_as_likely() -> None:
    codes = random_blocks("Q4_K", generator(4), 4000, 0.02)[:, 16:]
    shares = np.bincount((codes & 15).ravel(), minlength=16) / codes.size
    assert np.abs(shares - 1 / 16).max() < 0.002


def test_packed_scales_are_read_back() -> None:
    scales, mins = generator(5).integers(0, 64, (2, 500, 8), np.uint8)
    found = k_scales_and_mins(pack_k_scales(scales, mins))
    assert np.array_equal(found[0], scales)
    assert np.array_equal(found[1], mins)


def test_random_bytes_of_any_length() -> None:
    assert [random_bytes(generator(1), n).size for n in (0, 1, 7, 8, 9, 4096)] == [0, 1, 7, 8, 9, 4096]
