"""Products of many tokens by TMA: which they are, what they launch, and what the compiler makes of them.

Their bits are compared with `linear`'s on a GPU: `gpu_wide.py --only same`, `gpu_model.py --only tiny`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import under_interpreter
from recorded_launches import Launch, Recorder, packed

import gpu_session
import gpu_wide
from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda import wide
from worker_orcd.kernels.cuda.compiler import Box, Kernel, Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import FORMATS, Shape, shape_of
from worker_orcd.kernels.cuda.wide import NARROW, WIDE, cut_for, tiles_of, unpack_kernel

PACKED = tuple(name for name in FORMATS if name not in ("F32", "F16", "BF16"))
CASES = (*PACKED, "Q4_K/128", "Q5_K/128")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton is installed, or none."""
    monkeypatch.setattr(wide, "can_stream", lambda capability: capability == 90)


# -- which products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "k", "tokens", "wanted"),
    [
        ("Q4_K", 16384, 3072, 256, None),
        ("Q4_K", 16384, 3072, 512, WIDE),
        ("Q4_K", 16384, 3072, 4096, WIDE),
        ("Q4_K", 9216, 3072, 512, NARROW),  # two chunks
        ("Q4_K", 3072, 8192, 512, NARROW),
        ("Q6_K", 3072, 8192, 256, None),
        ("Q4_K", 896, 4864, 1024, None),  # 56 tiles, and a sum is long
        ("Q4_K", 896, 4864, 2048, NARROW),
        ("Q6_K", 896, 4864, 512, NARROW),
        ("Q5_0", 896, 896, 4096, None),  # small
        ("Q5_0", 9728, 896, 512, None),  # quickly made where they are wanted
        ("Q5_0", 9728, 896, 1024, NARROW),  # 5 rounds of tiles instead of 3 twice as large
        ("Q5_0", 9728, 896, 2048, WIDE),
        ("Q8_0", 5120, 2880, 512, NARROW),
        ("MXFP4", 16384, 3072, 2048, None),
        ("MXFP4", 16384, 3072, 4096, WIDE),
        ("F16", 16384, 3072, 128, NARROW),  # nothing has to be made
        ("F32", 16384, 3072, 4096, None),
        ("Q4_K", 16376, 3072, 4096, None),  # rows are no multiple of 16
        ("Q4_0", 16384, 3104, 4096, None),  # nor columns of 64
    ],
)
def test_those_that_were_faster(name: str, n: int, k: int, tokens: int, wanted: object) -> None:
    shape = shape_of(name, n, k)
    assert cut_for(shape, n, tokens, 90) == wanted
    assert cut_for(shape, n, tokens, 80) is None


def test_chunks_end_where_steps_do() -> None:
    """Neither kernel begins a sum within a step."""
    shape = Shape(format="Q4_0", k=3072, step=32, chunks=32, aligned=True)  # a chunk of 96 columns
    assert not wide.can_be_wide(shape, 90)
    assert wide.can_be_wide(replace(shape, chunks=16), 90)


# -- launches ----------------------------------------------------------------------------------------------


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for themselves: what they become needs Triton."""
    monkeypatch.setattr(Box, "descriptor", lambda self: self)


def launched(recorder: Recorder, function: str) -> Launch:
    [found] = [one for one in recorder.made if one.kernel.function == function]
    return found


@pytest.mark.usefixtures("boxes")
def test_weights_are_unpacked_and_then_multiplied() -> None:
    recorder = Recorder()
    products = Products(recorder.kernels())
    weight = packed("Q4_K", 4096, 512, paired=True)
    weight = replace(weight, shape=replace(weight.shape, chunks=1))
    products.reserve(weight, 1024)
    x, out = torch.zeros(1024, 512, dtype=torch.float16), torch.zeros(1024, 2048, dtype=torch.float16)
    products.linear(x, weight, out, glu=Glu.SWIGLU)
    unpack, product = launched(recorder, "unpack"), launched(recorder, "wide")
    assert recorder.made == [unpack, product]
    assert unpack.calls[0][0] == (64, 2, 1)
    given = product.arguments()
    told = [given[name] for name in ("first", "rows", "n", "tokens", "stride")]
    assert told == [0, 4096, 4096, 1024, 2048]
    assert (given["w"].matrix.shape, given["w"].rows) == ((64 * 8 * 64, 64), 64)
    assert given["w"].matrix.data_ptr() == unpack.arguments()["out"]
    assert given["x"].matrix is x and given["y"] == out.data_ptr()
    constants = dict(product.kernel.constants)
    assert (constants["GLU"], constants["PAIRED"], constants["CHUNKS"]) == ("swiglu", True, 1)
    tiles = 32 * 1024 // constants["TOKENS"]
    assert product.calls[0][0] == (min(132, tiles), 1, 1)
    assert not product.kernel.fused and product.kernel.registers == 168


@pytest.mark.usefixtures("boxes")
def test_a_weight_that_does_not_fit_comes_in_slabs() -> None:
    recorder = Recorder()
    products = Products(recorder.kernels(), wide_bytes=5 * 64 * 1024 * 2)  # four tiles: programs take two
    weight = packed("Q8_0", 592, 1024)
    products.wide.make_room(weight)
    assert products.wide.scratch_bytes == 4 * 64 * 1024 * 2
    x, out = torch.zeros(512, 1024, dtype=torch.float16), torch.zeros(512, 592)
    products.linear(x, weight, out, bias=out, residual=out, tile=NARROW)
    unpack, product = launched(recorder, "unpack"), launched(recorder, "wide")
    slabs = [(one["first"], one["rows"]) for one in map(product.arguments, range(len(product.calls)))]
    assert slabs == [(0, 256), (256, 256), (512, 80)]  # each row once, whole tiles, as equal as can be
    assert [grid for grid, _ in unpack.calls] == [(4, 8, 1), (4, 8, 1), (2, 8, 1)]
    words = weight.words.element_size() * len(weight.words) // 10  # of a tile
    starts = [unpack.arguments(call)["w"] - weight.words.data_ptr() for call in range(3)]
    assert starts == [0, 4 * words, 8 * words]
    assert {one["n"] for one in map(product.arguments, range(3))} == {592}  # where outputs lie is the whole's


@pytest.mark.usefixtures("boxes")
def test_float16_is_multiplied_as_it_lies() -> None:
    recorder = Recorder()
    products = Products(recorder.kernels())
    weight = packed("F16", 192, 128)
    products.wide.make_room(weight)
    assert products.wide.scratch_bytes == 0
    x, out = torch.zeros(300, 128, dtype=torch.float16), torch.zeros(300, 200)[:, :192]
    products.linear(x, weight, out, tile=WIDE)
    [product] = recorder.made
    given = product.arguments()
    assert given["w"].matrix.data_ptr() == weight.words.data_ptr()
    assert (given["stride"], product.kernel.aligned) == (200, ("n", "first"))


def test_without_room_nothing_is_launched() -> None:
    recorder = Recorder()
    weight = packed("Q8_0", 192, 128)
    x, out = torch.zeros(300, 128, dtype=torch.float16), torch.zeros(300, 192)
    with pytest.raises(ValueError, match="192 rows needs more scratch memory: see reserve"):
        Products(recorder.kernels()).linear(x, weight, out, tile=WIDE)
    assert recorder.made == []


def test_room_is_taken_for_what_may_be_wide_and_no_more() -> None:
    kernels = Recorder().kernels()
    products = Products(kernels)
    weight = packed("Q4_K", 4096, 512)
    products.reserve(weight, 256)
    assert products.wide.scratch_bytes == 0
    products.reserve(weight, 512)
    assert products.wide.scratch_bytes == 2 * 4096 * 512
    products.reserve(packed("Q4_K", 2048, 512), 4096)
    assert products.wide.scratch_bytes == 2 * 4096 * 512
    assert Products(Recorder().kernels(80)).wide.scratch_bytes == 0


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "MXFP4", "F32"])
def test_tiles_of_a_weight_are_views_of_it(name: str) -> None:
    weight = packed(name, 200, 512)
    some = tiles_of(weight, 1, 4)
    assert some.n == 136
    assert some.words.untyped_storage().data_ptr() == weight.words.untyped_storage().data_ptr()
    layout, shape = weight.shape.layout, weight.shape
    of_136 = layout.sections(136, 512, shape.step)
    assert len(some.words) == of_136.words
    assert len(some.headers) == (of_136.headers or of_136.words)


# -- what the compiler makes of them -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return under_interpreter.run("interpreted_wide.py", *CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_interpreter_unpacks_what_the_format_says(
    unpacked: dict[str, dict[str, float]], case: str
) -> None:
    assert unpacked[case]["differing"] == 0
    assert unpacked[case]["error"] < 1e-3  # of float16; bfloat16 holds MXFP4 exactly


@pytest.mark.slow
def test_no_kernel_has_a_fault() -> None:
    """The largest of each kind; `gpu_wide.py --compile` looks at all."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    kernels = list(gpu_wide.shipped())
    wide_ones = [one for one in kernels if one.function == "wide"]
    unpacking = [one for one in kernels if dict(one.constants).get("FORMAT") in ("Q2_K", "Q6_K")]
    fp8 = [one for one in wide_ones if ("cache", "*u8") in one.arguments and ("TOKENS", 256) in one.constants]
    ends = [one for one in wide_ones if ("RESIDUAL", True) in one.constants]
    assert (len(unpacking), len(fp8), len(ends)) == (2, 2, 4)
    assert [text for one in (*unpacking, fp8[0], *ends[:2]) if (text := gpu_wide.inspect(one))] == []


def test_a_fault_is_told() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    kernel = unpack_kernel(replace(shape_of("Q8_0", 128, 256), k=200))  # no whole steps
    assert gpu_wide.inspect(kernel).startswith("unpack FORMAT Q8_0: CompileTimeAssertionFailure")


# -- the script that compares bits -------------------------------------------------------------------------


class Silent(gpu_session.Session):
    """On the CPU, where every kernel writes the same ones, but for those that `spoil` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, spoil: str = "") -> None:
        monkeypatch.setattr(gpu_session, "stamp", lambda commit: {"capability": 90})
        monkeypatch.setattr(gpu_wide, "matmul_teraflops", lambda n, k, tokens: 500.0)
        monkeypatch.setattr(gpu_session, "graph_microseconds", lambda runs, _: 10.0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        super().__init__(argparse.Namespace(commit="abc", out=out))
        self.device = torch.device("cpu")
        self.kernels = Kernels(self.device, 90, Launch)
        self.spoil = spoil
        monkeypatch.setattr(self.kernels, "launch", self.written)

    def written(self, kernel: Kernel, grid: Any, *values: Any) -> None:
        names = [name for name, _ in kernel.arguments]
        if "y" in names:
            values[names.index("y")].fill_(2 if kernel.function == self.spoil else 1)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wide, "CHECKED", ("Q4_0", "F16"))
    monkeypatch.setattr(gpu_wide, "CHECKED_TOKENS", (130,))
    monkeypatch.setattr(gpu_wide, "END_TOKENS", (70,))
    monkeypatch.setattr(gpu_wide, "HEAD_TOKENS", 40)
    monkeypatch.setattr(gpu_wide, "FAST", (("Q8_0", 256, 128), ("Q4_K", 128, 2048)))
    monkeypatch.setattr(gpu_wide, "FAST_TOKENS", (128, 256))


@pytest.mark.usefixtures("few")
def test_the_script_tells_bytes_that_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = Silent(monkeypatch, tmp_path / "good.json")
    gpu_wide.check_same(session)
    assert session.failures == 0
    counts = session.results["same"]
    assert set(counts) == {"narrow", "narrow, slabs", "wide", "wide, slabs"}
    assert all(compared > 0 == differing for compared, differing in counts.values())
    session = Silent(monkeypatch, tmp_path / "bad.json", spoil="wide")
    gpu_wide.check_same(session)
    told = [line for line in session.lines if line.startswith("DIFFERS")]
    assert session.failures == len(told) > 40
    assert any("heads" in line for line in told) and any("swiglu" in line for line in told)


@pytest.mark.usefixtures("few")
def test_the_script_times_each_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = Silent(monkeypatch, tmp_path / "fast.json")
    gpu_wide.measure(session)
    ways = Counter(way for row in session.results["fast"] for way in row["microseconds"])
    assert ways == {"linear": 4, "128 wide": 4, "256 wide": 2}
    assert "us (linear); " in session.lines[0]
