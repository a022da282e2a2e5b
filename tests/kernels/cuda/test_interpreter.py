"""The kernels' logic on this machine's processor: every format against float64, under Triton's interpreter.

The interpreter knows no assembly, so this runs the plain twins of it. Their arithmetic is the same; that the
two give the same bits is for `benchmarks/gpu_linear.py` to show, on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd.kernels.cuda.variants import FORMATS

pytest.importorskip("triton", reason="needs Triton, which is not installed")

HERE = Path(__file__).parent
PATHS = [HERE.parents[2] / "src", HERE.parents[2] / "benchmarks"]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, float]]]:
    """By format, what `interpreted.py` prints."""
    done = subprocess.run(
        [sys.executable, HERE / "interpreted.py", *FORMATS],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "more"])
def test_products_equal_float64(found: dict[str, list[dict[str, float]]], name: str) -> None:
    assert len(found[name]) >= 3
    for case in found[name]:
        assert case["error"] < 1e-3
        assert case["counters"] == 0
