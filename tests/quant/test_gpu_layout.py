"""The order of bits that GPU kernels read: nothing is lost or added, and it is what kernels expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker_orcd import quant
from worker_orcd.quant import WeightFormat
from worker_orcd.quant.gpu_layout import TILE, GpuLayout

each_format = pytest.mark.parametrize("fmt", quant.ALL, ids=lambda fmt: fmt.name)


def layout(fmt: WeightFormat) -> GpuLayout:
    assert fmt.gpu is not None
    return fmt.gpu


def random_rows(fmt: WeightFormat, n: int, k: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, fmt.row_bytes(k)), np.uint8)


@each_format
def test_every_bit_of_a_block_stands_once_in_codes_or_header(fmt: WeightFormat) -> None:
    bits = [*layout(fmt).codes.reshape(-1).tolist(), *layout(fmt).header.tolist()]
    assert sorted(bits) == list(range(8 * fmt.type_size))
    assert len(layout(fmt).codes) == fmt.block_size


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 200), blocks=st.integers(1, 12), seed=st.integers(0, 2**32))
@each_format
def test_unpacking_gives_back_every_byte(fmt: WeightFormat, n: int, blocks: int, seed: int) -> None:
    k = blocks * max(32, fmt.block_size)
    rows = random_rows(fmt, n, k, seed)
    packed = layout(fmt).pack(rows, k)
    assert packed.shape == (layout(fmt).sections(n, k).size,)
    assert np.array_equal(layout(fmt).unpack(packed, n, k), rows)


@each_format
def test_every_step_that_a_format_has_can_be_asked_for(fmt: WeightFormat) -> None:
    rows = random_rows(fmt, 70, 512)
    found = {len(layout(fmt).pack(rows, 512, step)) for step in layout(fmt).steps}
    assert len(found) == 1  # the steps that divide k need the same room
    for step in layout(fmt).steps:
        assert np.array_equal(layout(fmt).unpack(layout(fmt).pack(rows, 512, step), 70, 512, step), rows)


@each_format
def test_many_rows_are_packed_in_batches(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(fmt, 300, 256)
    whole = layout(fmt).pack(rows, 256)
    monkeypatch.setattr("worker_orcd.quant.gpu_layout._MAX_BITS", 1)
    assert np.array_equal(layout(fmt).pack(rows, 256), whole)
    assert np.array_equal(layout(fmt).unpack(whole, 300, 256), rows)


@each_format
@pytest.mark.parametrize(
    ("n", "k"), [(151936, 896), (9216, 3072), (50257, 768), (2880, 2880), (576, 1536), (201088, 2880)]
)
def test_the_size_grows_by_less_than_a_hundredth(fmt: WeightFormat, n: int, k: int) -> None:
    """Of matrices as models have them: 50257 rows are no multiple of 64, 2880 columns none of 128."""
    if k % fmt.block_size:
        pytest.skip("no whole blocks")
    size = layout(fmt).sections(n, k).size
    assert n * fmt.row_bytes(k) <= size <= 1.001 * n * fmt.row_bytes(k)


@each_format
def test_sections_are_aligned_for_wide_loads(fmt: WeightFormat) -> None:
    for n, k in ((1, 256), (65, 512), (64, 768)):
        assert all(start % 64 == 0 for start in layout(fmt).sections(n, k).starts)


@each_format
def test_columns_are_padded_only_where_64_does_not_divide_them(fmt: WeightFormat) -> None:
    if fmt.block_size == 256:
        assert 2560 % layout(fmt).step(2560) == 0
        return
    assert 576 % layout(fmt).step(576) == 0
    per_column = layout(fmt).sections(64, 64).size
    assert layout(fmt).sections(64, 96).size == 2 * per_column


def codes_of(packed: NDArray[np.uint8], fmt: WeightFormat, n: int, k: int) -> NDArray[np.int64]:
    """(n, k): unpacked as the module's text says, one weight at a time."""
    g = layout(fmt)
    sections, step = g.sections(n, k), g.step(k)
    width, steps = step // g.planes, k // step
    words = packed[: sections.starts[1]].view("<u4" if sections.word_size == 4 else "<u2").astype(np.int64)
    high = packed[sections.starts[1] : sections.starts[2]].view("<u2").astype(np.int64)
    codes = np.zeros((n, k), np.int64)
    for r in range(n):
        tile, row = divmod(r, TILE)
        for c in range(k):
            at, column = divmod(c, step)
            p, j = divmod(column, width)
            word = words[((tile * steps + at) * TILE + row) * width + j]
            codes[r, c] = word >> (p * g.low_bits) & ((1 << g.low_bits) - 1)
            if g.high_bits:
                shared = high[((tile * steps + at) * (TILE // g.share) + row // g.share) * width + j]
                shift = (p + 1) * g.low_bits % 16 + row % g.share * g.high_bits
                codes[r, c] |= (shared >> shift & ((1 << g.high_bits) - 1)) << g.low_bits
    return codes


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "Q5_0", "Q6_K", "Q2_K", "Q3_K"])
def test_words_are_where_the_description_says(name: str) -> None:
    """Weights read one at a time from the packed bytes: with a scale of one they are code less offset."""
    fmt = quant.BY_NAME[name]
    n, k = 70, 256
    rows = random_rows(fmt, n, k, 1)
    blocks = rows.reshape(-1, fmt.type_size)
    one = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if name in ("Q8_0", "Q4_0", "Q5_0"):
        blocks[:, 0:2] = one
    elif name == "Q6_K":
        blocks[:, 192:208], blocks[:, 208:] = 1, one
    elif name == "Q2_K":
        blocks[:, :16], blocks[:, 80:82], blocks[:, 82:] = 1, one, 0
    elif name == "Q3_K":  # all scales 33, of which 32 is the offset
        blocks[:, 96:104], blocks[:, 104:108], blocks[:, 108:] = 0x11, 0xAA, one
    codes = codes_of(layout(fmt).pack(rows, k), fmt, n, k)
    if name == "F16":
        assert np.array_equal(codes, rows.view("<u2"))
        return
    offset = {"Q8_0": 128, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q2_K": 0, "Q3_K": 4}[name]
    assert np.array_equal(codes - offset, fmt.dequantize_rows(rows).astype(np.int64))


def headers_of(name: str, rows: NDArray[np.uint8], k: int) -> NDArray[np.uint32]:
    """(32-bit words, 64) of the first tile and step."""
    g = layout(quant.BY_NAME[name])
    sections = g.sections(len(rows), k)
    words = g.pack(rows, k)[sections.starts[2] :].view("<u4")
    return words[: 16 * g.header_bytes(g.step(k)) // 64 * 64].reshape(-1, TILE)


def test_headers_hold_scales_as_pairs() -> None:
    fmt = quant.BY_NAME["Q4_K"]
    rows = random_rows(fmt, 64, 256)
    words = headers_of("Q4_K", rows, 256)
    scales, minimums = quant.fields.k_scales_and_mins(rows.reshape(-1, 144)[:, 4:16])
    for i in range(8):
        pair = (words[i // 4] >> (4 * (i % 4)) & 0x000F000F) | (words[2] >> (2 * i) & 0x00030003) << 4
        assert np.array_equal(pair & 0xFFFF, scales[:, i])
        assert np.array_equal(pair >> 16, minimums[:, i])
    assert np.array_equal(words[3], rows[:, :4].copy().view("<u4")[:, 0])


def test_two_rows_share_the_last_header_word_of_an_odd_number_of_halves() -> None:
    fmt = quant.BY_NAME["MXFP4"]
    rows = random_rows(fmt, 64, 192)  # steps of 64: two exponents a row and step
    g = layout(fmt)
    words = g.pack(rows, 192)[g.sections(64, 192).starts[2] :].view("<u4").reshape(3, 32)
    exponents = rows.reshape(64, 6, 17)[:, :, 0].astype(np.uint32)
    for step in range(3):
        pair = exponents[:, 2 * step] | exponents[:, 2 * step + 1] << 8
        assert np.array_equal(words[step], pair[0::2] | pair[1::2] << 16)


def test_a_format_without_a_layout_is_no_error_before_a_gpu_asks_for_one() -> None:
    fmt = WeightFormat(name="X", ggml_type=99, block_size=1, type_size=1, dequantize=quant.ALL[0].dequantize)
    assert fmt.gpu is None
