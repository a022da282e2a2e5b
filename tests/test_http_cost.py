"""The script that measures what a token costs on its way to a client: that it runs and counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--seconds", "0.3", "--against", str(ROOT / "src")),
        ("--tokens", "20", "--api", "chat", "--stop", "--burst-ms", "12"),
        ("--tokens", "20", "--api", "completions", "--logprobs"),
    ],
    ids=["running", "chat", "completions"],
)
def test_it_measures(options: tuple[str, ...]):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "http_cost.py"),
            *("--streams", "3", "--rounds", "1", "--step-ms", "2"),
            *options,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if "--against" in options else 1)
    for line in lines:
        figures = dict(re.findall(r"(\S+(?: us| %| ms)?) +(\d+\.\d\d)", line))
        assert float(figures["tok/s"]) > 10
        assert float(figures["loop us"]) > 0
