"""Runs a script of this directory in a process of its own, where Triton interprets kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATHS = [HERE.parents[2] / "src", HERE.parents[2] / "benchmarks"]


def run(script: str, *arguments: str) -> Any:
    """The JSON that the script prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / script, *arguments],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
