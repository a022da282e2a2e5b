"""A wheel carries the CPU kernels where there is a compiler, and can be built where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("src/worker_orcd", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")

# Stands for a C compiler: what is built is its own name. (The real one is tried in tests/kernels.)
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo "made by cc" > "$2"; fi
    shift
done
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a release holds: building leaves traces."""
    for part in PARTS:
        target = tmp_path / "source" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / part, target)
    return tmp_path / "source"


def build_wheel(source: Path, tools: Path) -> Path:
    """The only programs there are stand in `tools`."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "-w", str(source / "out"), str(source)],
        env=os.environ | {"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (source / "out").glob("*.whl")
    return wheel


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_a_wheel_carries_the_compiled_kernels(source: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    (tools / "cc").write_text(COMPILER)
    (tools / "cc").chmod(0o755)
    wheel = build_wheel(source, tools)
    assert "-py3-none-linux_" in wheel.name
    found = names(wheel)
    [library] = [name for name in found if name.endswith(".so")]
    assert library.startswith("worker_orcd/kernels/cpu/native/liborcd-linux-")
    assert "worker_orcd/kernels/cpu/native/orcd.h" in found
    assert "worker_orcd/py.typed" in found
    assert {"LICENSE", "NOTICE"} <= {name.rsplit("/", 1)[-1] for name in found}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(library) == b"made by cc\n"


@pytest.mark.slow
def test_without_a_compiler_a_wheel_carries_the_sources(source: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    wheel = build_wheel(source, tmp_path / "nothing")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]
    assert "worker_orcd/kernels/cpu/native/orcd.h" in names(wheel)
