"""The script that measures a start: what it makes of a worker's log, and that it measures a real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_start import Phase, Start, environment, read_start, table
from start_probe import SOURCES
from worker_orcd.synth.shapes import shape_named
from worker_orcd.synth.write import write_model

ROOT = Path(__file__).parent.parent


def line(what: str, began: float, ended: float, cpu: float = 0.0) -> str:
    return json.dumps({"what": what, "began": began, "ended": ended, "cpu": cpu})


def test_phases_are_told_from_when_the_process_began():
    log = [
        line("interpreter", 100.25, 100.25),
        line("torch imported", 101.0, 103.0, 1.5),
        line("a graph", 103.0, 103.5, 0.25),
        line("a graph", 104.0, 104.25, 0.125),
        line(SOURCES, 7, 1600),
    ]
    narrated = [
        "warning: not an event",
        json.dumps({"timestamp": "1970-01-01T00:01:42.500000Z", "event": "startup"}),
        json.dumps({"timestamp": "1970-01-01T00:01:43Z", "event": "model_load_progress"}),
        json.dumps({"timestamp": "1970-01-01T00:01:45Z", "event": "ready"}),
    ]
    assert read_start(100.0, log, narrated) == Start(
        phases={
            "interpreter": Phase(0.25, 0.25),
            "torch imported": Phase(3.0, 2.0, 1.5),
            "a graph": Phase(4.25, 0.75, 0.375, count=2),
            "listening": Phase(2.5),
            "ready": Phase(5.0),
        },
        modules=1600,
        sources=7,
    )


def test_the_table_has_medians_in_the_order_of_their_ends():
    starts = [
        Start({"ready": Phase(end), "torch imported": Phase(end / 2, 0.5, 0.25)}, 1, 0)
        for end in (4.0, 9.0, 5.0)
    ]
    starts[0].phases["a graph"] = Phase(3.0, 1.0, 1.0, count=19)
    _head, *rows = table(starts)
    assert [re.split(r"  +", row.strip()) for row in rows] == [
        ["torch imported", "2.50", "0.50", "0.25", "(2.00 to 4.50)"],
        ["a graph, 19 times", "3.00", "1.00", "1.00", "(3.00 to 3.00)"],
        ["ready", "5.00", "(4.00 to 9.00)"],
    ]


def test_bytecode_is_kept_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("WORKER_ORCD_PORT", "1")
    assert environment(None)["PYTHONDONTWRITEBYTECODE"] == "1"
    kept = environment(tmp_path)
    assert kept["PYTHONPYCACHEPREFIX"] == str(tmp_path)
    assert not {"PYTHONDONTWRITEBYTECODE", "WORKER_ORCD_PORT"} & kept.keys()


@pytest.mark.slow
def test_it_measures_a_start(tmp_path: Path):
    model = tmp_path / "tiny.gguf"
    shape = shape_named("llama", "tiny")
    assert shape is not None
    write_model(model, shape, "llama", "Q4_K_M")
    out = tmp_path / "start.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "gpu_start.py", model, "--device", "cpu", "--runs", "1"),
            *("--options", "--max-model-len 64", "--out", out),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"ready after [\d.]+ s .*, 1 starts\); \d{4} modules, 0 of them without bytecode"
    assert re.search(said, done.stdout)
    (phases,) = json.loads(out.read_text())["start tiny.gguf"]
    order = ("interpreter", "HTTP imported", "listening", "torch imported", "memory planned", "ready")
    ends = [phases[name][0] for name in order]
    assert ends == sorted(ends)
    assert {"torch's libraries (ahead)", "tokenizer", "weights on the device"} <= phases.keys()
    assert "device context (ahead)" not in phases
