"""A worker that is looked after: memory that is not where it should be, and a GPU that others want."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fake_nvml import FakeNvml
from worker_bench import Running, Start, events_of

from worker_orcd.config import WatchConfig
from worker_orcd.errors import InsufficientMemory
from worker_orcd.kernels.cpu import memory
from worker_orcd.kernels.memory import DeviceFacts, Region
from worker_orcd.narration import Narration
from worker_orcd.nvml import GpuProcess
from worker_orcd.runner import runner
from worker_orcd.runner.residency import Found, Place, ProbeFailed
from worker_orcd.server.status import Status
from worker_orcd.worker import loading
from worker_orcd.worker.guard import ResidencyWatch, Yielding

SECONDS = 60.0  # more than anything here waits for
OTHER = (GpuProcess(99),)
WEIGHTS = Region("weights", 4096, 512)
CACHE = Region("KV cache", 8192, 1024)


class Driver:
    """A PointerProbe: everything is on GPU 0 but what a test plants elsewhere, by address."""

    def __init__(self, planted: dict[int, Found] | None = None) -> None:
        self.planted = planted or {}
        self.failure: str | None = None
        self.num_begun = 0

    def __call__(self, _facts: DeviceFacts) -> Driver:
        if self.failure is not None:
            raise ProbeFailed(self.failure)
        return self

    def begin(self) -> None:
        self.num_begun += 1
        if self.failure is not None:
            raise ProbeFailed(self.failure)

    def look(self, address: int) -> Found:
        return self.planted.get(address, Found(Place.DEVICE, 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory passes for a GPU's."""
    monkeypatch.setattr(memory, "DeviceFacts", partial(DeviceFacts, uuid="0b5a", index=0, sm="9.0"))
    monkeypatch.setattr(memory.HostMemory, "regions", lambda _self: (WEIGHTS, CACHE))


def arrive(nvml: FakeNvml, *pids: int) -> None:
    """These and the worker itself are on the GPU."""
    nvml.processes = dict.fromkeys((os.getpid(), *pids), 1 << 30)


async def until(running: Running, **wanted: Any) -> dict[str, Any]:
    """The first /health that says so."""
    async with asyncio.timeout(SECONDS):
        while True:
            health = await running.health()
            if all(health[name] == value for name, value in wanted.items()):
                return health
            await asyncio.sleep(0.01)


# -- residency -----------------------------------------------------------------------------------------------


class Memory:
    counts = True

    def __init__(self, index: int | None = 0) -> None:
        self.facts = DeviceFacts(memory_bytes=1 << 30, index=index)

    def regions(self) -> tuple[Region, ...]:
        return (WEIGHTS, CACHE)


def residency_of(driver: Driver) -> tuple[Status, Any, io.StringIO]:
    status, log = Status(worker_id="w", model_ref="m"), io.StringIO()
    return status, ResidencyWatch(status, Narration("json", stream=log), driver), log


async def test_memory_is_looked_at_when_loaded_and_from_then_on() -> None:
    driver = Driver()
    status, watch, log = residency_of(driver)
    await watch.look()
    assert status.residency.resident is None and driver.num_begun == 0  # nothing is loaded
    await watch.open(Memory())
    assert (status.residency.resident, status.residency.checks) == (True, 1)
    await watch.look()
    assert (status.residency.checks, status.residency.violations, log.getvalue()) == (2, 0, "")
    driver.planted = {CACHE.address: Found(Place.MANAGED), WEIGHTS.address: Found(Place.HOST)}
    await watch.look()
    found = status.residency
    assert (found.resident, found.checks, found.violations) == (False, 3, 1)
    assert (
        found.found == "512 bytes of weights lie in host memory; 1024 bytes of KV cache lie in managed memory"
    )
    told = json.loads(log.getvalue())
    assert (told["event"], told["level"]) == ("residency_violation", "critical")
    assert (told["violations"], told["bytes"]) == (2, 1536)
    driver.planted = {}
    await watch.look()
    assert status.residency.resident is True and status.residency.found is None
    watch.close()
    await watch.look()
    assert driver.num_begun == 4


async def test_what_cannot_be_checked_is_not_claimed() -> None:
    driver = Driver()
    driver.failure = "CUDA's driver library cannot be used: OSError"
    status, watch, log = residency_of(driver)
    await watch.open(Memory())
    await watch.look()
    assert status.residency.resident is None and len(log.getvalue().splitlines()) == 1
    driver.failure = None
    await watch.open(Memory())
    driver.failure = "CUDA's driver answers with error 700"
    await watch.look()
    assert status.residency.resident is True and "error 700" in log.getvalue()  # as it was seen last


async def test_the_host_s_memory_is_where_it_should_be() -> None:
    driver = Driver({WEIGHTS.address: Found(Place.HOST)})
    status, watch, _ = residency_of(driver)
    await watch.open(Memory(index=None))
    await watch.look()
    assert (status.residency.resident, status.residency.checks) == (True, 0) and driver.num_begun == 0


@pytest.mark.slow
async def test_a_violation_makes_the_worker_unhealthy(start: Start, gpu: None) -> None:
    driver, nvml = Driver(), FakeNvml()
    doors = {"open_probe": driver, "open_library": nvml}
    watch = WatchConfig(residency_check_seconds=0.05, gpu_poll_seconds=0.1)
    async with start(watch=watch, doors=doors) as running:
        await running.until_ready()
        health = await until(running, resident=True)
        assert (health["status"], health["sm"], health["residency_violation"]) == ("healthy", "9.0", None)
        driver.planted = {CACHE.address: Found(Place.HOST)}
        health = await until(running, resident=False)
        assert health["status"] == "unhealthy" and "lie in host memory" in health["residency_violation"]
        assert (await running.client.get("/health")).status_code == 503
        metrics = (await running.client.get("/metrics")).text
        assert "\nworker_resident 0.0\n" in metrics
        async with running.job("j", max_tokens=2) as response:  # its answers are no worse
            assert [event async for event in events_of(response)][-1][0] == "end"
    assert running.events("residency_violation")[0]["level"] == "critical"


@pytest.mark.slow
async def test_without_nvml_or_a_gpu_a_worker_works(start: Start) -> None:
    doors = {"open_library": FakeNvml(absent="the package nvidia-ml-py is not installed")}
    async with start(watch=WatchConfig(yield_to_others=True, gpu_poll_seconds=0.1), doors=doors) as running:
        await running.until_ready()
        health = await until(running, resident=True)
        assert health["gpu"] == {"available": False, "reason": "the model does not run on a GPU"}
        assert health["status"] == "healthy"
        metrics = (await running.client.get("/metrics")).text
        assert "\nworker_gpu_available 0.0\n" in metrics and "worker_gpu_temperature" not in metrics


# -- yielding ------------------------------------------------------------------------------------------------


def test_it_leaves_at_once_and_comes_back_when_all_has_been_quiet_for_a_while() -> None:
    yielding = Yielding(quiet_looks=3)
    assert yielding.wanted((), is_paused=False) is None
    assert yielding.wanted(None, is_paused=False) is None
    assert yielding.wanted(OTHER, is_paused=False) == "pause"
    assert yielding.wanted(OTHER, is_paused=True) is None
    assert [yielding.wanted((), is_paused=True) for _ in range(2)] == [None, None]
    assert yielding.wanted(OTHER, is_paused=True) is None  # somebody else: begin again
    assert [yielding.wanted((), is_paused=True) for _ in range(3)] == [None, None, "resume"]
    yielding.wait_longer()
    assert [yielding.wanted(None, is_paused=True) for _ in range(3)] == [None, None, "resume"]


YIELDING = WatchConfig(yield_to_others=True, gpu_poll_seconds=0.1, residency_check_seconds=0.1)


@pytest.mark.slow
async def test_a_paused_worker_frees_the_device_and_comes_back(
    start: Start, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runner._PendingStep.wait
    monkeypatch.setattr(runner._PendingStep, "wait", lambda step: time.sleep(0.02) or original(step))
    held: list[weakref.ref[Any]] = []

    def make(*args: Any) -> Any:
        made = runner.ModelRunner(*args)
        made.itself = made  # type: ignore[attr-defined]  # as what a GPU compiles refers to itself
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(loading, "ModelRunner", make)
    nvml = FakeNvml()
    async with start(watch=YIELDING, doors={"open_probe": Driver(), "open_library": nvml}) as running:
        arrive(nvml)
        await running.until_ready()
        async with running.job("before", max_tokens=8) as response:
            wanted = [data["id"] async for name, data in events_of(response) if name == "token"]
        async with running.job("j", max_tokens=400) as response:
            events = events_of(response)
            async for name, _data in events:
                if name == "token":
                    break
            arrive(nvml, 99)
            left = [event async for event in events]
        assert left[-1][0] == "error"
        assert (left[-1][1]["code"], left[-1][1]["retriable"]) == ("NOT_READY", True)
        assert "another process uses the GPU" in left[-1][1]["message"]

        health = await until(running, status="degraded", state="starting")
        assert "another process uses the GPU" in health["paused"] and health["degraded"] == health["paused"]
        assert (health["resident"], health["vram_bytes_used"], health["kv_blocks_total"]) == (
            None,
            None,
            None,
        )
        assert health["gpu"]["other_processes"] == [{"pid": 99, "memory_bytes": 1 << 30}]
        refused = await running.client.post("/execute", json={"job_id": "k", "prompt": "ab"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "NOT_READY"
        assert refused.headers["retry-after"] == "10"
        assert (await running.client.get("/ready")).status_code == 503
        metrics = (await running.client.get("/metrics")).text
        assert "\nworker_paused 1.0\n" in metrics and "\nworker_gpu_other_processes 1.0\n" in metrics
        while not running.events("paused"):
            await asyncio.sleep(0.01)
        assert [ref() for ref in held] == [None]  # nothing keeps the model
        (told,) = running.events("paused")
        assert told["running"] == 1

        arrive(nvml)
        await running.until_ready()
        health = await until(running, status="healthy", resident=True)
        assert (health["paused"], health["degraded"], health["state"]) == (None, None, "ready")
        async with running.job("after", max_tokens=8) as response:
            found = [data["id"] async for name, data in events_of(response) if name == "token"]
        assert found == wanted and len(held) == 2
        metrics = (await running.client.get("/metrics")).text
        assert "\nworker_pauses_total 1.0\n" in metrics
        assert 'worker_requests_total{outcome="cancelled"} 1.0' in metrics
    assert running.task.result() == 0
    assert not running.events("error") and not running.events("residency_violation")


@pytest.mark.slow
async def test_it_waits_until_there_is_room(start: Start, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original, attempts = loading.load, []

    def load(*args: Any, **options: Any) -> Any:
        attempts.append(1)
        if len(attempts) == 2:
            raise InsufficientMemory("'tiny' requires more than there is")
        return original(*args, **options)

    monkeypatch.setattr(loading, "load", load)
    nvml = FakeNvml()
    async with start(watch=YIELDING, doors={"open_probe": Driver(), "open_library": nvml}) as running:
        arrive(nvml)
        await running.until_ready()
        arrive(nvml, 98, 99)
        health = await until(running, state="starting")
        assert health["paused"].startswith("2 other processes use the GPU")
        arrive(nvml)
        await running.until_ready()
        assert len(attempts) == 3 and "no room for the model yet" in running.events("warning")[0]["sentence"]


@pytest.mark.slow
async def test_a_paused_worker_ends_when_it_is_told_to(start: Start, gpu: None) -> None:
    nvml = FakeNvml()
    async with start(watch=YIELDING, doors={"open_probe": Driver(), "open_library": nvml}) as running:
        arrive(nvml)
        await running.until_ready()
        arrive(nvml, 99)
        await until(running, state="starting")
        started = time.monotonic()
        assert (await running.client.post("/shutdown")).status_code == 202
        assert await running.exit_code() == 0
        assert time.monotonic() - started < 9 and not running.worker.is_stuck
    assert nvml.closed


@pytest.mark.slow
async def test_who_does_not_yield_stays(start: Start, gpu: None) -> None:
    nvml = FakeNvml()
    watch = replace(YIELDING, yield_to_others=False)
    async with start(watch=watch, doors={"open_probe": Driver(), "open_library": nvml}) as running:
        arrive(nvml)
        await running.until_ready()
        arrive(nvml, 99)
        async with asyncio.timeout(SECONDS):
            while not (await running.health())["gpu"].get("other_processes"):
                await asyncio.sleep(0.01)
        looks = nvml.num_samples
        while nvml.num_samples < looks + 3:
            await asyncio.sleep(0.01)
        assert (await running.client.get("/ready")).status_code == 200
