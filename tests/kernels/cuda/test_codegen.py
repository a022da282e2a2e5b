"""What the compiler makes of the kernels, without a GPU: no spills, one order of sums, weights in registers.

A part of what is shipped; `benchmarks/gpu_codegen.py` does all of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gpu_codegen import Codegen, disorder, inspect_all, main_loop
from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda.variants import FORMATS, Epilogue, Store, Variant, choose_tile, shape_of

# Instructions that a lane may issue for each weight at 16 tokens: from what an H100 has time for while its
# memory delivers the weight.
BUDGET = {
    "Q4_0": 3.6, "Q4_1": 4.0, "Q5_0": 4.6, "Q5_1": 5.2, "Q8_0": 3.4, "Q2_K": 4.6, "Q3_K": 4.8, "Q4_K": 4.0,
    "Q5_K": 5.0, "Q6_K": 5.6, "IQ4_NL": 5.9, "MXFP4": 4.1,
}  # fmt: skip
PHI3 = Store(num_heads=32, num_kv_heads=32, cache_block=16, rotated=True, fp8=True)


def variant(name: str, n: int, k: int, tokens: int, capability: int, **epilogue: Any) -> Variant:
    shape = shape_of(name, n, k)
    return Variant(shape=shape, tile=choose_tile(shape, n, tokens, capability), epilogue=Epilogue(**epilogue))


def chosen() -> list[tuple[Variant, int]]:
    few = [(variant(name, 3072, 3072, 1, 90), 90) for name in FORMATS]
    many = [(variant(name, 3072, 3072, 4096, 90), 90) for name in ("Q4_K", "Q6_K", "Q8_0", "MXFP4")]
    older = [
        (variant(name, 3072, 3072, tokens, capability), capability)
        for capability in (80, 89)
        for name in ("Q4_K", "Q8_0", "MXFP4")
        for tokens in ((1, 4096) if capability == 80 else (4096,))
    ]
    glu = [
        (variant("Q4_K", 16384, 3072, tokens, 90, paired=True, glu=kind, bias=True, out="fp16"), 90)
        for tokens, kind in ((1, Glu.SWIGLU), (64, Glu.GEGLU), (4096, Glu.SWIGLU))
    ]
    overlapping = [
        (dataclasses.replace(variant(name, 3072, 3072, tokens, 90), overlap=2), 90)
        for name, tokens in (("Q4_K", 1), ("Q8_0", 16), ("Q5_0", 64))
    ]
    fp8 = [
        (variant("Q4_K", 9216, 3072, tokens, capability, head=96, store=PHI3, out="fp16"), capability)
        for tokens, capability in ((1, 90), (64, 90), (4096, 90), (1, 80))
    ]
    return few + many + older + glu + overlapping + fp8


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[Variant, int], Codegen]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return dict(zip(chosen(), inspect_all(chosen(), 2), strict=True))


@pytest.mark.slow
def test_no_kernel_has_a_fault(compiled: dict[tuple[Variant, int], Codegen]) -> None:
    assert [str(one) for one in compiled.values() if one.faults()] == []


@pytest.mark.slow
def test_a_format_sums_in_one_order_on_a_gpu(compiled: dict[tuple[Variant, int], Codegen]) -> None:
    assert disorder(compiled.values()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGET)
def test_instructions_of_a_weight_are_in_budget(
    compiled: dict[tuple[Variant, int], Codegen], name: str
) -> None:
    one = compiled[variant(name, 3072, 3072, 1, 90), 90]
    assert 1.0 < one.per_weight <= BUDGET[name]


@pytest.mark.slow
def test_what_is_wrong_is_said(compiled: dict[tuple[Variant, int], Codegen]) -> None:
    one = compiled[variant("Q4_K", 3072, 3072, 1, 90), 90]
    assert "spilled" in dataclasses.replace(one, spilled=8).faults()[0]
    assert "C7515" in dataclasses.replace(one, warnings=("C7515",)).faults()[0]
    assert "wgmma" in dataclasses.replace(one, matrix="mma").faults()[0]
    assert "shared memory" in dataclasses.replace(one, from_registers=0).faults()[0]
    assert disorder([one, dataclasses.replace(one, widths=("4",))]) != []


def test_the_main_loop_is_the_longest_that_multiplies() -> None:
    sass = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HGMMA.64x16x16.F32 R24, R4, gdesc[UR8] ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   IADD3 R1, R1, R1, RZ ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   BRA 0x60 ;
    """
    assert main_loop(sass) == 2
    assert main_loop("/*0000*/ MOV R1, R2 ;") == 0
