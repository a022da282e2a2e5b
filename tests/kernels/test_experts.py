"""Products with experts' matrices: right in every format, and the same bits however they are run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kernels.products import (
    ExpertArrays,
    ExpertProduct,
    Product,
    highest,
    in_a_fresh_process,
    make_experts,
    random_activations,
    relative_error,
    run,
    same_bits,
)
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.quant import ALL, BY_NAME

NAMES = [f.name for f in ALL]
FLOATS = ("F32", "F16", "BF16")
ERRORS = {8: 2e-2, 16: 2e-4, 32: 2e-6}
TOKENS = (1, 2, 3, 4, 7, 64)
TOP_K = 2


pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def modes(name: str) -> tuple[int, ...]:
    return (32,) if name in FLOATS else (8, 16, 32)


def random_logits(tokens: int, num_experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, tokens]).standard_normal((tokens, num_experts)).astype(np.float32)


def expect_same_bits(
    product: ExpertProduct, x: np.ndarray, logits: np.ndarray, activations: int, expected: np.ndarray
) -> None:
    """Any number of tokens, from the start and from the end of x, one and two threads."""
    for threads in (1, 2):
        product.library.set_threads(threads)
        for tokens in TOKENS:
            for start in {0, len(x) - tokens}:
                rows = slice(start, start + tokens)
                found = product(x[rows], logits[rows], expected.shape[1], activations)
                assert same_bits(found, expected[rows]), (threads, tokens, start)


# n is no multiple of 16; for formats with blocks of 32, k is no multiple of 64 or 256
@pytest.mark.parametrize("inputs", ["shared", "of each slot"])
@pytest.mark.parametrize("name", NAMES)
def test_one_answer_on_every_path(library: Library, isas: list[str], name: str, inputs: str) -> None:
    k = 256 if BY_NAME[name].block_size == 256 else 288 if name not in FLOATS else 77
    product = make_experts(library, name, 5, 21, k)
    x = random_activations(np.random.default_rng(1), 64, k if inputs == "shared" else TOP_K * k)
    logits = random_logits(64, 5)
    exact = product.exactly(x, highest(logits, TOP_K))
    for activations in modes(name):
        library.set_threads(1)
        library.force_isa("scalar")
        expected = product(x, logits, TOP_K, activations)
        assert relative_error(expected, exact) < ERRORS[activations]
        for isa in isas:
            library.force_isa(isa)
            expect_same_bits(product, x, logits, activations, expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "MXFP4", "F16"])
def test_a_slot_has_the_bits_of_a_dense_product(library: Library, name: str) -> None:
    product = make_experts(library, name, 4, 37, 256)
    x = random_activations(np.random.default_rng(2), 9, 256)
    logits = random_logits(9, 4)
    bias = np.random.default_rng(3).standard_normal((4, 37)).astype(np.float32)
    for activations in modes(name):
        found = product(x, logits, 3, activations, bias)
        for token, experts in enumerate(highest(logits, 3)):
            for slot, expert in enumerate(experts):
                packed, weights = product.packed[expert], product.weights[expert]
                dense = Product(library, product.format, 37, 256, packed, weights)
                want = dense(x[token : token + 1], activations, bias[expert])[0]
                assert same_bits(found[token, slot], want)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
def test_groups_of_several_blocks(library: Library, isas: list[str], name: str) -> None:
    """All tokens to one expert, none to another: gathered piece by piece, on any number of threads."""
    product = make_experts(library, name, 3, 40, 2048)
    x = random_activations(np.random.default_rng(4), 200, 2048)
    logits = random_logits(200, 3)
    logits[:, 1] = 9
    logits[:, 2] = -9
    exact = product.exactly(x, highest(logits, 2))
    for activations in modes(name):
        library.set_threads(1)
        one_by_one = np.concatenate(
            [product(x[t : t + 1], logits[t : t + 1], 2, activations) for t in range(len(x))]
        )
        assert relative_error(one_by_one, exact) < ERRORS[activations]
        for isa in isas[1:]:
            library.force_isa(isa)
            for threads in (1, 2, 3):
                library.set_threads(threads)
                assert same_bits(product(x, logits, 2, activations), one_by_one)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (6, 1), (6, 6), (40, 20)])
@pytest.mark.parametrize("activations", [8, 32])
def test_any_number_of_experts(
    library: Library, isas: list[str], num_experts: int, top_k: int, activations: int
) -> None:
    product = make_experts(library, "Q4_0", num_experts, 16, 64)
    x = random_activations(np.random.default_rng(5), 64, top_k * 64)
    logits = random_logits(64, num_experts)
    library.force_isa(isas[0])
    expected = product(x, logits, top_k, activations)
    exact = product.exactly(x, highest(logits, top_k))
    assert relative_error(expected, exact) < ERRORS[activations]
    for isa in isas:
        library.force_isa(isa)
        expect_same_bits(product, x, logits, activations, expected)


@pytest.mark.parametrize("inputs", ["shared", "of each slot"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "MXFP4", "F32"])
def test_a_poisoned_token_harms_no_other(
    library: Library, isas: list[str], name: str, poison: float, inputs: str
) -> None:
    product = make_experts(library, name, 3, 32, 256)
    x = random_activations(np.random.default_rng(7), 11, 256 if inputs == "shared" else 512)
    logits = random_logits(11, 3)
    sick, others = x.copy(), np.arange(11) != 4
    sick[4, 200] = poison
    for activations in modes(name):
        clean = product(x, logits, 2, activations)
        for isa in isas:
            library.force_isa(isa)
            found = product(sick, logits, 2, activations)
            assert same_bits(found[others], clean[others])
            if poison != 3e38:
                assert not np.isfinite(found[4, 0]).any()
                assert np.isfinite(found[4, 1]).all() == (inputs != "shared")


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_that_are_no_numbers(library: Library, isas: list[str], threads: int) -> None:
    """They choose some experts, and disturb nobody else."""
    product = make_experts(library, "Q4_0", 6, 16, 64)
    x = random_activations(np.random.default_rng(8), 8, 64)
    logits = random_logits(8, 6)
    library.set_threads(threads)
    clean = product(x, logits, 3, 8)
    sick = logits.copy()
    sick[1], sick[3], sick[5], sick[2, 4] = np.nan, np.inf, -np.inf, np.nan
    for isa in isas:
        library.force_isa(isa)
        found = product(x, sick, 3, 8)
        others = [0, 4, 6, 7]
        assert same_bits(found[others], clean[others])
        first_three = product.exactly(x[[1, 3, 5]], np.tile(np.arange(3), (3, 1)))
        assert relative_error(found[[1, 3, 5]], first_three) < ERRORS[8]


def test_rows_of_logits(library: Library) -> None:
    """`rows` chooses between the two counts of a batch; a step may have none."""
    product = make_experts(library, "Q4_0", 3, 16, 64)
    out = np.zeros((4, 32), np.float32)
    arrays = ExpertArrays(
        random_activations(np.random.default_rng(9), 4, 64), random_logits(4, 3), np.zeros((4, 10)), out, 2
    )
    operations = product.operations(replace(arrays, routing=np.zeros((4, 10), np.float32)), 8)
    for operation in operations:
        operation.rows = 1
    assert run(library, operations, 4) == 0  # num_logits is 0
    assert not out.any()


@pytest.mark.parametrize("name", ["Q4_0", "F32"])
def test_an_operation_that_cannot_run_is_refused(library: Library, name: str) -> None:
    product = make_experts(library, name, 3, 16, 64)
    out = np.zeros((1, 32), np.float32)
    arrays = ExpertArrays(
        np.ones((1, 64), np.float32), random_logits(1, 3), np.zeros((1, 10), np.float32), out, 2
    )
    for index, change in (
        (0, {"top_k": 0}),
        (0, {"top_k": 4}),
        (0, {"n": 1}),
        (0, {"ldout": 9}),
        (0, {"x": None}),
        (1, {"activations": 7}),
        (1, {"k": 0}),
        (1, {"n": 0}),
        (1, {"format": 99}),
        (1, {"weight": None}),
        (1, {"y": None}),
        (1, {"width": 32}),
        (1, {"num_experts": 1}),
        (1, {"top_k": 0}),
    ):
        operations = product.operations(arrays, 8)
        for field, value in change.items():
            setattr(operations[index], field, value)
        assert run(library, operations, 1) < 0, change
    assert not out.any()


GUARDED = """
    import numpy as np
    from dataclasses import replace
    from kernels.products import ExpertArrays, before_a_guard_page, make_experts, random_activations, run
    from worker_orcd.kernels.cpu.build import load_library
    from worker_orcd.quant import ALL

    library = load_library()
    rng = np.random.default_rng(0)
    logits = before_a_guard_page(rng.standard_normal((9, 5)).astype(np.float32))
    bias = before_a_guard_page(rng.standard_normal((5, 21)).astype(np.float32))
    for weight_format in ALL:
        product = make_experts(library, weight_format.name, 5, 21, 256)
        guarded = replace(product, packed=before_a_guard_page(product.packed))
        for slots in (1, 2):
            x = random_activations(rng, 9, slots * 256)
            for isa in ("scalar", "avx2", "avx512vnni", "neon"):
                if not library.force_isa(isa):
                    continue
                for mode in (8, 16, 32):
                    whole = product(x, logits, 2, mode, bias)
                    out = before_a_guard_page(np.zeros((9, 42), np.float32))
                    routing = before_a_guard_page(np.zeros((9, 10), np.float32))
                    arrays = ExpertArrays(before_a_guard_page(x), logits, routing, out, 2)
                    assert run(library, guarded.operations(arrays, mode, bias), 9) == 0
                    assert (out.reshape(9, 2, 21) == whole).all()
    print("within bounds")
"""


def test_nothing_is_read_or_written_beyond_the_end() -> None:
    """Logits, routing, weights, biases, activations and results end where a page begins that is closed."""
    assert in_a_fresh_process(GUARDED) == "within bounds\n"
