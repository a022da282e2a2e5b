"""`doctor` and the facts about the machine that it and `bench` report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worker_orcd.cli import doctor, machine


def test_this_machine_can_serve(invoke: Any) -> None:
    outcome = invoke("doctor")
    assert outcome.status == 0
    for what in ("versions", "CPU", "cores", "memory", "C compiler", "CPU kernels", "GPU", "cache"):
        assert what in outcome.out


def test_json_has_every_finding(invoke: Any) -> None:
    findings = json.loads(invoke("doctor", "--json").out)
    assert {finding["verdict"] for finding in findings} <= {"ok", "note"}
    assert all(finding["advice"] for finding in findings if finding["verdict"] == "note")


def test_what_is_missing_comes_with_advice(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine, "LIBRARIES", ("torch", "no-such-library"))
    found = {finding.what: finding for finding in doctor.examine(tmp_path)}
    assert found["versions"].verdict == "bad"
    assert found["versions"].advice == "install no-such-library"
    assert found["C compiler"].verdict == "note"
    assert "install gcc" in found["C compiler"].advice
    assert found["CPU kernels"].verdict == "note"
    assert "reference backend" in found["CPU kernels"].advice
    assert found["cache"].verdict == "note"
    assert "XDG_CACHE_HOME" in found["cache"].advice
    assert invoke("doctor").status == 1


def test_a_gpu_is_seen_and_said_not_to_be_used(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").write_text("")
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: 570.1\nGCC version: 12\n")
    found = {finding.what: finding for finding in doctor.examine(tmp_path)}
    gpu = found["GPU"]
    assert found["NVML"].verdict == "note" and found["NVML"].found.startswith("not available: ")
    assert gpu.found == "nvidia0; NVRM version: 570.1"
    assert "torch finds no CUDA device" in gpu.advice and "the CPU is used" in gpu.advice


def test_nvml_is_asked_only_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = SimpleNamespace(pids=lambda: frozenset({3, 4}))
    monkeypatch.setattr("worker_orcd.nvml.open_nvml", lambda: answering)
    assert "NVML" not in {finding.what for finding in doctor.examine(tmp_path)}
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").write_text("")
    found = {finding.what: finding for finding in doctor.examine(tmp_path)}["NVML"]
    assert (found.verdict, found.found) == ("ok", "answers; 2 processes on the GPUs")


CPUINFO = """\
processor : 0
model name : Example 9000
flags : fpu avx2 fma f16c avx512f

processor : 1
model name : Other
"""


@pytest.fixture
def fake_root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    return tmp_path


def test_the_processor_is_described(fake_root: Path) -> None:
    here = machine.describe(fake_root)
    assert here.cpu == "Example 9000"
    assert here.instruction_sets == ("avx2", "fma", "f16c", "avx512f")


def test_a_machine_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    assert machine.describe(tmp_path).instruction_sets == ()
