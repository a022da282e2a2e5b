"""What runs all GPU scripts, and the digests that they compare with; on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from gpu_goldens import GOLDENS, Goldens, digest
from gpu_suite import PARTS, TAIL_LINES, Part, Ran, arguments, chosen, command, main, merge, run

ROOT = Path(__file__).parent.parent
LOGITS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def suite(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# -- all scripts -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_are_in_one_file(tmp_path: Path):
    """Where $OUT says, or --out; what failed is said in the table and by the exit status."""
    engine = "--subjects 2 --watched 4 --requests 8 --sizes 1 --only crowd"
    done = suite("bench", "--device", "cpu", "--engine-options", engine, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2].split()[::2] == ["engine", "ok"]
    merged = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert merged["mode"] == "bench"
    assert merged["stamp"]["device"].startswith("CPU")
    assert merged["parts"]["engine"]["results"]["crowd tiny-llama.gguf 1"]["decode_rate"] > 0

    done = suite("check", tmp_path / "absent.gguf", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2].endswith("failed (1)")
    merged = json.loads((tmp_path / "gpu_check.json").read_text())
    for part in ("engine", "memory"):
        assert any("absent.gguf" in line for line in merged["parts"][part]["printed"])


def test_after_a_failure_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bad = Part("bad", "gpu_engine.py", ("--only", "nothing"), files=True, any_device=True)
    good = Part("good", "gpu_engine.py", ("--help",), any_device=True)
    monkeypatch.setitem(PARTS, "check", (bad, good))
    monkeypatch.setattr(sys, "argv", ["x", "check", "no.gguf", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    table = [line.split()[::2] for line in capsys.readouterr().out.splitlines()[-3:-1]]
    assert table == [
        [
            "bad",
            "failed",
        ],
        ["good", "ok"],
    ]
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [part["verdict"] for part in parts.values()] == ["failed (2)", "ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path):
    done = suite("check", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (2, "there is no GPU that torch can use\n")


def test_make_runs_them_with_the_python_that_is_named(tmp_path: Path):
    for target in ("gpu-check", "gpu-bench"):
        made = subprocess.run(
            ["make", "--no-print-directory", "-n", target, "MODEL=a.gguf b.gguf", "GPU_ARGS=--parts engine"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
            | {"PYTHON": "python9"},  # this may run under another make
            capture_output=True,
            text=True,
        )
        mode = target.removeprefix("gpu-")
        wanted = f"python9 benchmarks/gpu_suite.py {mode} a.gguf b.gguf --parts engine"
        assert made.stdout.splitlines() == [wanted]


def test_every_script_knows_its_options():
    for parts in PARTS.values():
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            text = (ROOT / "benchmarks" / part.script).read_text()
            if "parser_of(" in text:
                text += (ROOT / "benchmarks" / "gpu_session.py").read_text()
            for option in ("--out", "--commit", *(word for word in part.options if word.startswith("--"))):
                assert f'"{option}"' in text, (part.script, option)
            for mode in part.options[
                1 : part.options.index("--seconds") if "--seconds" in part.options else None
            ]:
                assert f'"{mode}"' in text, (part.script, mode)


def test_parts_are_chosen():
    assert [part.name for part in chosen(arguments(["check", "--parts", "tiny", "linear"]))] == [
        "linear",
        "tiny",
    ]
    assert [part.name for part in chosen(arguments(["bench", "--device", "cpu"]))] == ["engine"]


def test_files_go_to_those_that_read_them(tmp_path: Path):
    args = arguments(["check", "x.gguf", "--commit", "abc", "--engine-options", "--subjects 3"])
    lines = {part.name: command(part, args, args.files, tmp_path / "o") for part in PARTS["check"]}
    assert {name for name, line in lines.items() if "x.gguf" in line} == {"model", "engine", "memory"}
    assert lines["engine"][-4:] == ["--device", "cuda", "--subjects", "3"]
    assert lines["memory"][-2:] == ["--device", "cuda"]  # the options are the engine's
    assert lines["linear"][-4:] == ["--out", str(tmp_path / "o"), "--commit", "abc"]


# -- one script --------------------------------------------------------------------------------------------


def test_results_and_the_last_lines_are_kept(tmp_path: Path):
    out = tmp_path / "o.json"
    code = f"for i in range(100): print(i)\nopen({str(out)!r}, 'w').write('[1]'); raise SystemExit(3)"
    ran = run(PARTS["check"][0], [sys.executable, "-c", code], out, 60.0)
    assert (ran.ok, ran.verdict(), ran.results) == (False, "failed (3)", [1])
    assert ran.printed == [str(number) for number in range(100)][-TAIL_LINES:]


def test_results_of_an_earlier_run_are_not_taken(tmp_path: Path):
    out = tmp_path / "o.json"
    out.write_text("[1]")
    assert run(PARTS["check"][0], [sys.executable, "-c", ""], out, 60.0).results is None


def test_half_a_file_is_no_result(tmp_path: Path):
    out = tmp_path / "o.json"
    ran = run(PARTS["check"][0], [sys.executable, "-c", f"open({str(out)!r}, 'w').write('[1')"], out, 60.0)
    assert (ran.results, ran.printed) == (None, ["o.json is not whole"])


def test_at_its_limit_a_script_ends_with_what_it_started(tmp_path: Path):
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    ran = run(PARTS["check"][0], [sys.executable, "-c", code], tmp_path / "o.json", 3.0)
    assert ran.code is None
    assert ran.verdict().startswith("stopped after")
    pid = int(ran.printed[0])
    for _ in range(500):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the child lives")


def test_one_file_holds_all(tmp_path: Path):
    good = Ran("a", 0, 1.0, {"stamp": {"commit": "abc"}, "x": 1}, ["not kept"])
    bad = Ran("b", None, 2.0, None, ["kept"])
    merge(tmp_path / "all.json", "check", [good, bad])
    whole = json.loads((tmp_path / "all.json").read_text())
    assert whole["stamp"] == {"commit": "abc"}
    assert whole["parts"]["a"]["printed"] == []
    assert whole["parts"]["a"]["results"]["x"] == 1
    assert whole["parts"]["b"] == {
        "verdict": "stopped after 2 s",
        "seconds": 2.0,
        "results": None,
        "printed": ["kept"],
    }


# -- digests -----------------------------------------------------------------------------------------------


def goldens(path: Path, kind: str = "GPU A", *, update: bool = False, contract: int = 1) -> Goldens:
    return Goldens(path, kind, "Triton 1", contract=contract, update=update)


def test_what_was_pinned_is_compared(tmp_path: Path):
    path = tmp_path / "goldens.json"
    told, ok = goldens(path).check("llama", LOGITS)
    assert ok and told.endswith("not pinned for GPU A")
    assert not path.exists()
    assert goldens(path, update=True).check("llama", LOGITS)[0].endswith("pinned")
    told, ok = goldens(path).check("llama", LOGITS)
    assert ok and told.endswith("as pinned")
    changed = LOGITS.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(2))
    told, ok = goldens(path).check("llama", changed)
    assert not ok and told.endswith(f"but {digest(LOGITS)[:12]} is pinned")


def test_kinds_and_contracts_are_apart(tmp_path: Path):
    path = tmp_path / "goldens.json"
    goldens(path, update=True).check("llama", LOGITS)
    goldens(path, "GPU B", update=True).check("llama", -LOGITS)
    assert goldens(path).check("llama", LOGITS)[1]
    assert not goldens(path).check("llama", -LOGITS)[1]
    assert goldens(path, "GPU C").check("llama", -LOGITS)[0].endswith("as on GPU B, not pinned for GPU C")
    assert goldens(path, contract=2).check("llama", -LOGITS)[0].endswith("not pinned for GPU A")
    assert goldens(path).check("gpt2", LOGITS)[0].endswith("not pinned for GPU A")


def test_another_compiler_is_named(tmp_path: Path):
    path = tmp_path / "goldens.json"
    goldens(path, update=True).check("llama", LOGITS)
    newer = Goldens(path, "GPU A", "Triton 2", contract=1, update=False)
    assert newer.check("llama", -LOGITS)[0].endswith("is pinned by Triton 1, this is Triton 2")


def test_a_digest_is_of_the_bits():
    assert digest(np.zeros(3, np.float32)) != digest(-np.zeros(3, np.float32))
    assert digest(LOGITS) == digest(np.asfortranarray(LOGITS))


def test_the_pinned_ones_are_digests():
    for kinds in json.loads(GOLDENS.read_text()).values():
        for one in kinds.values():
            assert set(one) == {"compiler", "sha256"}
            assert all(len(value) == 64 and int(value, 16) >= 0 for value in one["sha256"].values())
