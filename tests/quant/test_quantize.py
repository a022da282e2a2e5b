"""Quantisers: the bytes of the `gguf` package where it has one, llama.cpp's precision elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf
from worker_orcd import quant
from worker_orcd.quant import BY_NAME, WeightFormat
from worker_orcd.quant.fields import bits_in_order, half_bytes, halves, pack_bits, pack_planes, planes
from worker_orcd.quant.scales import farthest, fit_scale, fit_scale_and_minimum, reciprocal, rounded

EXACT = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")  # that `gguf` can make
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
# Root mean square error of gaussian weights in units of their standard deviation: what the bits allow.
ERRORS = {
    "F32": 0.0,
    "F16": 0.0003,
    "BF16": 0.002,
    "Q4_0": 0.087,
    "Q4_1": 0.079,
    "Q5_0": 0.043,
    "Q5_1": 0.039,
    "Q8_0": 0.0056,
    "Q2_K": 0.29,
    "Q3_K": 0.155,
    "Q4_K": 0.073,
    "Q5_K": 0.037,
    "Q6_K": 0.018,
    "IQ4_NL": 0.077,
    "MXFP4": 0.116,
}

each_format = pytest.mark.parametrize(
    "fmt", [fmt for fmt in quant.ALL if fmt.quantize is not None], ids=lambda fmt: fmt.name
)


def gaussian(rows: int, seed: int = 3, std: float = 0.02) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, 512)) * std).astype(np.float32)


def by_gguf(weights: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        stored = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(weights), -1)


def error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((found.astype(np.float64) - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("std", [0.02, 1.0, 300.0, 1e-6])
def test_the_bytes_of_the_gguf_package(name: str, std: float) -> None:
    weights = gaussian(64, std=std)
    weights[0] = 0
    weights[1, :40] = -0.0
    weights[2] = std
    weights[3] = np.abs(weights[3])
    weights[4] = -np.abs(weights[4])
    weights[5, 7] = 40 * std
    assert np.array_equal(BY_NAME[name].quantize_rows(weights), by_gguf(weights, name))


@pytest.mark.parametrize("name", EXACT)
@given(values=st.lists(st.floats(-60000, 60000, width=16, allow_subnormal=True), min_size=64, max_size=64))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_bytes_of_the_gguf_package_for_awkward_weights(name: str, values: list[float]) -> None:
    weights = np.array([values], np.float32)
    assert np.array_equal(BY_NAME[name].quantize_rows(weights), by_gguf(weights, name))


@each_format
def test_the_error_is_what_the_bits_allow(fmt: WeightFormat) -> None:
    weights = gaussian(256)
    found = error(fmt.dequantize_rows(fmt.quantize_rows(weights)), weights)
    assert found <= ERRORS[fmt.name]
    assert found >= 0.9 * ERRORS[fmt.name] or fmt.name in ("F16", "BF16")


@pytest.mark.parametrize("name", SEARCHED)
def test_as_precise_as_llamacpp(name: str, data_directory: Path) -> None:
    """Gaussian, Laplace, shifted and heavy-tailed weights, and what llama.cpp made of them."""
    with np.load(data_directory / "quant" / "quantized_by_llamacpp.npz") as stored:
        weights, theirs = stored["weights"].astype(np.float32), stored[name]
    fmt = BY_NAME[name]
    ours = fmt.quantize_rows(weights)
    assert ours.shape == theirs.shape
    for part in (slice(0, 24), slice(24, 40), slice(40, 48), slice(48, 64)):
        our_error = error(fmt.dequantize_rows(ours[part]), weights[part])
        their_error = error(fmt.dequantize_rows(theirs[part]), weights[part])
        assert our_error <= 1.03 * their_error


@each_format
def test_what_is_hard_to_scale(fmt: WeightFormat) -> None:
    """Zeros, one weight, equal weights, subnormal numbers, large ones: finite, and near what they were."""
    rows = np.zeros((7, 256), np.float32)
    rows[1, 100] = -3.0
    rows[2] = 0.5
    rows[3] = -0.5
    rows[4] = np.linspace(-1e-40, 1e-40, 256)
    rows[5] = np.linspace(-65504, 65504, 256)
    rows[6] = np.linspace(-1e-30, 1e-30, 256)
    found = fmt.dequantize_rows(fmt.quantize_rows(rows))
    assert np.isfinite(found).all()
    assert (found[0] == 0).all()
    for row, weights in zip(found[1:], rows[1:], strict=True):
        assert np.abs(row - weights).max() <= max(0.4 * np.abs(weights).max(), 1e-30)


@each_format
def test_blocks_do_not_depend_on_each_other(fmt: WeightFormat) -> None:
    weights = gaussian(40)
    whole = fmt.quantize_rows(weights)
    alone = np.concatenate([fmt.quantize_rows(weights[n : n + 1]) for n in range(40)])
    assert np.array_equal(whole, alone)
    assert not np.shares_memory(whole, weights)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_1", "MXFP4"])
def test_what_was_quantised_stays_the_same(name: str) -> None:
    fmt = BY_NAME[name]
    once = fmt.dequantize_rows(fmt.quantize_rows(gaussian(32)))
    assert np.array_equal(fmt.dequantize_rows(fmt.quantize_rows(once)), once)


def test_a_format_may_be_for_reading_only() -> None:
    fmt = WeightFormat(
        name="IQ9", ggml_type=99, block_size=32, type_size=18, dequantize=BY_NAME["Q4_0"].dequantize
    )
    with pytest.raises(ValueError, match="IQ9 cannot be made here, only read"):
        fmt.quantize_rows(gaussian(1))


# -- parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_are_read_back(bits: int) -> None:
    values = np.random.default_rng(1).integers(0, 1 << bits, (5, 3, 64), np.uint8)
    assert np.array_equal(planes(pack_planes(values, bits), bits), values)


def test_bits_and_halves_are_read_back() -> None:
    bits = np.random.default_rng(1).integers(0, 2, (5, 32), np.uint8)
    assert np.array_equal(bits_in_order(pack_bits(bits)), bits)
    values = np.array([0.5, -2.0, 1e9], np.float32)
    assert halves(half_bytes(values), 0)[:, 0].tolist() == [0.5, -2.0, np.inf]


def test_a_reciprocal_is_always_a_number() -> None:
    scales = np.array([4.0, -0.5, 0.0, 1e-40, -1e-38], np.float32)
    assert reciprocal(scales).tolist() == [0.25, -2.0, 0.0, 0.0, 0.0]


def test_farthest_keeps_the_sign() -> None:
    rows = np.array([[1.0, -3.0, 2.0], [2.0, -2.0, 1.0]], np.float32)
    assert farthest(rows).tolist() == [[-3.0], [2.0]]


def test_the_scale_is_the_best_of_those_tried() -> None:
    """Against trying every scale on a fine grid: integers -8 to 7, errors weighted by the square."""
    weights = gaussian(50)[:, :16]
    targets = [-8 - step / 10 for step in range(-9, 10)]
    scales = fit_scale(weights, rounded(-8, 7), targets)

    def cost(row: NDArray[np.float32], scale: float) -> float:
        codes = np.clip(np.rint(row / scale), -8, 7)
        return float(np.sum(row**2 * (scale * codes - row) ** 2))

    for row, scale in zip(weights.astype(np.float64), scales.tolist(), strict=True):
        extreme = row[np.abs(row).argmax()]
        grid = [extreme / target for target in np.linspace(-9, -7, 400)]
        assert cost(row, scale) <= 1.6 * min(cost(row, tried) for tried in grid)


def test_scale_and_minimum_find_a_line() -> None:
    """Weights that are exactly 0.25 q - 1.5 are found to be; positive ones have no minimum below 0."""
    codes = np.random.default_rng(2).integers(0, 16, (8, 32)).astype(np.float32)
    codes[:, 0], codes[:, 1] = 0, 15
    weights = 0.25 * codes - 1.5
    scales, minimums = fit_scale_and_minimum(weights, np.abs(weights) + 1, 15, [14.5, 15.0, 15.5])
    assert scales == pytest.approx(np.full(8, 0.25), rel=1e-5)
    assert minimums == pytest.approx(np.full(8, 1.5), rel=1e-5)
    scales, minimums = fit_scale_and_minimum(weights + 9, np.ones_like(weights), 15, [15.0])
    assert (minimums == 0).all()
    assert (scales > 0.25).all()
