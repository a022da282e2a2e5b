"""A worker's life, in this process: it loads, serves, drains and fails as it should."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_bench import Running, Start, events_of, tiny_file

from worker_orcd.config import CallbackConfig, ServerConfig, WorkerConfig
from worker_orcd.errors import DeviceError, InsufficientMemory
from worker_orcd.runner import runner
from worker_orcd.worker import loading
from worker_orcd.worker.listening import address_of, listen, uri_of
from worker_orcd.worker.process import model_ref

pytestmark = pytest.mark.slow


SECONDS = 60.0  # more than anything here waits for


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A device on which a step takes that long."""
    original = runner._PendingStep.wait
    monkeypatch.setattr(runner._PendingStep, "wait", lambda step: time.sleep(seconds) or original(step))


def hold_steps(monkeypatch: pytest.MonkeyPatch, *, after: int) -> threading.Event:
    """A device that computes so many steps, and the others once the event is set."""
    original, numbers, go = runner._PendingStep.wait, itertools.count(1), threading.Event()

    def wait(step: Any) -> Any:
        assert next(numbers) <= after or go.wait(SECONDS)
        return original(step)

    monkeypatch.setattr(runner._PendingStep, "wait", wait)
    return go


async def first_token(events: Any) -> None:
    async for name, _data in events:
        if name == "token":
            return
    raise AssertionError("no token came")


async def rest(events: Any) -> list[tuple[str, dict[str, Any]]]:
    return [event async for event in events]


async def test_it_answers_while_it_loads_and_then_serves(start: Start, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    original = loading.load_weights
    monkeypatch.setattr(
        loading, "load_weights", lambda *args, **options: gate.wait(SECONDS) and original(*args, **options)
    )
    async with start() as running:
        health = await running.health()
        assert (health["status"], health["state"]) == ("loading", "starting") and health["load_percent"] < 100
        refused = await running.client.post("/execute", json={"job_id": "j", "prompt": "ab"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "NOT_READY"
        gate.set()
        await running.until_ready()
        health = await running.health()
        assert (health["status"], health["state"], health["load_percent"]) == ("healthy", "ready", 100)
        assert (health["model"], health["architecture"], health["worker_id"]) == ("tiny", "llama", "w1")
        assert health["kv_blocks_free"] == health["kv_blocks_total"] > 0
        async with running.job("j1", max_tokens=20) as response:
            events = await rest(events_of(response))
        assert [name for name, _ in events if name != "metrics"] == ["started", *["token"] * 20, "end"]
        assert "ab" not in [e.get("prompt") for e in running.events()]
    assert running.task.result() == 0
    names = [e["event"] for e in running.events()]
    assert names[:2] == ["startup", "model_load_start"] and names[-2:] == ["shutdown", "shutdown"]
    progress = [e["percent"] for e in running.events("model_load_progress")]
    assert progress == [0, 25, 50, 75, 100]
    assert names.index("memory_plan") < names.index("model_load_complete")
    assert names.index("model_load_complete") < names.index("ready") < names.index("execute_start")
    sizes = running.events("memory_plan")[0]["bytes"]
    sentence = running.events("memory_plan")[0]["sentence"]
    assert all(f"MiB of {what}" in sentence for what in ("weights", "workspace", "KV cache"))
    assert sizes["weights"] + sizes["workspace"] + sizes["KV cache"] == sizes["total"]
    flags = running.events("memory_plan")[0]["flags"]
    assert flags["reserve"] == "--vram-fraction 0.8" and flags["KV cache"] == "--kv-cache-size-mb 4"
    assert running.events("execute_end")[0]["device"] == "cpu"


async def test_people_see_the_memory_plan_as_a_table(start: Start):
    async with start(server=ServerConfig(port=0, narration="pretty")) as running:
        await running.until_ready()
    lines = running.log.getvalue().splitlines()
    [first] = [i for i, line in enumerate(lines) if "The model takes" in line]
    table = [line.split() for line in lines[first + 1 : first + 7]]
    assert [row[0] for row in table] == ["weights", "workspace", "KV", "total", "reserve", "available"]
    assert all("MiB" in row for row in table)
    assert "--max-num-batched-tokens" in table[1] and "--vram-fraction" in table[4]
    assert max(map(len, lines[first + 1 : first + 7])) <= 110


async def test_sigterm_lets_running_jobs_finish(start: Start, monkeypatch: pytest.MonkeyPatch):
    go = hold_steps(monkeypatch, after=3)
    async with start() as running:
        await running.until_ready()
        async with running.job("j1", max_tokens=60) as response:
            events = events_of(response)
            await first_token(events)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await running.health())["state"] != "draining":
                await asyncio.sleep(0.005)
            refused = await running.client.post("/execute", json={"job_id": "j2", "prompt": "ab"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "DRAINING"
            assert "retry-after" in refused.headers
            go.set()
            left = await rest(events)
        assert left[-1][0] == "end" and left[-1][1]["tokens_out"] == 60
        assert await running.exit_code() == 0
    assert not running.events("cancel") and not running.events("error")


async def test_a_signal_after_a_shutdown_lets_running_jobs_finish(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    """As supervisors do it: ask politely, then send SIGTERM."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    go = hold_steps(monkeypatch, after=3)
    async with start() as running:
        await running.until_ready()
        async with running.job("j1", max_tokens=60) as response:
            events = events_of(response)
            await first_token(events)
            assert (await running.client.post("/shutdown")).status_code == 202
            while (await running.health())["state"] != "draining":
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            go.set()
            left = await rest(events)
        assert left[-1][0] == "end" and left[-1][1]["tokens_out"] == 60
        assert await running.exit_code() == 0
    assert exits == []


async def test_what_does_not_finish_in_time_is_cancelled(
    start: Start, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
):
    slow_steps(monkeypatch, 0.05)
    async with start(server=replace(config.server, shutdown_grace_seconds=0.2)) as running:
        await running.until_ready()
        async with running.job("j1", max_tokens=400) as response:
            events = events_of(response)
            await first_token(events)
            assert (await running.client.post("/shutdown")).status_code == 202
            left = await rest(events)
        assert (
            left[-1][0] == "error" and left[-1][1]["code"] == "DRAINING" and left[-1][1]["retriable"] is True
        )
        assert await running.exit_code() == 0
    assert running.events("cancel")[-1]["outcome"] == "cancelled" and not running.events("error")


async def test_an_idle_worker_stops_at_once(start: Start):
    async with start() as running:
        await running.until_ready()
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        assert await running.exit_code() == 0
        assert time.monotonic() - started < 30  # nothing to wait for: the grace is a minute


async def test_a_lost_device_ends_every_stream_and_the_worker(start: Start, monkeypatch: pytest.MonkeyPatch):
    slow_steps(monkeypatch, 0.05)
    async with start() as running:
        await running.until_ready()
        ends: list[tuple[str, dict[str, Any]]] = []

        async def stream(name: str) -> None:
            async with running.job(name, max_tokens=400) as response:
                ends.append((await rest(events_of(response)))[-1])

        streams = [asyncio.create_task(stream(f"j{i}")) for i in range(3)]
        while running.worker._session is None or running.worker._session.snapshot.num_running < 3:
            await asyncio.sleep(0.01)

        def lost(_step: Any) -> Any:
            raise DeviceError("the device is lost")

        monkeypatch.setattr(runner._PendingStep, "wait", lost)
        await asyncio.gather(*streams)
        assert [(name, data["code"]) for name, data in ends] == [("error", "CUDA_ERROR")] * 3
        assert await running.exit_code() == 1
    assert any("for good" in e["sentence"] for e in running.events("error"))
    assert not any("exception" in e for e in running.events())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.tensors.pop("blk.1.ffn_down.weight"), "blk.1.ffn_down.weight"),
        (lambda file: file.tiny.metadata.update({"general.architecture": "novel"}), "'novel'"),
        (lambda file: file.tiny.metadata.update({"tokenizer.ggml.model": "novel"}), "novel"),
        (lambda file: file.tiny.metadata.update({"llama.block_count": None}), "llama.block_count"),
    ],
    ids=["tensor", "architecture", "tokenizer", "key"],
)
async def test_a_bad_file_is_named_and_ends_the_worker(start: Start, tmp_path: Path, spoil: Any, said: str):
    file = tiny_file()
    spoil(file)
    async with start(model=str(file.write(tmp_path / "bad.gguf"))) as running:
        assert await running.exit_code() == 1
    [error] = running.events("error")
    assert error["code"] == "MODEL_LOAD_FAILED" and said in error["sentence"]
    assert "exception" not in error and not running.events("ready")
    last = running.events()[-2:]
    assert [e["event"] for e in last] == ["error", "shutdown"] and last[-1]["exit_code"] == 1


async def test_a_failed_load_is_told_by_health(start: Start, monkeypatch: pytest.MonkeyPatch):
    """The server still answers while it shuts down."""
    failing = threading.Event()

    def fail(*_args: Any, **_named: Any) -> Any:
        failing.wait(SECONDS)
        raise InsufficientMemory("the model needs 3 MiB, there are 2 MiB")

    monkeypatch.setattr(loading, "load_weights", fail)
    async with start() as running:
        await running.health()
        loop = asyncio.get_running_loop()
        held: asyncio.Future[None] = loop.create_future()
        monkeypatch.setattr(running.worker, "_drain", lambda: held)
        failing.set()
        while not running.events("error"):
            await asyncio.sleep(0.01)
        response = await running.client.get("/health")
        assert response.status_code == 503 and response.json()["state"] == "failed"
        assert response.json()["failure"]["code"] == "INSUFFICIENT_VRAM"
        held.set_result(None)
        assert await running.exit_code() == 1


async def test_an_unexpected_fault_is_told_with_a_traceback_in_the_log_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_args: Any) -> Any:
        raise ZeroDivisionError("oh dear")

    monkeypatch.setattr(loading, "configure", fail)
    async with start() as running:
        assert await running.exit_code() == 1
    fault, failed, *_more = running.events("error")
    assert "ZeroDivisionError: oh dear" in fault["exception"]
    assert fault["reference"] in failed["sentence"] and "oh dear" not in failed["sentence"]


async def test_loading_is_given_up_when_the_worker_is_to_stop(start: Start, monkeypatch: pytest.MonkeyPatch):
    original = loading.load_weights
    began = threading.Event()

    def slow(file: Any, model: Any, backend: Any, report: Any, **options: Any) -> Any:
        began.set()
        for _ in range(6000):
            report(0.0)  # raises once the worker stops
            time.sleep(0.01)
        return original(file, model, backend, report, **options)

    monkeypatch.setattr(loading, "load_weights", slow)
    async with start() as running:
        while not began.is_set():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running.exit_code() == 0
    assert not running.worker.is_stuck and not running.events("error") and not running.events("ready")


async def test_a_refused_callback_ends_the_worker(start: Start):
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        url = f"http://user:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/ready?key=secret"
        async with start(callback=CallbackConfig(url=url)) as running:
            assert await running.exit_code() == 1
    [error] = running.events("error")
    assert "403" in error["sentence"] and "secret" not in running.log.getvalue()


def test_serve_tells_what_keeps_it_from_starting(
    start: Start, config: WorkerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from worker_orcd.worker.process import serve

    def sentence(changed: WorkerConfig) -> str:
        assert serve(changed) == 1
        [line] = capsys.readouterr().err.splitlines()
        return json.loads(line)["sentence"]

    callback = CallbackConfig(url="http://localhost", token_file=tmp_path / "none")
    assert "callback token file" in sentence(replace(config, callback=callback))
    with listen(ServerConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in sentence(
            replace(config, server=ServerConfig(port=port))
        )
    unspeakable = ServerConfig(host="a..b", port=0)
    assert "cannot listen on a..b port 0: it is not a host name" in sentence(
        replace(config, server=unspeakable)
    )


@pytest.mark.parametrize(
    ("model", "ref"),
    [
        ("demo", "demo"),
        ("hf:org/repo/x.gguf", "hf:org/repo/x.gguf"),
        ("some/dir/x.gguf", "x.gguf"),
        ("file:///some/dir/x.gguf", "x.gguf"),
    ],
)
def test_a_model_is_named_without_its_directory(model: str, ref: str):
    assert model_ref(model) == ref


async def test_health_stays_quick_while_streams_run(start: Start, monkeypatch: pytest.MonkeyPatch):
    """Not a benchmark: each step of the device takes until /health has been answered once more, so a worker
    whose loop waited for the engine would stop for good; and an answer costs the loop little.
    """
    original, answered = runner._PendingStep.wait, threading.Event()

    def wait(step: Any) -> Any:
        answered.clear()
        assert answered.wait(SECONDS)
        return original(step)

    monkeypatch.setattr(runner._PendingStep, "wait", wait)
    async with start() as running:
        await running.until_ready()

        async def stream(name: str) -> None:
            async with running.job(name, max_tokens=80) as response:
                assert (await rest(events_of(response)))[-1][0] == "end"

        streams = [asyncio.create_task(stream(f"j{i}")) for i in range(8)]
        costs: list[float] = []
        while not all(task.done() for task in streams):
            started = time.thread_time()
            await running.health()
            costs.append(time.thread_time() - started)
            answered.set()
        await asyncio.gather(*streams)
        assert len(costs) >= 80 and statistics.median(costs) < 0.1


async def test_disconnected_clients_leave_no_blocks_behind(start: Start, monkeypatch: pytest.MonkeyPatch):
    slow_steps(monkeypatch, 0.05)
    async with start() as running:
        await running.until_ready()
        for i in range(3):
            async with running.job(f"j{i}", max_tokens=400) as response:
                await first_token(events_of(response))
        await until_idle(running)
        assert len(running.events("cancel")) == 3


async def until_idle(running: Running) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            health = await running.health()
            if health["kv_blocks_free"] == health["kv_blocks_total"] and health["running"] == 0:
                return
            await asyncio.sleep(0.01)


def test_the_address_that_is_bound_is_told_and_the_one_to_call():
    everywhere = ServerConfig(host="0.0.0.0", port=0)
    with listen(everywhere) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://0.0.0.0:{port}"
        assert uri_of(listener, everywhere) == f"http://{socket.gethostname()}:{port}"
