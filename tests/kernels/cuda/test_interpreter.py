"""The kernels' logic on this machine's processor: every format against float64, under Triton's interpreter.

The interpreter knows no assembly, so this runs the plain twins of it. Their arithmetic is the same; that the
two give the same bits is for `benchmarks/gpu_linear.py` to show, on a GPU.
"""

from __future__ import annotations

import pytest
import under_interpreter

from worker_orcd.kernels.cuda.variants import FORMATS

pytest.importorskip("triton", reason="needs Triton, which is not installed")


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, float]]]:
    """By format, what `interpreted.py` prints."""
    return under_interpreter.run("interpreted.py", *FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "more", "ends"])
def test_products_equal_float64(found: dict[str, list[dict[str, float]]], name: str) -> None:
    assert len(found[name]) >= 3
    for case in found[name]:
        assert case["error"] < 1e-3
        assert case["counters"] == 0
