"""The script that checks a GPU's memory: its parts that need none, and what they would say of a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gpu_memory
from engine_client import Model, load
from gpu_memory import ENGINE, PARTS, STRUCTURED, check_oom, check_plan, check_release, words_of
from gpu_report import Session
from worker_orcd.kernels.memory import Held
from worker_orcd.nvml import GpuProcess, GpuSample
from worker_orcd.synth import shape_named, write_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What a machine with a GPU may lack.
ABSENT = (
    "structlog",
    "tokenizers",
    "jinja2",
    "fastapi",
    "starlette",
    "uvicorn",
    "typer",
    "rich",
    "httpx",
    "pynvml",
)
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(BENCHMARKS)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with windows and experts."""
    shape = shape_named("gpt-oss", "tiny")
    assert shape is not None
    file = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_model(file, shape, "tiny", "MXFP4")
    return file


@pytest.fixture
def model(path: Path) -> Model:
    return load(path, "cpu", ENGINE, 1024)


def session(tmp_path: Path, **args: Any) -> Session:
    return Session(Namespace(out=tmp_path / "out.json", commit="abc", device="cpu", **args))


@pytest.mark.slow
def test_what_needs_no_gpu_runs_without_the_libraries_of_a_worker(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    line = [
        str(path),
        "--device",
        "cpu",
        "--requests",
        "9",
        "--jobs",
        "60",
        "--out",
        str(out),
        "--commit",
        "abc",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(BENCHMARKS / "gpu_memory.py"), *line],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count("needs a GPU") == 2 * 4
    results = json.loads(out.read_text())
    found = results["oom tiny.gguf"]
    assert found["ends"] == {"length": 57, "INVALID_REQUEST": 3} and found["preempted"] > 0
    assert (found["rows"], found["differing"]) == (57 * 24, 0)
    assert set(PARTS) == {"plan", "residency", "closed", "neighbour", "oom", "release"}


def test_an_answer_that_depends_on_the_pool_is_a_failure(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = session(tmp_path, jobs=20)
    original = gpu_memory.answers_alone

    def changed(*args: Any) -> Any:
        answers = original(*args)
        answers[0].tokens = answers[0].tokens[:-1]
        return answers

    monkeypatch.setattr(gpu_memory, "answers_alone", changed)
    check_oom(told, model)
    assert told.failed == 1 and "2 of " in told.lines[-1]
    assert "VRAM_OOM" in STRUCTURED and "INTERNAL" not in STRUCTURED


def test_a_model_that_is_loaded_again_is_another_with_the_same_answers(model: Model, tmp_path: Path) -> None:
    told = session(tmp_path)
    path = model.path
    again = check_release(told, model)
    assert model.runner is None and again.path == path
    assert told.failed == 0 and told.lines[-1].endswith("0 of 96 rows differ")


@pytest.mark.parametrize(("missing", "failures"), [(0, 0), (1, 1)])
def test_a_byte_that_the_driver_misses_is_a_failure(
    missing: int, failures: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU made up: what is held is what the plan says, and the driver has lost so many bytes more."""
    plan = model.plan
    held = Held(
        weights_bytes=plan.weights_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        workspace_bytes=plan.workspace_bytes,
        spare_bytes=5,
        driver_bytes=0,
    )
    monkeypatch.setattr(
        gpu_memory.torch.cuda, "mem_get_info", lambda: (10**12 - held.total_bytes - missing, 10**12)
    )
    told = session(tmp_path)
    told.results[f"before {model.path.name}"] = 10**12
    counted = SimpleNamespace(**{name: getattr(model, name) for name in Model.__slots__} | {"held": held})
    check_plan(told, counted)  # type: ignore[arg-type]
    assert told.failed == failures, told.lines


def test_a_sample_in_words() -> None:
    sample = GpuSample(temperature_celsius=40, processes=(GpuProcess(1), GpuProcess(2)))
    assert words_of(sample).startswith("2 processes, temperature_celsius 40, power_watts None")
    assert words_of(GpuSample()).startswith("not shown")
