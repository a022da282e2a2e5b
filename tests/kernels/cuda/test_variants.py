"""Which tile runs a step: always one that fits, never one that would change the bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from recorded_launches import Recorder, packed

from gpu_weights import packed_tiles, random_rows
from worker_orcd import quant
from worker_orcd.errors import UnsupportedFormat
from worker_orcd.kernels.backend import Glu, Matrix
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import (
    CAPABILITIES,
    FORMATS,
    MAX_SPLIT_TOKENS,
    Tile,
    all_variants,
    choose_tile,
    most_split_tokens,
    shape_of,
)
from worker_orcd.kernels.cuda.weights import (
    MAX_EXPONENT,
    PackedMatrix,
    Uploader,
    alike,
    alternate,
    pack,
)
from worker_orcd.quant import WeightFormat

each_format = pytest.mark.parametrize("name", FORMATS)


@each_format
@pytest.mark.parametrize("capability", [*CAPABILITIES, 75])
def test_every_number_of_tokens_has_a_tile(name: str, capability: int) -> None:
    for n, k in ((16384, 3072), (3072, 8192), (130, 768), (1, 256)):
        shape = shape_of(name, n, k)
        for tokens in (*range(1, 130), 256, 1000, 4096):
            tile = choose_tile(shape, n, tokens, capability)
            assert tile.tokens >= 16  # eight compile to other matrix instructions, which sum in another order
            assert tile.rows in (64, 128)
            assert tile.stages >= 2
            assert tile.split == (tokens <= most_split_tokens(shape))
            assert most_split_tokens(shape) <= (MAX_SPLIT_TOKENS if shape.chunks > 1 else 0)


def test_all_variants_covers_what_is_chosen() -> None:
    shapes = [("Q4_K", 9216, 3072), ("Q8_0", 151936, 896)]
    shipped = list(all_variants(shapes, 90, tuple(range(1, 4097))))
    assert len(shipped) == len(set(shipped))
    sampled = set(all_variants(shapes, 90))
    assert sampled <= set(shipped)
    assert {v.tile.tokens for v in sampled} == {v.tile.tokens for v in shipped}


def test_constants_and_types_name_every_parameter_once() -> None:
    variant = next(all_variants([("Q6_K", 64, 256)], 90))
    kernel = variant.kernel()
    constants = dict(kernel.constants)
    assert len(constants) == len(kernel.constants)
    assert variant.constants().items() <= constants.items()
    assert dict(kernel.arguments)["w"] == "*u16" and dict(kernel.arguments)["x"] == "*fp16"
    assert dict(next(all_variants([("MXFP4", 64, 256)], 90)).kernel().arguments)["x"] == "*bf16"


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """Neither Triton nor a server's libraries; and no GPU is looked for."""
    code = (
        "import sys, worker_orcd.kernels.cuda.launch, worker_orcd.kernels.cuda.weights\n"
        "import worker_orcd.kernels.cuda.operations\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'triton', 'fastapi', 'pydantic', 'uvicorn'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# -- weights -----------------------------------------------------------------------------------------------


@each_format
def test_sections_cover_the_buffer(name: str) -> None:
    weight = packed(name, 70, 512)
    layout = weight.shape.layout
    parts = [weight.words, *([weight.high] if layout.high_bits else [])]
    parts += [weight.headers] if layout.header.size else []
    assert sum(part.nbytes for part in parts) == weight.num_bytes == layout.sections(70, 512).size
    up = [r % layout.share * layout.high_bits for r in range(64)]
    assert weight.shifts.tolist() == [up, [r % 2 * 16 for r in range(64)]]


def test_a_format_without_kernel_is_refused_by_name() -> None:
    fmt = WeightFormat(name="X", ggml_type=99, block_size=1, type_size=1, dequantize=quant.ALL[0].dequantize)
    with pytest.raises(UnsupportedFormat, match=r"blk\.0\.w is X"):
        pack(Matrix("blk.0.w", fmt, 1, 1, np.zeros((1, 1), np.uint8)))


def test_a_scale_beyond_bfloat16_is_refused() -> None:
    fmt = quant.BY_NAME["MXFP4"]
    rows = random_rows(fmt, 4, 64)
    rows[2, 17] = MAX_EXPONENT
    pack(Matrix("w", fmt, 4, 64, rows))
    rows[2, 17] = MAX_EXPONENT + 1
    with pytest.raises(UnsupportedFormat, match="exponent 129"):
        pack(Matrix("w", fmt, 4, 64, rows))


@each_format
def test_tiles_for_timing_are_a_packed_matrix(name: str) -> None:
    fmt = quant.BY_NAME[name]
    assert fmt.gpu is not None
    rows = fmt.gpu.unpack(packed_tiles(name, 128, 256), 128, 256)
    one = random_rows(fmt, 64, 256)
    assert np.array_equal(rows, np.concatenate([one, one]))


def unpacked(weight: PackedMatrix) -> NDArray[np.uint8]:
    """Rows as they were before they were packed."""
    shape, data = weight.shape, bytes(weight.words.untyped_storage())
    return shape.layout.unpack(np.frombuffer(data, np.uint8), weight.n, shape.k, shape.step)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16", "MXFP4"])
def test_rows_of_gates_and_what_goes_with_them_alternate(name: str, parts: int) -> None:
    fmt = quant.BY_NAME[name]
    rows, bias = random_rows(fmt, 144, 256), np.arange(144, dtype=np.float32)
    matrices = [Matrix(name, fmt, 144 // parts, 256, half) for half in np.split(rows, parts)]
    weight = Uploader(torch.device("cpu")).weight(matrices, np.split(bias, parts), gated=True)
    (part,) = weight.parts
    assert isinstance(part.weight, PackedMatrix) and part.weight.paired
    assert (weight.n, part.n, part.weight.n) == (144, 144, 144)
    groups = unpacked(part.weight).reshape(9, 2, 8, -1)
    assert np.array_equal(groups[:, 0].reshape(72, -1), rows[:72])
    assert np.array_equal(groups[:, 1].reshape(72, -1), rows[72:])
    assert part.bias is not None
    assert part.bias.view(9, 2, 8)[1].tolist() == [list(range(8, 16)), list(range(80, 88))]


def test_small_matrices_of_formats_that_q8_0_holds_are_one() -> None:
    def matrix(name: str, n: int, k: int = 256) -> Matrix:
        fmt = quant.BY_NAME[name]
        return Matrix(name, fmt, n, k, random_rows(fmt, n, k))

    parts = [matrix("Q5_0", 32), matrix("Q4_0", 16), matrix("Q8_0", 16)]
    (one,) = Uploader(torch.device("cpu")).weight(parts).parts
    assert isinstance(one.weight, PackedMatrix) and one.weight.shape.format == "Q8_0"
    found = quant.BY_NAME["Q8_0"].dequantize_rows(unpacked(one.weight))
    wanted = np.concatenate([part.format.dequantize_rows(part.data) for part in parts])
    assert np.array_equal(found, wanted)
    assert [part.format.name for part in alike(parts[:1])] == ["Q5_0"]  # alone it stays small
    assert alike([matrix("Q5_0", 16), matrix("Q4_1", 16)])[0].format.name == "Q5_0"
    large = Matrix("large", quant.BY_NAME["Q5_0"], 1 << 14, 1 << 9, np.zeros((0, 0), np.uint8))
    assert alike([large, parts[2]])[0] is large


def test_rows_of_a_head_alternate() -> None:
    """Within each head; bias too. Not where heads have no runs of sixteen, or formats differ."""
    fmt = quant.BY_NAME["Q8_0"]
    part = Matrix("x", fmt, 96, 256, random_rows(fmt, 96, 256))
    bias = np.arange(96, dtype=np.float32)
    (one,) = Uploader(torch.device("cpu")).weight([part], [bias], head_dim=48).parts
    assert isinstance(one.weight, PackedMatrix) and one.weight.head == 48 and not one.weight.paired
    assert one.bias is not None
    order = one.bias.long().tolist()
    assert order[:24] == [*range(8), *range(24, 32), *range(8, 16)] and order[48:56] == [*range(48, 56)]
    assert np.array_equal(unpacked(one.weight)[:96], part.data[order])
    (other,) = Uploader(torch.device("cpu")).weight([part], [bias], head_dim=24).parts
    assert isinstance(other.weight, PackedMatrix) and other.weight.head == 0
    assert np.array_equal(unpacked(other.weight)[:96], part.data)


def test_rows_that_cannot_alternate_stay_in_order() -> None:
    def matrix(name: str, n: int) -> Matrix:
        fmt = quant.BY_NAME[name]
        return Matrix(name, fmt, n, 256, random_rows(fmt, n, 256))

    q8 = matrix("Q8_0", 16)
    for parts, gated in (
        ([q8, q8], False),
        ([q8, matrix("Q4_1", 16)], True),
        ([q8, matrix("Q8_0", 32)], True),
        ([q8, q8, q8, q8], True),
        ([matrix("Q8_0", 12), matrix("Q8_0", 12)], True),
        ([matrix("Q8_0", 24)], True),
        ([matrix("F32", 16), matrix("F32", 16)], True),  # small: multiplied by as it is
    ):
        weight = Uploader(torch.device("cpu")).weight(parts, gated=gated)
        assert sum(part.n for part in weight.parts) == weight.n == sum(part.n for part in parts)
        for part in weight.parts:
            if isinstance(part.weight, PackedMatrix):
                assert not part.weight.paired
                first = parts[0] if part.column == 0 else parts[1]
                assert np.array_equal(unpacked(part.weight)[: first.n], first.data)


def test_alternating_moves_whole_groups() -> None:
    assert alternate(torch.arange(32)).tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]


# -- launches: the arguments, without a GPU ----------------------------------------------------------------


def test_a_launch_has_an_argument_for_every_parameter() -> None:
    recorder = Recorder()
    products = Products(recorder.kernels())
    weight = packed("Q4_0", 200, 2048)
    products.reserve(weight)
    x, out = torch.zeros(20, 2048, dtype=torch.float16), torch.zeros(20, 200)
    for _ in range(2):
        products.linear(
            x, weight, out, residual=out, tile=Tile(rows=64, tokens=16, warps=4, stages=2, split=True)
        )
    [launch] = recorder.made  # compiled once
    assert [grid for grid, _ in launch.calls] == [(4, 2, weight.shape.chunks)] * 2
    parameters = [name for name, _ in launch.kernel.arguments + launch.kernel.constants]
    names = dict(zip(parameters, launch.calls[0][1], strict=True))
    assert (names["x"], names["y"], names["residual"]) == (x.data_ptr(), out.data_ptr(), out.data_ptr())
    assert (names["n"], names["tokens"], names["K"]) == (200, 20, None)
    assert names["stride"] == 200
    constants = dict(launch.kernel.constants)
    assert constants["RESIDUAL"] and not constants["BIAS"]


def test_a_gated_product_knows_what_it_is_given() -> None:
    recorder = Recorder()
    products = Products(recorder.kernels())
    weight = packed("Q4_0", 144, 128)
    paired = dataclasses.replace(weight, paired=True)
    x = torch.zeros(3, 128, dtype=torch.float16)
    out, half = torch.zeros(3, 144), torch.zeros(3, 72, dtype=torch.float16)
    products.linear(x, paired, half, glu=Glu.GEGLU)
    products.linear(x, paired, out)
    products.linear(x, weight, out)
    constants = [dict(launch.kernel.constants) for launch in recorder.made]
    assert [(one["PAIRED"], one["GLU"]) for one in constants] == [(True, "geglu"), (True, ""), (False, "")]
    assert [dict(launch.kernel.arguments)["y"] for launch in recorder.made] == ["*fp16", "*fp32", "*fp32"]
    assert [launch.kernel.aligned for launch in recorder.made] == [("n",), ("n", "stride"), ("n", "stride")]
    assert [launch.kernel.fused for launch in recorder.made] == [False, True, True]
    with pytest.raises(ValueError, match="gates"):
        products.linear(x, weight, half, glu=Glu.SWIGLU)
    with pytest.raises(ValueError, match="no residual"):
        products.linear(x, paired, half, residual=half, glu=Glu.SWIGLU)
    with pytest.raises(ValueError, match=r"144 rows: out is \(3, 144\)"):
        products.linear(x, paired, out, glu=Glu.SWIGLU)
    with pytest.raises(ValueError, match=r"144 rows: out is \(3, 72\)"):
        products.linear(x, paired, half)


def test_a_split_product_needs_room_for_its_parts() -> None:
    products = Products(Recorder().kernels())
    weight = packed("Q4_0", 64, 4096)
    assert weight.shape.chunks > 1
    products.reserve(weight, 4)
    assert products.scratch_bytes >= 4 * 64 * 4 * weight.shape.chunks
    x = torch.zeros(5, 4096, dtype=torch.float16)
    products.linear(x[:4], weight, torch.zeros(4, 64))
    with pytest.raises(ValueError, match="scratch"):
        products.linear(x, weight, torch.zeros(5, 64))
