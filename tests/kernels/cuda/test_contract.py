"""What fixes the bits of a product belongs to the weight alone, and does not change unnoticed."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd import quant
from worker_orcd.kernels.cuda.contract import SHORTEST_CHUNK, num_chunks
from worker_orcd.quant.gpu_layout import GpuLayout


def layout(name: str) -> GpuLayout:
    found = quant.BY_NAME[name].gpu
    assert found is not None
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([fmt.name for fmt in quant.ALL]),
    n=st.integers(1, 300_000),
    blocks=st.integers(1, 120),
)
def test_chunks_are_of_equal_length(name: str, n: int, blocks: int) -> None:
    k = 256 * blocks
    chunks = num_chunks(layout(name), n, k)
    assert chunks == 1 or k // chunks >= SHORTEST_CHUNK
    assert (k // layout(name).step(k)) % chunks == 0


def test_the_launch_has_no_say() -> None:
    assert list(inspect.signature(num_chunks).parameters) == ["layout", "n", "k"]


# Changing one of these changes answers: see contract.py.
FROZEN = [
    ("Q4_K", 9216, 3072, 2),
    ("Q4_K", 3072, 3072, 6),
    ("Q4_K", 16384, 3072, 1),
    ("Q4_K", 3072, 8192, 8),
    ("Q6_K", 3072, 3072, 8),
    ("Q6_K", 896, 4864, 19),
    ("Q8_0", 151936, 896, 1),
    ("Q8_0", 1152, 896, 1),
    ("Q5_0", 9728, 896, 1),
    ("Q4_0", 3072, 8192, 8),
    ("MXFP4", 5760, 2880, 3),
    ("MXFP4", 2880, 2880, 9),
    ("Q8_0", 2880, 4096, 8),
    ("Q4_1", 576, 1536, 6),
    ("F16", 50257, 768, 1),
]


@pytest.mark.parametrize(("name", "n", "k", "chunks"), FROZEN)
def test_the_table_is_frozen(name: str, n: int, k: int, chunks: int) -> None:
    assert num_chunks(layout(name), n, k) == chunks


# So is the order of columns within a step.
def test_steps_are_frozen() -> None:
    assert {fmt.name: layout(fmt.name).steps[0] for fmt in quant.ALL} == {
        "F32": 64, "F16": 64, "BF16": 64, "Q4_0": 128, "Q4_1": 128, "Q5_0": 128, "Q5_1": 128, "Q8_0": 128,
        "IQ4_NL": 128, "MXFP4": 128, "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 128,
    }  # fmt: skip
    assert layout("MXFP4").step(2880) == layout("Q4_1").step(576) == 64
