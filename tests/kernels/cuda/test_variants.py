"""Which tile runs a step: always one that fits, never one that would change the bits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from gpu_weights import packed_tiles, random_rows
from worker_orcd import quant
from worker_orcd.errors import UnsupportedFormat
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import (
    CAPABILITIES,
    FORMATS,
    MAX_SPLIT_TOKENS,
    Tile,
    all_variants,
    choose_tile,
    shape_of,
)
from worker_orcd.kernels.cuda.weights import MAX_EXPONENT, PackedMatrix, pack, upload
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
            assert tile.split == (shape.chunks > 1 and tokens <= MAX_SPLIT_TOKENS)
            assert not tile.split or tokens <= tile.tokens


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
    assert dict(kernel.constants) == variant.constants()
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


def packed(name: str, n: int, k: int) -> PackedMatrix:
    fmt = quant.BY_NAME[name]
    shape, data = pack(Matrix("w", fmt, n, k, random_rows(fmt, n, k)))
    return upload(shape, n, torch.from_numpy(data))


@each_format
def test_sections_cover_the_buffer(name: str) -> None:
    weight = packed(name, 70, 512)
    layout = weight.shape.layout
    parts = [weight.words, *([weight.high] if layout.high_bits else [])]
    parts += [weight.headers] if layout.header.size else []
    assert sum(part.nbytes for part in parts) == weight.num_bytes == layout.sections(70, 512).size
    assert weight.shifts.tolist() == [r % layout.share * layout.high_bits for r in range(64)]


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


# -- launches: the arguments, without a GPU ----------------------------------------------------------------


class Launch:
    """Takes the place of a compiled kernel."""

    def __init__(self, kernel: Kernel, capability: int) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[int, int, int], tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Launch:
        self.grid = grid
        return self

    def __call__(self, *arguments: object) -> None:
        self.calls.append((self.grid, arguments))


def test_a_launch_has_an_argument_for_every_parameter() -> None:
    made: list[Launch] = []

    def compile(kernel: Kernel, capability: int) -> Launch:
        made.append(Launch(kernel, capability))
        return made[-1]

    products = Products(Kernels(torch.device("cpu"), 90, compile))
    weight = packed("Q4_0", 200, 2048)
    products.reserve(weight)
    x, out = torch.zeros(20, 2048, dtype=torch.float16), torch.zeros(20, 200)
    for _ in range(2):
        products.linear(
            x, weight, out, residual=out, tile=Tile(rows=64, tokens=16, warps=4, stages=2, split=True)
        )
    [launch] = made  # compiled once
    assert [grid for grid, _ in launch.calls] == [(4, 2, weight.shape.chunks)] * 2
    parameters = [name for name, _ in launch.kernel.arguments + launch.kernel.constants]
    names = dict(zip(parameters, launch.calls[0][1], strict=True))
    assert (names["x"], names["y"], names["residual"]) == (x.data_ptr(), out.data_ptr(), out.data_ptr())
    assert (names["n"], names["tokens"], names["K"]) == (200, 20, None)
    assert names["stride"] == 200
    constants = dict(launch.kernel.constants)
    assert constants["RESIDUAL"] and not constants["BIAS"]


def test_a_split_product_needs_room_for_its_parts() -> None:
    products = Products(Kernels(torch.device("cpu"), 90, Launch))
    weight = packed("Q4_0", 64, 4096)
    assert weight.shape.chunks > 1
    products.reserve(weight, 4)
    assert products.scratch_bytes >= 4 * 64 * 4 * weight.shape.chunks
    x = torch.zeros(5, 4096, dtype=torch.float16)
    products.linear(x[:4], weight, torch.zeros(4, 64))
    with pytest.raises(ValueError, match="scratch"):
        products.linear(x, weight, torch.zeros(5, 64))
