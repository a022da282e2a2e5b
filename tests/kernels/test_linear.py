"""Every weight format on every instruction set: right, and the same bits however it is run."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.products import (
    HALVES,
    Product,
    in_a_fresh_process,
    make_product,
    pack,
    random_activations,
    random_rows,
    relative_error,
    run,
    same_bits,
)
from worker_orcd.kernels.cpu.library import Kind, Library, Op
from worker_orcd.quant import ALL, BY_NAME

NAMES = [f.name for f in ALL]
FLOATS = ("F32", "F16", "BF16")
QUANTISED = [name for name in NAMES if name not in FLOATS]
ERRORS = {8: 2e-2, 16: 2e-4, 32: 2e-6}
TOKENS = (1, 2, 3, 4, 7, 8, 9, 64)


pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def modes(name: str) -> tuple[int, ...]:
    return (32,) if name in FLOATS else (8, 16, 32)


def expect_same_bits(product: Product, x: np.ndarray, activations: int, expected: np.ndarray) -> None:
    """Any number of tokens, from the start and from the end of x, one and two threads."""
    for threads in (1, 2):
        product.library.set_threads(threads)
        for tokens in TOKENS:
            if tokens > len(x):
                continue
            for start in {0, len(x) - tokens}:
                found = product(x[start : start + tokens], activations)
                assert same_bits(found, expected[start : start + tokens]), (threads, tokens, start)


# n is no multiple of 16; for formats with blocks of 32, k is no multiple of 64 or 256
@pytest.mark.parametrize("name", NAMES)
def test_one_answer_on_every_path(library: Library, isas: list[str], name: str) -> None:
    k = 256 if BY_NAME[name].block_size == 256 else 288 if name not in FLOATS else 77
    product = make_product(library, name, 37, k)
    x = random_activations(np.random.default_rng(1), 64, k)
    exact = x.astype(np.float64) @ product.weights.T.astype(np.float64)
    for activations in modes(name):
        library.set_threads(1)
        library.force_isa("scalar")
        expected = product(x, activations)
        assert relative_error(expected, exact) < ERRORS[activations]
        for isa in isas:
            library.force_isa(isa)
            expect_same_bits(product, x, activations, expected)


@pytest.mark.parametrize(("n", "k"), [(1, 8192), (16, 256), (2064, 512), (50, 5120)])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_1", "F16"])
def test_shapes(library: Library, isas: list[str], name: str, n: int, k: int) -> None:
    product = make_product(library, name, n, k)
    x = random_activations(np.random.default_rng(2), 9, k)
    exact = x.astype(np.float64) @ product.weights.T.astype(np.float64)
    for activations in modes(name):
        library.force_isa(isas[-1])
        expected = product(x, activations)
        assert relative_error(expected, exact) < ERRORS[activations]
        for isa in isas[1:]:
            library.force_isa(isa)
            expect_same_bits(product, x, activations, expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F32"])
def test_many_tokens_in_several_token_blocks(library: Library, isas: list[str], name: str) -> None:
    product = make_product(library, name, 48, 2048)
    x = random_activations(np.random.default_rng(3), 300, 2048)
    one_by_one = np.concatenate([product(x[t : t + 1], 8) for t in range(len(x))])
    for isa in isas[1:]:
        library.force_isa(isa)
        for threads in (1, 2):
            library.set_threads(threads)
            assert same_bits(product(x, 8), one_by_one)


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_is_what_quant_says(library: Library, name: str) -> None:
    """Every bit random, scales of every size included; infinite and NaN scales too."""
    weight_format = BY_NAME[name]
    n, k = 35, weight_format.block_size * 4 + (3 if weight_format.block_size == 1 else 0)
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 256, (n, weight_format.row_bytes(k)), dtype=np.uint8)
    for extreme, bits in enumerate((0x7C00, 0xFC00, 0x0001, 0x8000, 0x7BFF, 0x03FF)):
        for at in HALVES.get(name, ()):
            rows[extreme, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
    if name == "MXFP4":
        rows[:4, 0] = (0, 1, 2, 255)
    expected = weight_format.dequantize_rows(rows)
    packed = pack(library, weight_format, rows, k)
    found = np.empty((n, k), np.float32)
    token_ids = rng.permutation(n).astype(np.int32)
    for threads in (1, 2):
        library.set_threads(threads)
        operation = Op(
            kind=Kind.EMBED, out=found.ctypes.data, ldout=k, n=n, k=k,
            weight=packed.ctypes.data, format=weight_format.ggml_type,
        )  # fmt: skip
        assert run(library, [operation], n, token_ids) == 0
        nan = np.isnan(expected[token_ids])
        assert (np.isnan(found) == nan).all()
        assert same_bits(np.where(nan, 0, found), np.where(nan, 0, expected[token_ids]))


@pytest.mark.parametrize("name", NAMES)
def test_packing_adds_nothing_and_goes_in_pieces(library: Library, name: str) -> None:
    weight_format = BY_NAME[name]
    n, k = 80, 512
    rows = np.ascontiguousarray(random_rows(np.random.default_rng(5), name, n, k))
    whole = pack(library, weight_format, rows, k)
    assert whole.nbytes == rows.nbytes
    pieces = np.zeros_like(whole)
    for first, count in ((64, 16), (0, 16), (16, 48)):
        source = rows[first:].ctypes.data
        assert library.pack(weight_format.ggml_type, (n, k), (first, count), source, pieces.ctypes.data)
    assert (pieces == whole).all()


def test_what_cannot_be_packed(library: Library) -> None:
    q4_0, q4_k = BY_NAME["Q4_0"].ggml_type, BY_NAME["Q4_K"].ggml_type
    assert library.packed_bytes(q4_0, 16, 33) is None
    assert library.packed_bytes(q4_k, 16, 128) is None
    assert library.packed_bytes(q4_0, 0, 32) is None
    assert library.packed_bytes(q4_0, -16, 32) is None
    assert library.packed_bytes(q4_0, 1 << 62, 1 << 30) is None
    for unknown in (-1, 4, 5, 9, 15, 16, 40, 1000):
        assert library.packed_bytes(unknown, 16, 256) is None
    memory = np.zeros(4096, np.uint8)
    for rows in ((8, 16), (0, 33), (32, 1), (-16, 16), (0, -1)):
        assert not library.pack(q4_0, (32, 32), rows, memory.ctypes.data, memory.ctypes.data)
    assert not memory.any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "F32"])
def test_an_operation_that_cannot_run_is_refused(library: Library, name: str) -> None:
    product = make_product(library, name, 16, 256)
    x = np.ones((1, 256), np.float32)
    out = np.zeros((1, 16), np.float32)
    for change in (
        {"activations": 7},
        {"k": 255 if name != "F32" else 0},
        {"n": 0},
        {"format": 99},
        {"weight": None},
    ):
        operation = product.operation(x, out, 8)
        for field, value in change.items():
            setattr(operation, field, value)
        assert run(library, [operation], 1) < 0, change
    assert not out.any()
    assert run(library, [product.operation(x, out, 8)], 0) == 0  # no tokens: nothing to do
    assert not out.any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "BF16"])
def test_bias_is_added_last(library: Library, isas: list[str], name: str) -> None:
    product = make_product(library, name, 37, 256)
    rng = np.random.default_rng(6)
    x = random_activations(rng, 5, 256)
    bias = rng.standard_normal(37).astype(np.float32)
    for isa in isas:
        library.force_isa(isa)
        for activations in modes(name):
            assert same_bits(product(x, activations, bias), product(x, activations) + bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_token_harms_no_other(library: Library, isas: list[str], name: str, poison: float) -> None:
    product = make_product(library, name, 32, 256)
    x = random_activations(np.random.default_rng(7), 11, 256)
    for activations in modes(name):
        clean = product(x, activations)
        sick = x.copy()
        sick[3, 200] = poison
        for isa in isas:
            library.force_isa(isa)
            found = product(sick, activations)
            assert not np.isfinite(found[3]).any()
            assert activations == 32 or np.isnan(found[3]).all()
            others = np.arange(11) != 3
            assert same_bits(found[others], clean[others])


@pytest.mark.parametrize("activations", [8, 16, 32])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q2_K"])
def test_activations_of_any_size(library: Library, isas: list[str], name: str, activations: int) -> None:
    product = make_product(library, name, 16, 512)
    x = random_activations(np.random.default_rng(8), 6, 512)
    x[0] = 0
    x[1] *= np.float32(1e-40)  # subnormal: may count as zero, but nothing worse
    x[2] *= np.float32(1e-25)
    x[3] *= np.float32(1e25)
    x[4] = np.where(np.arange(512) < 480, 0, x[4])  # all but one block zero
    exact = x.astype(np.float64) @ product.weights.T.astype(np.float64)
    library.force_isa(isas[0])
    expected = product(x, activations)
    assert not expected[0].any()
    assert np.abs(expected[1]).max() < 1e-35
    for token in (2, 3, 4, 5):  # of one token the error varies more than of many
        assert relative_error(expected[token], exact[token]) < 2 * ERRORS[activations]
    for isa in isas:
        library.force_isa(isa)
        assert same_bits(product(x, activations), expected)


@pytest.mark.parametrize("name", QUANTISED)
def test_largest_sums_do_not_overflow(library: Library, isas: list[str], name: str) -> None:
    """All weight bits set or clear, activations all at plus or minus their maximum."""
    weight_format = BY_NAME[name]
    k = 512
    signs = np.random.default_rng(9).choice([-1.0, 1.0], (4, k)).astype(np.float32)
    x = np.concatenate([np.ones((1, k), np.float32), -np.ones((1, k), np.float32), signs])
    for fill in (0x00, 0xFF, 0x80, 0x7F):
        rows = np.full((16, weight_format.row_bytes(k)), fill, np.uint8)
        blocks = rows.reshape(16, -1, weight_format.type_size)
        for at in HALVES.get(name, ()):
            blocks[:, :, at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
        if name == "MXFP4":
            blocks[:, :, 0] = 120
        weights = weight_format.dequantize_rows(rows)
        product = Product(library, weight_format, 16, k, pack(library, weight_format, rows, k), weights)
        exact = x.astype(np.float64) @ weights.T.astype(np.float64)
        magnitude = np.abs(weights).sum(axis=1)
        for isa in isas:
            library.force_isa(isa)
            for activations in (8, 16, 32):  # plus and minus the maximum are exact in int8
                assert (np.abs(product(x, activations) - exact) <= 1e-5 * magnitude).all(), (isa, activations)


def test_rows_of_logits(library: Library) -> None:
    """`rows` chooses between the two counts of a batch."""
    product = make_product(library, "Q4_0", 16, 64)
    x = random_activations(np.random.default_rng(10), 4, 64)
    out = np.zeros((4, 16), np.float32)
    operation = product.operation(x, out, 8)
    operation.rows = 1
    assert run(library, [operation], 4) == 0  # num_logits is 0
    assert not out.any()


GUARDED = """
    import numpy as np
    from dataclasses import replace
    from kernels.products import before_a_guard_page, make_product, random_activations, run, same_bits
    from worker_orcd.kernels.cpu.build import load_library
    from worker_orcd.kernels.cpu.library import Kind, Op
    from worker_orcd.quant import ALL

    library = load_library()
    for weight_format in ALL:
        product = make_product(library, weight_format.name, 32, 256)
        x = random_activations(np.random.default_rng(0), 9, 256)
        expected = {mode: product(x, mode) for mode in (8, 16, 32)}
        guarded = replace(product, packed=before_a_guard_page(product.packed))
        y = before_a_guard_page(x)
        for isa in ("scalar", "avx2", "avx512vnni", "neon"):
            if not library.force_isa(isa):
                continue
            for mode, whole in expected.items():
                out = before_a_guard_page(np.zeros((9, 32), np.float32))
                assert run(library, [guarded.operation(y, out, mode)], 9) == 0
                assert same_bits(out, whole)
        out = before_a_guard_page(np.zeros((32, 256), np.float32))
        ids = before_a_guard_page(np.arange(32, dtype=np.int32))
        operation = Op(
            kind=Kind.EMBED, out=out.ctypes.data, ldout=256, n=32, k=256,
            weight=guarded.packed.ctypes.data, format=weight_format.ggml_type,
        )
        assert run(library, [operation], 32, ids) == 0
        assert same_bits(out, product.weights)
    print("within bounds")
"""


def test_nothing_is_read_or_written_beyond_the_end() -> None:
    """Weights, activations and results each end where a page begins that may not be touched."""
    assert in_a_fresh_process(GUARDED) == "within bounds\n"
