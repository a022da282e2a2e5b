"""Every weight format against the `gguf` package, bit for bit, and against vectors stored once with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf
from worker_orcd import quant
from worker_orcd.gguf.types import TENSOR_TYPES
from worker_orcd.quant import WeightFormat

# Where each format keeps its float16 scales and minimums. MXFP4's scale is the exponent in byte 0.
SCALES: dict[str, tuple[int, ...]] = {
    "F32": (),
    "F16": (0,),
    "BF16": (),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "MXFP4": (),
}
EXTREME = np.array(
    [0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, 1.0, -1.0, 0.1, 65504.0, -65504.0], "<f2"
)

each_format = pytest.mark.parametrize("fmt", quant.ALL, ids=lambda fmt: fmt.name)


def expected(fmt: WeightFormat, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, block_size) float32 by the `gguf` package, which warns where a scale is not finite."""
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(blocks.copy(), gguf.GGMLQuantizationType(fmt.ggml_type))
    return weights.reshape(len(blocks), fmt.block_size)


def random_blocks(fmt: WeightFormat, seed: int, n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, fmt.type_size), np.uint8)


def assert_same_bits(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """Equal as bits; NaN equals NaN, whose payload IEEE 754 leaves open."""
    assert found.dtype == wanted.dtype == np.float32
    assert found.shape == wanted.shape
    same = (found.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(found) & np.isnan(wanted))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ, first at {np.argwhere(~same)[0]}"


def test_every_format_is_registered_once_and_tested() -> None:
    assert sorted(f.name for f in quant.ALL) == sorted(SCALES)
    assert list(quant.FORMATS.values()) == list(quant.BY_NAME.values()) == list(quant.ALL)


def test_a_file_may_hold_exactly_the_formats_that_we_execute() -> None:
    layouts = {f.ggml_type: (f.name, f.block_size, f.type_size) for f in quant.ALL}
    assert layouts == {number: (t.name, t.block_size, t.type_size) for number, t in TENSOR_TYPES.items()}


@each_format
def test_layout(fmt: WeightFormat) -> None:
    number = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == number
    assert (fmt.block_size, fmt.type_size) == gguf.GGML_QUANT_SIZES[number]
    assert fmt.row_bytes(4 * fmt.block_size) == 4 * fmt.type_size


@each_format
def test_random_blocks(fmt: WeightFormat) -> None:
    """Any bytes at all, so infinite and NaN scales too: they propagate, and nothing warns."""
    blocks = random_blocks(fmt, fmt.ggml_type, 200_000 // fmt.type_size)
    assert_same_bits(fmt.dequantize(blocks), expected(fmt, blocks))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@each_format
def test_extreme_scales(fmt: WeightFormat, data: st.DataObject) -> None:
    """Subnormal, largest, zero and negative scales with any weights: the same bits, and no NaN."""
    blocks = random_blocks(fmt, data.draw(st.integers(0, 2**32)), 8)
    for start in SCALES[fmt.name]:
        scales = data.draw(st.lists(st.sampled_from(EXTREME.tolist()), min_size=8, max_size=8))
        blocks[:, start : start + 2] = np.array(scales, "<f2").view(np.uint8).reshape(8, 2)
    if fmt.name == "MXFP4":
        blocks[:, 0] = data.draw(
            st.lists(st.sampled_from([0, 1, 2, 127, 253, 254, 255]), min_size=8, max_size=8)
        )
    weights = fmt.dequantize(blocks)
    assert_same_bits(weights, expected(fmt, blocks))
    if fmt.name not in ("F32", "BF16"):  # whose weights may themselves be NaN
        assert not np.isnan(weights).any()
    if SCALES[fmt.name]:
        assert np.isfinite(weights).all()


@each_format
def test_all_zero_and_all_one_bits(fmt: WeightFormat) -> None:
    blocks = np.stack([np.full(fmt.type_size, byte, np.uint8) for byte in (0x00, 0x55, 0xAA, 0xFF)])
    assert_same_bits(fmt.dequantize(blocks), expected(fmt, blocks))


@each_format
def test_stored_vectors(fmt: WeightFormat, data_directory: Path) -> None:
    with np.load(data_directory / "quant" / f"{fmt.name}.npz") as stored:
        blocks, bits = stored["blocks"], stored["bits"]
    assert len(blocks) >= 12
    assert_same_bits(fmt.dequantize(blocks), bits.view(np.float32))


@each_format
def test_rows_of_a_mapped_tensor(fmt: WeightFormat) -> None:
    """Read-only, strided input gives fresh, writable, contiguous rows."""
    blocks = random_blocks(fmt, 7, 24)
    tensor = blocks.reshape(6, 4 * fmt.type_size)
    tensor.flags.writeable = False
    rows = fmt.dequantize_rows(tensor[1::2])  # (3, 4 * block_size)
    assert rows.shape == (3, 4 * fmt.block_size)
    assert rows.flags.c_contiguous
    assert rows.flags.writeable
    assert not np.shares_memory(rows, tensor)
    assert_same_bits(rows, expected(fmt, blocks).reshape(6, -1)[1::2])


def test_mxfp4_has_the_values_of_the_specification() -> None:
    """OCP Microscaling Formats v1.0, section 5.3.3: E2M1 has eight magnitudes; E8M0 127 is 2^0."""
    block = np.zeros((1, 17), np.uint8)
    block[0, 0] = 127
    block[0, 1:] = np.arange(16)  # low nibbles are the codes 0 to 15; high nibbles are 0
    weights = quant.BY_NAME["MXFP4"].dequantize(block)[0]
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert weights[:16].tolist() == magnitudes + [-magnitude for magnitude in magnitudes]
    assert weights[16:].tolist() == [0] * 16


def test_an_infinite_scale_is_seen_in_the_weights() -> None:
    block = np.full((1, 18), 0x99, np.uint8)  # every weight is 9 - 8 = 1 times the scale
    block[0, :2] = np.array([np.inf], "<f2").view(np.uint8)
    assert np.isposinf(quant.BY_NAME["Q4_0"].dequantize(block)).all()
