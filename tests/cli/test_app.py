"""The command line as a whole: quick, helpful, and never a traceback for an expected failure."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.version import VERSION

COMMANDS = (
    "serve",
    "run",
    "inspect",
    "bench",
    "doctor",
    "fetch",
    "synth",
    "quantize",
    "perplexity",
    "version",
)
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "fastapi",
    "uvicorn",
    "huggingface_hub",
    "tokenizers",
    "matplotlib",
)


def test_help_names_every_command(invoke: Any) -> None:
    shown = invoke("--help")
    assert shown.status == 0
    assert [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")][
        -len(COMMANDS) :
    ] == [*COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(invoke: Any, command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.status == 0
    assert f"Usage: worker-orcd {command}" in shown.out
    assert "…" not in shown.out.replace("N,N,…", "")  # nothing is cut off


def test_settings_are_options_where_they_apply(invoke: Any) -> None:
    serve, run = invoke("serve", "--help").out, invoke("run", "--help").out
    for option in ("--port", "--api-key-file", "--callback-url", "--max-num-seqs", "--insecure"):
        assert option in serve
    assert "--max-num-seqs" in run
    assert "--port" not in run
    for shown in (serve, run):
        assert "--api-key " not in shown  # other users of the machine see command lines


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from worker_orcd.cli.app import build; build();"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def processor_seconds(*words: str) -> float:
    """What a command of this Python costs, however long it has to wait for a core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_help_is_quick() -> None:
    yardstick = processor_seconds("-c", "import typer")
    assert processor_seconds("-m", "worker_orcd", "--help") < 10 * yardstick  # three times, where measured


def test_it_runs_as_a_module_and_as_a_script(execute: Any) -> None:
    assert VERSION in execute("version").out
    for option in ("--version", "-V"):
        assert execute(option).out == execute("version").out
    script = Path(sys.executable).with_name("worker-orcd")
    done = subprocess.run([script, "version"], capture_output=True, text=True, check=True)
    assert done.stdout == execute("version").out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sevre"], "Did you mean 'serve'?"),
        (["serve", "--prot", "1"], "--port"),
        (["run"], "model is missing: give --model"),
        (["bench", "--repeats", "0", "--model", "demo"], "--repeats"),
        (["run", "demo", "hi", "--temperature", "3"], "less than or equal to 2"),
        (["serve", "demo", "extra"], "unexpected extra argument"),
    ],
)
def test_a_typing_mistake_gets_a_hint_and_status_2(invoke: Any, words: list[str], hint: str) -> None:
    outcome = invoke(*words)
    assert outcome.status == 2
    assert hint in outcome.err


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["serve"], 2, "error INVALID_CONFIGURATION: model is missing"),
        (["serve", "a.gguf", "--model", "b.gguf"], 2, "found both 'a.gguf' and --model 'b.gguf'"),
        (["bench", "a.gguf", "--model", "b.gguf"], 2, "found both 'a.gguf' and --model 'b.gguf'"),
        (["run", "a.gguf", "hi", "--model", "b.gguf"], 2, "found both 'a.gguf' and --model 'b.gguf'"),
        (["serve", "demo", "--api-key", "s3cret"], 2, "use WORKER_ORCD_API_KEY or --api-key-file"),
        (["run", "--model", "none.gguf", "hello"], 1, "model 'none.gguf': no such file"),
        (["inspect", "--model", "none.gguf"], 1, "model 'none.gguf': no such file"),
        (["bench", "none.gguf"], 1, "model 'none.gguf': no such file"),
        (["serve", "demo", "--port", "x"], 2, "error INVALID_CONFIGURATION: port (from --port)"),
        (["serve", "--model", "demo", "--port", "x"], 2, "error INVALID_CONFIGURATION: port (from --port)"),
        (
            ["serve", "--model", "m", "--host", "0.0.0.0"],
            2,
            "error INVALID_CONFIGURATION: host: found '0.0.0.0'",
        ),
        (["serve", "none.gguf"], 1, "error MODEL_LOAD_FAILED: model 'none.gguf': no such file"),
        (["serve", __file__], 1, "error MODEL_LOAD_FAILED: 'test_app.py' is no GGUF file: it begins with b"),
        (["inspect", "none.gguf"], 1, "error MODEL_LOAD_FAILED: model 'none.gguf': no such file"),
        (["run", "none.gguf", "hello"], 1, "error MODEL_LOAD_FAILED: model 'none.gguf': no such file"),
        (["run", "demo", ""], 2, "error INVALID_CONFIGURATION: PROMPT is empty"),
        (["run", "demo", "hi", "--raw", "--system", "x"], 2, "error INVALID_CONFIGURATION: --raw"),
        (["run", "demo", "hi", "--seed", str(1 << 64)], 2, "error INVALID_CONFIGURATION: --seed"),
        (
            ["bench", "--model", "demo", "--batch-sizes", "1,x"],
            2,
            "error INVALID_CONFIGURATION: --batch-sizes",
        ),
        (["bench", "--model", "demo", "--batch-sizes", "0"], 2, "error INVALID_CONFIGURATION: --batch-sizes"),
        (["bench", "--model", "demo", "--batch-sizes", "65"], 2, "max_num_seqs allows 1 to 64"),
        (["fetch", "hf:x"], 1, "error MODEL_LOAD_FAILED: model 'hf:x': expected hf:org/repo/file.gguf"),
        (["inspect", "demo", "--device", "tpu"], 2, "one of auto, cpu, cuda"),
    ],
)
def test_an_expected_failure_is_one_line(invoke: Any, words: list[str], status: int, line: str) -> None:
    outcome = invoke(*words)
    assert outcome.status == status
    assert line in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.out == ""
    assert "s3cret" not in outcome.err


def test_warnings_about_the_environment_are_printed(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_ORCD_PROT", "1")
    outcome = invoke("inspect", "none.gguf")
    assert "warning: the environment variable WORKER_ORCD_PROT is not a setting" in outcome.err


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_worker_that_is_open_to_everybody_says_so(invoke: Any, host: str) -> None:
    outcome = invoke("serve", "none.gguf", "--host", host, "--insecure")
    assert ("warning: anybody who can reach this machine" in outcome.err) == (host == "0.0.0.0")


def test_fetch_prints_the_file_and_nothing_else(invoke: Any, demo_model: Path) -> None:
    outcome = invoke("fetch", "demo")
    assert outcome.out == f"{demo_model}\n"
    assert outcome.status == 0


def test_a_reader_that_goes_away_is_no_traceback(demo_model: Path) -> None:
    command = f"{sys.executable} -m worker_orcd inspect {demo_model} --json | head -c 10"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=280)
    assert "Traceback" not in done.stderr
    assert done.stdout == '{\n  "versi'
