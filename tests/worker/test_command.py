"""The worker as its user meets it: a process of its own, started by the command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from worker_bench import tiny_file

import worker_orcd

pytestmark = pytest.mark.slow
SECONDS = 600.0  # more than a start takes on a busy machine


class Process:
    """`worker-orcd serve` and what it narrates."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "worker_orcd", "serve", "--port", "0", "--narration", "json"]
        command += options
        source = str(Path(worker_orcd.__file__).parents[1])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": source},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            self.lines.extend(iter(stderr.readline, ""))

    def events(self, name: str) -> list[dict[str, Any]]:
        told = (json.loads(line) for line in list(self.lines))
        return [event for event in told if event["event"] == name]

    def until(self, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while not self.events(name):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.02)
        return self.events(name)[0]

    def get(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.until("startup")["uri"]).netloc, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())

    def execute(self, **body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, data) of each event of a job."""
        connection = http.client.HTTPConnection(urlsplit(self.until("ready")["uri"]).netloc, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", "/execute", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            name = ""
            for line in response:
                if line.startswith(b"event: "):
                    name = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[6:])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        code = self.process.wait(SECONDS)
        self._reader.join()
        return code


@contextlib.contextmanager
def process(*options: str) -> Iterator[Process]:
    started = Process(*options)
    try:
        yield started
    finally:
        started.process.kill()
        started.exit_code()


@contextlib.contextmanager
def manager() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Who is called back: the URL, and what arrived. The first call is turned away."""
    calls: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append(body | {"authorization": self.headers["authorization"]})
            self.send_response(503 if len(calls) == 1 else 204)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/ready", calls
        finally:
            server.shutdown()
            thread.join()


def test_the_real_model_from_start_to_stop(demo_model: Path, tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("t0ken\n")
    secret = "Zebras at the Überlingen aquarium"
    with manager() as (url, calls):
        options = ["--model", str(demo_model), "--shutdown-grace-seconds", "240"]
        with process(*options, "--callback-url", url, "--callback-token-file", str(token)) as worker:
            uri = worker.until("startup")["uri"]
            health = worker.get("/health")  # answered at once: the model is loaded by then if we were slow
            assert (health["status"], health["state"]) in (("loading", "starting"), ("healthy", "ready"))
            worker.until("ready")
            while len(calls) < 2:
                time.sleep(0.02)
            call = calls[-1]
            assert call["authorization"] == "Bearer t0ken" and call["uri"] == uri
            assert call["worker_id"] == worker.get("/health")["worker_id"]
            assert call["model_ref"] == demo_model.name and call["worker_type"] == "gguf-cpu"
            assert call["memory_bytes"] > 90e6 and call["memory_architecture"] == "host-memory"
            assert "execute" in call["capabilities"]

            events = worker.execute(
                job_id="j1",
                messages=[{"role": "user", "content": f"Write a long story about {secret}."}],
                max_tokens=150,
                ignore_eos=True,
                temperature=0,
            )
            told = [next(events), next(events)]
            worker.signal(signal.SIGTERM)
            told += events
            assert [name for name, _ in told if name != "metrics"] == ["started", *["token"] * 150, "end"]
            assert worker.exit_code() == 0
    log = "".join(worker.lines)
    assert "Zebras" not in log and "aquarium" not in log and "t0ken" not in log
    assert "Traceback" not in log
    assert worker.events("execute_start")[0]["prompt_sha256"]


def test_the_page_about_http_shows_what_the_worker_answers(demo_model: Path):
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    request = re.search(r"curl -N \S+/execute .*? -d '(\{.*?\})'", page, re.DOTALL)
    assert request is not None
    answer = page[request.end() : page.index("event: end", request.end()) + 200]  # not the samples after it
    shown = re.findall(r"^event: (started|token|end)\ndata: (\{.*\})$", answer, re.MULTILINE)
    assert [name for name, _ in shown] == ["started", "token", "token", "end"]
    with process("--model", str(demo_model), "--device", "cpu") as worker:
        if worker.until("ready")["device"] != "cpu":
            pytest.skip("the sample was computed by the native kernels")
        told = [event for event in worker.execute(**json.loads(request[1])) if event[0] != "metrics"]
    for (name, text), (found, data) in zip(shown, [*told[:3], told[-1]], strict=True):
        known = json.loads(text.replace(",…}", "}"))
        changing = {"started_at", "decode_time_ms"}
        assert found == name and known.keys() <= data.keys()
        assert {key: data[key] for key in known.keys() - changing} == {
            key: known[key] for key in known.keys() - changing
        }


def test_a_bad_file_is_one_sentence_and_exit_1(tmp_path: Path):
    file = tiny_file()
    del file.tensors["blk.0.attn_k.weight"]
    with process("--model", str(file.write(tmp_path / "bad.gguf"))) as worker:
        assert worker.exit_code() == 1
    [error] = worker.events("error")
    assert error["code"] == "MODEL_LOAD_FAILED" and "blk.0.attn_k.weight" in error["sentence"]
    assert "Traceback" not in "".join(worker.lines)


def test_a_setting_that_the_model_contradicts_is_told_late_and_exits_1(tiny_model: Path):
    """As docs/settings.md says."""
    with process("--model", str(tiny_model), "--max-model-len", "99999") as worker:
        assert worker.exit_code() == 1
    [error] = worker.events("error")
    assert error["code"] == "INVALID_CONFIGURATION" and "max_model_len is 99999" in error["sentence"]


def test_a_second_signal_ends_it_at_once(tiny_model: Path):
    """Which its exit code tells: after the jobs, or cancelling them, it would be 0."""
    options = ["--model", str(tiny_model), "--kv-cache-size-mb", "4", "--max-num-seqs", "1"]
    with process(*options, "--shutdown-grace-seconds", "240") as worker:
        address = urlsplit(worker.until("ready")["uri"]).netloc
        connection = http.client.HTTPConnection(address, timeout=120)
        with contextlib.closing(connection):
            job = {"prompt": ["ab"] * 8, "n": 8, "max_tokens": 500, "ignore_eos": True, "stream": True}
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(job), headers)
            assert connection.getresponse().status == 200  # 64 sequences one by one: many seconds of work
            worker.signal(signal.SIGSTOP)  # so that both signals are there before any job can finish
            worker.signal(signal.SIGTERM)
            worker.signal(signal.SIGINT)
            worker.signal(signal.SIGCONT)
            assert worker.exit_code() in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_what_ends_the_process_from_outside_of_python_leaves_a_word(tiny_model: Path):
    with process("--model", str(tiny_model), "--kv-cache-size-mb", "4") as worker:
        worker.until("ready")
        worker.signal(signal.SIGSEGV)
        assert worker.exit_code() == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in "".join(worker.lines)


def test_ctrl_c_is_no_traceback_however_early(tmp_path: Path):
    """Here: while the command line is imported, before anything could have asked for the signal."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'worker_orcd.cli.settings': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(worker_orcd.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "worker_orcd", "serve", "--model", "demo"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
