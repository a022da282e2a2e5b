"""Products with experts: right under the interpreter, well compiled, and launched with what they need."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import under_interpreter
from recorded_launches import Launch

from gpu_codegen import Codegen, assembled, disorder, inspect_all
from gpu_weights import random_rows
from worker_orcd import quant
from worker_orcd.errors import Internal, UnsupportedFormat
from worker_orcd.kernels.backend import Glu, Matrix
from worker_orcd.kernels.cuda.compiler import FULL_OVERLAP, NO_OVERLAP, Kernel, Kernels, Overlap
from worker_orcd.kernels.cuda.contract import num_expert_chunks
from worker_orcd.kernels.cuda.expert_products import (
    LONGEST_STREAM,
    MAX_PAIR_TOKENS,
    ExpertProducts,
    ExpertVariant,
    choose_expert_tile,
    choose_width,
    goes_by_pairs,
    sort_kernel,
)
from worker_orcd.kernels.cuda.expert_weights import PackedExperts, expert_shape, pack_experts
from worker_orcd.kernels.cuda.variants import (
    CAPABILITIES,
    FORMATS,
    Variant,
    choose_tile,
    compile_variant,
    shape_of,
)
from worker_orcd.kernels.cuda.weights import Uploader

INTERPRETED = ("MXFP4", "Q4_K")
CPU = torch.device("cpu")


# -- under the interpreter ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, float]]]:
    """What `interpreted_experts.py` prints."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return under_interpreter.run("interpreted_experts.py", *INTERPRETED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INTERPRETED, "more"])
def test_products_equal_float64(found: dict[str, list[dict[str, float]]], name: str) -> None:
    assert found[name]
    for case in found[name]:
        assert case["pairs"] < 1e-3
        assert case["sorted"] < 1e-3
        assert case["counters"] == 0


@pytest.mark.slow
def test_pairs_are_sorted_and_dealt_to_tiles(found: dict[str, list[dict[str, float]]]) -> None:
    assert found["sort"] == [0, 0, 0, 0]


# -- what the compiler makes of them -----------------------------------------------------------------------


def variant(
    name: str, n: int, k: int, pairs: int, width: int, capability: int, glu: bool, streamed: bool = False
) -> ExpertVariant:
    shape = expert_shape(name, n, k)
    return ExpertVariant(
        shape=shape,
        tile=choose_expert_tile(shape, n, pairs, width, capability, streamed=streamed),
        slots=4,
        shared=glu,
        width=width,
        paired=glu,
        glu=Glu.CLAMPED_SWIGLU if glu else None,
        bias=True,
        out="bf16" if glu else "fp32",
    )


def chosen() -> list[tuple[ExpertVariant | Variant, int]]:
    gpt_oss = [
        (variant("MXFP4", n, 2880, pairs, width, 90, n == 5760), 90)
        for n in (5760, 2880)
        for pairs, width in ((4, 0), (256, 16), (1024, 64), (8192, 128))
    ]
    overlapping = [
        (replace(variant("MXFP4", 2880, 2880, pairs, width, 90, False), overlap=2), 90)
        for pairs, width in ((4, 0), (512, 32))
    ]
    older = [
        (variant("MXFP4", 2880, 2880, 8192, 128, capability, False), capability) for capability in (80, 89)
    ]
    qwen = [
        (variant("Q4_K", 2048, 768, pairs, width, 90, False), 90) for pairs, width in ((8, 0), (1024, 16))
    ]
    shape = shape_of("MXFP4", 2880, 2880)
    return [
        *gpt_oss,
        *overlapping,
        *older,
        *qwen,
        *streamed(),
        (Variant(shape=shape, tile=choose_tile(shape, 2880, 1)), 90),
    ]


def streamed() -> list[tuple[ExpertVariant, int]]:
    """To registers: GPT-OSS's products for a token and for four, and one whose outputs are no 16s."""
    made = [
        replace(variant("MXFP4", n, 2880, pairs, 0, 90, n == 5760, streamed=True), overlap=overlap)
        for n in (5760, 2880)
        for pairs, overlap in ((4, 2), (16, 0))
    ]
    ragged = variant("MXFP4", 200, 320, 2, 0, 90, False, streamed=True)
    return [(one, 90) for one in [*made, replace(ragged, aligned=("x_stride",), paired=True)]]


@pytest.fixture(scope="module")
def compiled() -> list[Codegen]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return inspect_all(chosen(), 2)


@pytest.mark.slow
def test_no_kernel_has_a_fault(compiled: list[Codegen]) -> None:
    assert len(compiled) > 8
    assert [str(one) for one in compiled if one.faults()] == []


@pytest.mark.slow
def test_what_goes_to_registers_keeps_shared_memory_for_activations(compiled: list[Codegen]) -> None:
    found = [one for one in compiled if one.variant.tile.ahead]
    assert len(found) == 5
    for one in found:
        assert one.shared <= 2 * LONGEST_STREAM
        assert one.matrix == "mma"
        assert one.registers <= (168 if one.variant.tile.ahead > 5 else 128)  # three programs at a time, four


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_weights_are_asked_for_before_the_wait_where_experts_are_known(shared: bool) -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    made = variant("MXFP4", 2880, 2880, 4, 0, 90, False, streamed=True)
    compiled = compile_variant(replace(made, overlap=2, shared=shared), 90)
    _, sass = assembled(compiled, 90)
    before, _, after = sass.partition("ACQBULK")
    loads = len(re.findall(r"\bLDG\.E", before))
    assert loads == 0 if shared else loads > 2 * made.tile.ahead
    assert "LDGSTS" not in before and "LDGSTS" in after  # activations
    assert "PREEXIT" in after and "STG" not in before


@pytest.mark.slow
def test_both_ways_and_dense_products_sum_in_one_order(compiled: list[Codegen]) -> None:
    assert disorder(compiled) == []


# -- the contract ------------------------------------------------------------------------------------------

# Changing one of these changes answers: see contract.py.
FROZEN = [
    ("MXFP4", 5760, 2880, 1),
    ("MXFP4", 2880, 2880, 3),
    ("Q4_K", 1536, 2048, 4),
    ("Q6_K", 2048, 768, 2),
    ("Q8_0", 1536, 2048, 4),
    ("Q4_K", 28672, 4096, 1),
]


@pytest.mark.parametrize(("name", "n", "k", "chunks"), FROZEN)
def test_the_table_is_frozen(name: str, n: int, k: int, chunks: int) -> None:
    layout = quant.BY_NAME[name].gpu
    assert layout is not None
    assert num_expert_chunks(layout, n, k) == expert_shape(name, n, k).chunks == chunks


# -- weights -----------------------------------------------------------------------------------------------


def stack(name: str, num_experts: int, n: int, k: int, seed: int = 0) -> Matrix:
    fmt = quant.BY_NAME[name]
    return Matrix(f"{name}-{seed}", fmt, n, k, random_rows(fmt, num_experts * n, k, seed))


def unpacked(weight: PackedExperts) -> np.ndarray:
    """(num_experts, rows of whole tiles, row_bytes)."""
    shape, matrix = weight.shape, weight.matrix
    layout = shape.layout
    parts = [matrix.words, *([matrix.high] if layout.high_bits else [])]
    parts += [matrix.headers] if layout.header.size else []
    packed = np.concatenate([part.numpy().view(np.uint8).reshape(-1) for part in parts])
    rows = layout.unpack(packed, matrix.n, shape.k, shape.step)
    return rows.reshape(weight.num_experts, -1, rows.shape[1])


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "BF16"])
@pytest.mark.parametrize("n", [40, 64])
def test_every_expert_fills_whole_tiles(name: str, n: int) -> None:
    part = stack(name, 3, n, 256)
    (weight,) = pack_experts([part], 3, [], Uploader(CPU))
    rows = unpacked(weight)
    assert rows.shape[1] == 64
    assert np.array_equal(rows[:, :n], part.data.reshape(3, n, -1))
    assert not rows[:, n:].any()
    assert (weight.n, weight.paired, weight.bias) == (n, False, None)


def test_gates_and_what_goes_with_them_alternate() -> None:
    gate, up = stack("MXFP4", 2, 72, 64), stack("MXFP4", 2, 72, 64, 1)
    biases = [np.arange(144, dtype=np.float32).reshape(2, 72), None]
    (weight,) = pack_experts([gate, up], 2, biases, Uploader(CPU))
    assert (weight.n, weight.paired) == (144, True)
    rows = unpacked(weight)
    assert rows.shape[1] == 192
    groups = rows[:, :144].reshape(2, 9, 2, 8, -1)
    assert np.array_equal(groups[:, :, 0].reshape(144, -1), gate.data)
    assert np.array_equal(groups[:, :, 1].reshape(144, -1), up.data)
    assert weight.bias is not None
    bias = weight.bias.view(2, 9, 2, 8)
    assert bias[1, 0, 0].tolist() == list(range(72, 80))
    assert not bias[:, :, 1].any()


def test_parts_that_cannot_alternate_stay_apart() -> None:
    for parts in (
        [stack("Q4_K", 2, 16, 256), stack("Q6_K", 2, 16, 256)],
        [stack("Q8_0", 2, 12, 64), stack("Q8_0", 2, 12, 64, 1)],
        [stack("Q8_0", 2, 8, 64, seed) for seed in range(3)],
    ):
        weights = pack_experts(parts, 2, [], Uploader(CPU))
        assert [weight.paired for weight in weights] == [False] * len(parts)
        assert [weight.shape.format for weight in weights] == [part.format.name for part in parts]


def test_parts_that_do_not_fit_are_refused() -> None:
    part = stack("Q8_0", 2, 8, 64)
    for parts, num_experts, bias in (
        ([], 2, []),
        ([part], 3, []),
        ([part, stack("Q8_0", 2, 8, 96)], 2, []),
        ([part], 2, [None, None]),
        ([part], 2, [np.zeros((2, 9), np.float32)]),
    ):
        with pytest.raises(Internal):
            pack_experts(parts, num_experts, bias, Uploader(CPU))
    rows = random_rows(quant.BY_NAME["MXFP4"], 4, 32)
    rows[3, 0] = 200
    with pytest.raises(UnsupportedFormat, match=r"gate.*exponent 200"):
        pack_experts([Matrix("gate", quant.BY_NAME["MXFP4"], 2, 32, rows)], 2, [], Uploader(CPU))


# -- launches: the arguments, without a GPU ----------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_number_of_tokens_has_a_tile(capability: int) -> None:
    for name, n, k, num_experts, slots in (("MXFP4", 5760, 2880, 32, 4), ("Q4_K", 2048, 768, 128, 8)):
        shape = expert_shape(name, n, k)
        for tokens in (*range(1, 70), 256, 1000, 4096):
            width = choose_width(tokens * slots, num_experts)
            tile = choose_expert_tile(shape, n, tokens * slots, width, capability)
            assert not tile.split
            assert 16 <= tile.tokens <= width and width % tile.tokens == 0
        tile = choose_expert_tile(shape, n, slots, 0, capability)
        assert tile.tokens == 16 and tile.split == (shape.chunks > 1)


@pytest.mark.parametrize(
    ("n", "pairs", "ahead"), [(5760, 4, 5), (5760, 1, 15), (2880, 4, 15), (2880, 5, 15), (2880, 16, 5)]
)
def test_steps_ahead_divide_those_of_a_chunk(n: int, pairs: int, ahead: int) -> None:
    shape = expert_shape("MXFP4", n, 2880)
    tile = choose_expert_tile(shape, n, pairs, 0, streamed=True)
    assert (tile.rows, tile.tokens, tile.ahead, tile.split) == (64, 8, ahead, False)
    assert shape.steps_of_chunk % ahead == 0


@pytest.mark.parametrize(
    ("name", "k"), [("Q4_K", 2048), ("MXFP4", 2912), ("MXFP4", 2048), ("MXFP4", LONGEST_STREAM + 64)]
)
def test_other_weights_go_through_shared_memory(name: str, k: int) -> None:
    shape = expert_shape(name, 2880, k)
    assert choose_expert_tile(shape, 2880, 4, 0, streamed=True) == choose_expert_tile(shape, 2880, 4, 0)


@pytest.mark.parametrize(
    ("slots", "num_experts", "tokens"), [(4, 32, 4), (8, 128, 8), (4, 128, MAX_PAIR_TOKENS), (2, 4, 1)]
)
def test_steps_are_sorted_where_experts_are_chosen_twice(slots: int, num_experts: int, tokens: int) -> None:
    assert [goes_by_pairs(count, slots, num_experts) for count in range(1, 17)] == [
        count <= tokens for count in range(1, 17)
    ]


@pytest.mark.parametrize(
    ("width", "capability", "unroll"), [(16, 90, 3), (64, 90, 3), (128, 90, 1), (64, 80, 1)]
)
def test_several_steps_at_a_time_on_the_gpu_that_was_measured(
    width: int, capability: int, unroll: int
) -> None:
    tile = choose_expert_tile(expert_shape("MXFP4", 2880, 2880), 2880, 8 * width, width, capability)
    assert tile.unroll == unroll
    assert choose_expert_tile(expert_shape("MXFP4", 2880, 2048), 2880, 512, 16, capability).unroll == 1


def test_widths_follow_the_tokens_of_an_expert() -> None:
    assert [choose_width(tokens * 4, 32) for tokens in (16, 64, 128, 256, 512, 4096)] == [
        16,
        16,
        32,
        64,
        128,
        128,
    ]


@pytest.mark.parametrize("pairs", [1, 512, 513, 4000, 8192, 32768])
def test_sorting_looks_at_every_pair(pairs: int) -> None:
    constants = dict(sort_kernel(pairs, 64).constants)
    assert (constants["COUNT"] - 1) * constants["BLOCK"] < pairs <= constants["COUNT"] * constants["BLOCK"]


class Launches:
    """Compiles nothing, and knows what was launched."""

    def __init__(self, overlap: Overlap = NO_OVERLAP) -> None:
        self.made: list[Launch] = []
        self.products = ExpertProducts(Kernels(CPU, 90, self.compile, overlap))

    def compile(self, kernel: Kernel, capability: int) -> Launch:
        self.made.append(Launch(kernel, capability))
        return self.made[-1]

    def last(self) -> tuple[tuple[int, int, int], dict[str, object]]:
        launch = self.made[-1]
        grid, values = launch.calls[-1]
        names = [name for name, _ in launch.kernel.arguments + launch.kernel.constants]
        return grid, dict(zip(names, values, strict=True)) | dict(launch.kernel.constants)


def test_a_few_tokens_are_a_program_a_pair() -> None:
    launches = Launches()
    (weight,) = pack_experts(
        [stack("Q4_0", 4, 200, 2048)], 4, [np.zeros((4, 200), np.float32)], Uploader(CPU)
    )
    launches.products.reserve(weight, 3, 2)
    experts = torch.zeros(3, 2, dtype=torch.int32)
    assert launches.products.sort(experts, 12) is None
    x, out = torch.zeros(3, 4096, dtype=torch.float16), torch.zeros(3, 400)
    launches.products.linear(x, weight, experts, out)
    grid, names = launches.last()
    assert weight.shape.chunks == 8
    assert grid == (4, 6, 8)
    assert (names["x_stride"], names["y_stride"], names["n"], names["pairs"]) == (4096, 400, 200, 6)
    assert (names["SLOTS"], names["SHARED"], names["WIDTH"], names["SPLIT"]) == (2, False, 0, True)
    assert names["BIAS"] and names["GLU"] == "" and names["experts"] == experts.data_ptr()


def test_what_goes_to_registers_gets_what_it_reads() -> None:
    launches = Launches()
    (weight,) = pack_experts(
        [stack("MXFP4", 4, 104, 192), stack("MXFP4", 4, 104, 192, 1)],
        4,
        [None, np.ones((4, 104), np.float32)],
        Uploader(CPU),
    )
    tile = choose_expert_tile(weight.shape, weight.n, 6, 0, streamed=True)
    assert tile.ahead > 0
    experts = torch.zeros(3, 2, dtype=torch.int32)
    x, out = torch.zeros(3, 208, dtype=torch.bfloat16)[:, :192], torch.zeros(3, 208)
    launches.products.linear(x, weight, experts, out, tile=tile, glu=Glu.CLAMPED_SWIGLU)
    grid, names = launches.last()
    assert launches.made[-1].kernel.gluon
    assert grid == (4, 6, 1)
    assert (names["w"], names["s"]) == (weight.matrix.words.data_ptr(), weight.matrix.headers.data_ptr())
    assert (names["n"], names["x_stride"], names["y_stride"], names["SHARED"]) == (208, 208, 208, True)
    assert names["BIAS"] and weight.bias is not None and names["bias"] == weight.bias.data_ptr()
    launches.products.reserve(weight, 3, 2)
    order = launches.products.sort(experts, 4, 16)
    with pytest.raises(ValueError, match="not sorted"):
        launches.products.linear(x, weight, experts, out, order=order, tile=tile, glu=Glu.CLAMPED_SWIGLU)
    wide = torch.zeros(3, 200, dtype=torch.bfloat16)[:, :192]
    with pytest.raises(ValueError, match="multiples of 16"):
        launches.products.linear(wide, weight, experts, torch.zeros(3, 416), tile=tile)


def test_products_overlap_in_steps_of_few_tokens() -> None:
    launches = Launches(FULL_OVERLAP)
    (weight,) = pack_experts([stack("Q8_0", 4, 64, 64)], 4, [], Uploader(CPU))
    launches.products.reserve(weight, 100, 2)
    for tokens, modes in ((20, (FULL_OVERLAP.mode, FULL_OVERLAP.product)), (100, (0, 0))):
        experts = torch.zeros(tokens, 2, dtype=torch.int32)
        order = launches.products.sort(experts, 4)
        found = [launches.last()[1]["OVERLAP"]]
        x, out = torch.zeros(tokens, 64, dtype=torch.float16), torch.zeros(tokens, 128)
        launches.products.linear(x, weight, experts, out, order=order)
        assert (*found, launches.last()[1]["OVERLAP"]) == modes


def test_many_tokens_are_sorted_first() -> None:
    launches = Launches()
    (weight,) = pack_experts(
        [stack("MXFP4", 4, 64, 256), stack("MXFP4", 4, 64, 256, 1)], 4, [], Uploader(CPU)
    )
    tokens = MAX_PAIR_TOKENS + 20
    launches.products.reserve(weight, tokens, 2)
    experts = torch.zeros(tokens, 2, dtype=torch.int32)
    order = launches.products.sort(experts, 4)
    assert order is not None and (order.width, order.num_tiles) == (32, 2 * tokens // 32 + 4)
    grid, names = launches.last()
    assert grid == (4, 1, 1)
    assert (names["order"], names["tiles"]) == (order.entries.data_ptr(), order.tiles.data_ptr())
    x, out = torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, 128, dtype=torch.bfloat16)
    launches.products.linear(x, weight, experts, out, order=order, glu=Glu.SWIGLU)
    grid, names = launches.last()
    tile = choose_expert_tile(weight.shape, 128, 2 * tokens, 32)
    assert grid == (-(-128 // tile.rows), order.num_tiles * (32 // tile.tokens), 1)
    assert (names["WIDTH"], names["SHARED"], names["GLU"], names["PAIRED"]) == (32, True, "swiglu", True)
    assert not names["SPLIT"]


def test_what_a_kernel_would_misread_is_refused() -> None:
    launches = Launches()
    (weight,) = pack_experts([stack("Q4_0", 4, 64, 4096)], 4, [], Uploader(CPU))
    experts = torch.zeros(2, 2, dtype=torch.int32)
    x, out = torch.zeros(2, 4096, dtype=torch.float16), torch.zeros(2, 128)
    linear = launches.products.linear
    with pytest.raises(ValueError, match="scratch"):
        linear(x, weight, experts, out)
    with pytest.raises(ValueError, match="scratch"):
        launches.products.sort(experts, 4, 16)
    launches.products.reserve(weight, 2, 2)
    linear(x, weight, experts, out)
    assert launches.products.scratch_bytes > 0
    with pytest.raises(ValueError, match="2 tokens of 2 slots"):
        linear(x[:, :64], weight, experts, out)
    with pytest.raises(ValueError, match="2 tokens of 2 slots"):
        linear(x, weight, experts, out[:, :64])
    with pytest.raises(ValueError, match="gates"):
        linear(x, weight, experts, out[:, :64], glu=Glu.SWIGLU)


def test_only_what_is_a_multiple_of_16_is_taken_for_one() -> None:
    launches = Launches()
    experts, x = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 72, dtype=torch.float16)[:, :64]
    for n, stride, aligned in ((64, 128, ("n", "y_stride")), (64, 130, ("n",)), (24, 48, ("y_stride",))):
        (weight,) = pack_experts([stack("Q8_0", 4, n, 64)], 4, [], Uploader(CPU))
        launches.products.reserve(weight, 2, 2)
        launches.products.linear(x, weight, experts, torch.zeros(2, stride)[:, : 2 * n])
        assert launches.made[-1].kernel.aligned == aligned
