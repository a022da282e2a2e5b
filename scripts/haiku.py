"""
`make run`: start a worker on the demo model (or another), stream a haiku from it over HTTP, and keep serving.

    python scripts/haiku.py [--model MODEL] [--port PORT] [--oneshot]

Standard library only, so it also shows what a client has to do. The worker gets the environment,
WORKER_ORCD_* included. Exit status: 0 after an answer, 1 with the worker's log if there was none, 130 if it
was cut short.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any

HOST = "127.0.0.1"
PROMPT = "Write a haiku about autumn rain."
START_SECONDS = 1800.0  # a slow network may be fetching the model
STOP_SECONDS = 15.0


class NoAnswer(Exception):
    """The worker did not do what it should; the message is for people."""


def main() -> int:
    options = _options()
    port = options.port if options.port is not None else _free_port(8080)
    with tempfile.NamedTemporaryFile(
        "w+", encoding="utf-8", errors="replace", prefix="worker-orcd-", suffix=".log"
    ) as log:
        worker = _start(options.model, port, log)
        _stop_on_signals(worker)
        try:
            _wait_until_ready(worker, port, log)
            _show_answer(port)
            print(f"\nserving http://{HOST}:{port}  (API: /docs, /execute, /v1/chat/completions)", flush=True)
            if not options.oneshot:
                print(f"its log, while it runs: {log.name}\nCtrl-C stops it", flush=True)
                worker.wait()
                raise NoAnswer("the worker stopped by itself")
        except (NoAnswer, OSError, http.client.HTTPException) as problem:
            _stop(worker)
            log.seek(0)
            print(f"\n{problem or type(problem).__name__}; the worker's log:\n{log.read()}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(
                f"\nstopping; waiting up to {STOP_SECONDS:.0f} s for running requests"
                " (Ctrl-C again to stop now)",
                flush=True,
            )
            status = _stop(worker)
            return 0 if status == 0 and not options.oneshot else 130
        status = _stop(worker)
        if status != 0:
            log.seek(0)
            print(f"the worker answered, but exited with {status}; its log:\n{log.read()}", file=sys.stderr)
        return int(status != 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="serve a model and show an answer")
    parser.add_argument(
        "--model", default="demo", help="path, hf:org/repo/file.gguf, or demo (default: demo)"
    )
    parser.add_argument(
        "--port", type=int, help="where to listen (default: 8080, or another if that is taken)"
    )
    parser.add_argument("--oneshot", action="store_true", help="stop after the answer")
    return parser.parse_args()


def _stop_on_signals(worker: subprocess.Popen[bytes]) -> None:
    """The first raises KeyboardInterrupt; every later one kills the worker, from that moment on."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _kill_on_signals(worker)
        raise KeyboardInterrupt

    _on_signals(interrupt)


def _kill_on_signals(worker: subprocess.Popen[bytes]) -> None:
    _on_signals(lambda _number, _frame: worker.kill())


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise SystemExit("no free port")


def _start(model: str, port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "worker_orcd", "serve", "--model", model, "--host", HOST]
    command += ["--port", str(port), "--narration", "json"]
    # Of its own session, so that Ctrl-C reaches us only and we can stop it in order.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _stop(worker: subprocess.Popen[bytes]) -> int:
    """Its exit status. Ctrl-C meanwhile kills it."""
    _kill_on_signals(worker)
    if worker.poll() is None:
        worker.terminate()
    try:
        return worker.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _wait_until_ready(worker: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    started = time.monotonic()
    told = 0
    while time.monotonic() - started < START_SECONDS:
        if worker.poll() is not None:
            raise NoAnswer(f"the worker exited with {worker.returncode} before it was ready")
        told = _tell_news(log, told)
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/ready", headers=_key())
            status = connection.getresponse().status
            connection.close()
        except OSError:  # it does not listen yet
            status = 0
        if status == 200:
            _tell_news(log, told)
            print(f"ready after {time.monotonic() - started:.1f} s\n", flush=True)
            return
        time.sleep(0.25)
    raise NoAnswer(f"the worker was not ready after {START_SECONDS:.0f} s")


def _key() -> dict[str, str]:
    key = os.environ.get("WORKER_ORCD_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _tell_news(log: IO[str], told: int) -> int:
    """Print what the worker has narrated since `told`, an offset in its log; of progress, only the latest."""
    text = os.pread(log.fileno(), 1 << 20, told)
    whole = text.rfind(b"\n") + 1
    progress = ""
    for line in text[:whole].decode("utf-8", "replace").splitlines():
        try:
            event = json.loads(line)
            sentence = "  " + event["sentence"]
            is_progress = event["event"] == "model_load_progress"
        except (ValueError, KeyError, TypeError):  # not narration
            sentence, is_progress = "  " + line, False
        if not is_progress:
            print(sentence, flush=True)
        progress = sentence if is_progress else ""
    if progress:
        print(progress, flush=True)
    return told + whole


def _show_answer(port: int) -> None:
    print(f"> {PROMPT}\n", flush=True)
    sent = time.monotonic()
    first = last = 0.0
    tokens = 0
    ended = False
    for event, data in _execute(port):
        if event == "token":
            last = time.monotonic()
            first = first or last
            tokens += 1
            print(data["t"], end="", flush=True)
        elif event == "error":
            raise NoAnswer(f"the worker answered {data['code']}: {data['message']}")
        elif event == "end":
            ended = True
    if not ended or tokens < 2:
        raise NoAnswer(f"the stream broke off after {tokens} tokens")
    rate = (tokens - 1) / (last - first)
    print(
        f"\n\n{rate:.1f} tok/s, first token after {1000 * (first - sent):.0f} ms, {tokens} tokens", flush=True
    )


def _execute(port: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of one job."""
    job = {
        "job_id": f"haiku-{os.getpid()}",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 80,
        "temperature": 0.6,
        "top_p": 0.9,
        "seed": 1,  # the same answer every time: that is what the worker promises
    }
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    connection.request("POST", "/execute", json.dumps(job), {"Content-Type": "application/json", **_key()})
    response = connection.getresponse()
    if response.status != 200:
        raise NoAnswer(
            f"POST /execute gave {response.status}: {response.read(2000).decode('utf-8', 'replace')}"
        )
    event = ""
    for line in response:
        field, _, value = line.decode("utf-8").rstrip("\r\n").partition(": ")
        if field == "event":
            event = value
        elif field == "data":
            yield event, json.loads(value)
    connection.close()


if __name__ == "__main__":
    sys.exit(main())
