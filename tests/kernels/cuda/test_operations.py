"""
Operations between matrix products and attention, without a GPU: their arithmetic under Triton's interpreter,
what the compiler makes of them, and how they are launched.

That they are right on a GPU, and the same in every batch, is for `benchmarks/gpu_operations.py` to show.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import under_interpreter

from gpu_codegen import assembled
from gpu_operation_cases import attention_of, table_of, timed_cases
from gpu_operations import Recorder
from worker_orcd import quant
from worker_orcd.kernels.backend import Glu, RopeParams
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, compile_kernel
from worker_orcd.kernels.cuda.operations import Operations, rope_table, row_shape

HERE = Path(__file__).parent
CPU = torch.device("cpu")
EXACT = [
    *(f"embed {name}" for name in quant.BY_NAME),
    "take",
    "combine",
    "saturated",
    "in_place",
    "rope_store_fp8",
]
NEAR = {"norms": 1e-6, "rope_store": 1e-3, "single": 1e-6, "linear_f32": 1e-6, "route": 1e-6}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is not installed")


# -- arithmetic --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    """What `interpreted_operations.py` prints."""
    return under_interpreter.run("interpreted_operations.py")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_what_can_be_exact_is(found: dict[str, list[float]], name: str) -> None:
    assert found[name]
    assert set(found[name]) == {0.0}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR)
def test_sums_and_functions_are_near_the_reference(found: dict[str, list[float]], name: str) -> None:
    assert len(found[name]) >= 6
    assert all(error <= NEAR[name] for error in found[name])


def test_all_that_is_interpreted_is_looked_at() -> None:
    script = (HERE / "interpreted_operations.py").read_text()
    cases = re.search(r"^CASES.*?= \[(.*?)\]", script, re.DOTALL | re.MULTILINE)
    assert cases is not None
    assert set(re.findall(r"\w+", cases[1])) == {name for name in [*EXACT, *NEAR] if " " not in name}


@pytest.mark.parametrize("factor", [1.0, 1.19])
def test_angles_are_the_references_however_far(factor: float) -> None:
    params = RopeParams(rotary_dim=4, inv_freq=(1.0, 0.013), attention_factor=factor)
    table = rope_table(params, (1 << 20) + 1, CPU)
    for position in (0, 1, 4096, 262_144, 1 << 20):
        angles = position * np.array(params.inv_freq)
        wanted = np.stack([np.cos(angles), np.sin(angles)]) * factor
        assert np.array_equal(table[position].numpy(), wanted.astype(np.float32))


# -- code --------------------------------------------------------------------------------------------------


def recorded() -> tuple[Operations, set[Kernel]]:
    recorder = Recorder(CPU, 90)
    return Operations(recorder), recorder.seen


def shipped() -> list[Kernel]:
    """The kernels of some models, and of two more tables."""
    operations, seen = recorded()
    for build in timed_cases(CPU):
        case = build(16)
        case.run(operations, case.buffers())
    for name in ("Q6_K", "MXFP4"):
        table = table_of(name, 64, 1024, CPU)
        operations.embed(torch.zeros(1, dtype=torch.int32), table, torch.zeros(1, 1024))
    both = torch.zeros(1, 2 * 2880)
    operations.glu(Glu.CLAMPED_SWIGLU, both[:, :2880], both[:, 2880:], torch.zeros(1, 2880).bfloat16())
    return sorted(seen, key=lambda kernel: (kernel.function, str(kernel.constants)))


OLDER = ("norm", "rope_store", "linear_f32")  # which are looked at for older GPUs too


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_no_kernel_has_a_fault(capability: int) -> None:
    kernels = [kernel for kernel in shipped() if capability == 90 or kernel.function in OLDER]
    assert len(kernels) >= 4
    for kernel in kernels:
        compiled = compile_kernel(kernel, capability)
        log, sass = assembled(compiled, capability)
        assert re.findall(r"(\d+) bytes (?:stack frame|spill)", log) == ["0"] * 3, kernel
        assert not re.search(r"\b(LDL|STL)\b", sass), kernel
        assert "warning" not in log, kernel
        assert ".ftz" not in compiled.asm["ptx"], kernel  # small numbers count
        assert "fma.rn.f32" not in compiled.asm["ptx"], kernel  # not fused: see `Kernel.fused`
        if kernel.function in ("norm", "elementwise", "combine", "rope_store"):
            assert "LDG.E.128" in sass, kernel  # as wide as it can be


@needs_triton
@pytest.mark.slow
def test_rows_are_summed_in_one_order_whatever_is_read_and_written() -> None:
    for width in (128, 2880):
        operations, seen = recorded()
        x, gain = torch.zeros(2, width), torch.zeros(width)
        for dtype in (torch.float32, torch.float16):
            out = torch.zeros(2, width, dtype=dtype)
            operations.rms_norm(x, gain, 1e-5, out)
            operations.add_rms_norm(x, x, gain, 1e-5, x, out)
            operations.layer_norm(x, gain, gain, 1e-5, out)
        assert len(seen) == 6
        orders = [sums(compile_kernel(kernel, 90)) for kernel in seen]
        assert {len(order) for order in orders} == {1}
        assert len(set.union(*orders)) == 1


def sums(compiled: Any) -> set[tuple[str, str]]:
    """The shape of each sum, and how its elements are dealt to threads."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    reductions = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(\w+), (#\w+)>', code, re.DOTALL)
    return {(shape, layouts[layout]) for shape, layout in reductions}


# -- launches ----------------------------------------------------------------------------------------------


# Changing one of these changes answers: see operations.py.
FROZEN = {1: (1, 1), 64: (64, 1), 128: (128, 1), 576: (1024, 4), 896: (1024, 4), 2048: (2048, 8),
          2880: (4096, 16), 4096: (4096, 16), 5120: (8192, 16), 16384: (16384, 16)}  # fmt: skip


@pytest.mark.parametrize("width", FROZEN)
def test_the_shape_of_a_sum_is_frozen(width: int) -> None:
    assert row_shape(width) == FROZEN[width]
    assert list(inspect.signature(row_shape).parameters) == ["width"]


@pytest.mark.parametrize("width", [0, 16385])
def test_rows_too_wide_to_sum_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"rows of {width} columns.*1 to 16384"):
        row_shape(width)


@needs_triton
def test_arguments_and_constants_are_those_of_the_kernels() -> None:
    for kernel in shipped():
        module = import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
        names = [name for name, _ in kernel.arguments + kernel.constants]
        assert names == getattr(module, kernel.function).arg_names
        assert not kernel.fused


def test_one_kernel_serves_every_number_of_tokens() -> None:
    operations, seen = recorded()
    for build in timed_cases(CPU):
        seen.clear()
        for tokens in (1, 3, 16, 64):
            case = build(tokens)
            case.run(operations, case.buffers())
        assert len(seen) == 1


def test_alignment_is_taken_from_the_operands_of_single_elements() -> None:
    operations, seen = recorded()
    out = torch.zeros(3, 64)
    operations.gelu(torch.zeros(3, 160)[:, 32:96], out)
    [kernel] = seen
    assert set(kernel.aligned) == {"x_stride", "y_stride", "out_stride"}
    assert kernel.loose == ()
    seen.clear()
    operations.gelu(torch.zeros(3, 161)[:, 33:97], out)
    [kernel] = seen
    assert kernel.aligned == ("out_stride",)
    assert set(kernel.loose) == {"x", "y"}
    names = [kernel.arguments[index][0] for index in kernel.aligned_arguments]
    assert names == ["indices", "out", "out_stride"]


def test_alignment_follows_from_the_width_of_what_is_summed() -> None:
    operations, seen = recorded()
    gain = torch.zeros(50)
    operations.rms_norm(torch.zeros(2, 64)[:, :50], gain, 1e-5, torch.zeros(2, 64)[:, :50])
    [kernel] = seen
    assert not kernel.aligned and {"x", "gain", "out"} <= set(kernel.loose)
    with pytest.raises(ValueError, match=r"norm needs rows aligned.*x_stride"):
        operations.rms_norm(torch.zeros(2, 65)[:, :64], torch.zeros(64), 1e-5, torch.zeros(2, 64))
    with pytest.raises(ValueError, match="no whole runs of 64"):
        operations.rms_norm(torch.zeros(2, 96), torch.zeros(64), 1e-5, torch.zeros(2, 96))


def test_a_router_gives_a_program_several_tokens_only_when_there_are_many() -> None:
    grids: list[tuple[Grid, object]] = []

    class Grids(Recorder):
        def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
            names = [name for name, _ in kernel.arguments]
            grids.append((grid, arguments[names.index("per_program")]))

    operations, w = Operations(Grids(CPU, 90)), torch.zeros(30, 64)
    for tokens in (1, 131, 4096):
        operations.linear_f32(torch.zeros(tokens, 64), w, None, torch.zeros(tokens, 30))
    assert grids == [((8, 1, 1), 1), ((8, 131, 1), 1), ((8, 133, 1), 31)]
    assert 133 * 31 >= 4096 > 132 * 31


@pytest.mark.parametrize(("experts", "top_k"), [(257, 2), (64, 17), (4, 5), (4, 0)])
def test_a_choice_the_kernel_cannot_make_is_refused(experts: int, top_k: int) -> None:
    operations, _ = recorded()
    with pytest.raises(ValueError, match=f"{top_k} of {experts} experts"):
        operations.route(
            torch.zeros(2, experts), torch.zeros(2, top_k, dtype=torch.int32), torch.zeros(2, top_k)
        )


def test_a_cache_of_another_shape_is_refused() -> None:
    operations, _ = recorded()
    numbers, q_out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 256).half()
    cache, params = torch.zeros(2, 3, 2, 16, 64).half(), attention_of(4, 2, 64)
    for wrong in (torch.zeros(2, 3, 16, 2, 64).half(), cache[:, :, :, :8]):
        with pytest.raises(ValueError, match="is not one of"):
            operations.rope_store(torch.zeros(2, 512), numbers, numbers, params, wrong, q_out)
    with pytest.raises(ValueError, match="96 columns to rotate in heads of 64"):
        table = torch.zeros(8, 2, 48)
        operations.rope_store(torch.zeros(2, 512), numbers, numbers, params, cache, q_out, rope=table)
