"""What a worker makes of NVML: who is a neighbour, what is told, and what is known without it."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from typing import Any

import pytest
from fake_nvml import COOL, FakeNvml

from worker_orcd.narration import Narration
from worker_orcd.nvml import GpuProcess
from worker_orcd.server.status import Status
from worker_orcd.worker.gpu_watch import GpuWatch, Neighbours

OWN = os.getpid()


def on(*pids: int) -> tuple[GpuProcess, ...]:
    return tuple(GpuProcess(pid, 1 << 20) for pid in pids)


def test_others_are_those_that_came_later() -> None:
    neighbours = Neighbours(frozenset({3}), own_pid=10)
    assert neighbours.others(on(3, 10)) == ()
    assert neighbours.others(on(3, 10, 11)) == on(11)
    assert neighbours.others(on(11)) == on(11)  # paused: this process is not there
    assert neighbours.others(()) == ()
    assert neighbours.others(on(3)) == on(3)  # who left and came back came later


def test_in_a_container_what_appeared_with_the_gpu_is_the_worker_itself() -> None:
    """NVML tells the host's ids, so the worker's own id is not among them."""
    neighbours = Neighbours(frozenset({3}), own_pid=10)
    assert neighbours.others(on(3, 4711)) == ()
    assert neighbours.others(on(3, 4711, 5)) == on(5)


def test_nobody_can_be_told_apart_where_processes_are_not_shown() -> None:
    neighbours = Neighbours(frozenset(), own_pid=10)
    assert neighbours.others(()) is None
    assert neighbours.others(on(11)) is None  # this one may be anybody, the worker itself included
    assert Neighbours(frozenset(), own_pid=10).others(None) is None


class Bench:
    def __init__(self, nvml: FakeNvml) -> None:
        self.nvml, self.log = nvml, io.StringIO()
        self.status = Status(worker_id="w", model_ref="m")
        self.watch = GpuWatch(self.status, Narration("json", stream=self.log), nvml)

    async def open(self, uuid: str | None = "0b5a") -> None:
        await self.watch.prepare()
        if self.nvml.processes is not None:
            self.nvml.processes[OWN] = 2 << 30
        await self.watch.open(uuid)

    def events(self, name: str) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [event for event in told if event["event"] == name]


async def test_the_last_look_is_kept() -> None:
    bench = Bench(FakeNvml(processes={3: 1 << 20}))
    assert bench.status.gpu.body() == {"available": False, "reason": "the model is not loaded yet"}
    await bench.open()
    body = bench.status.gpu.body()
    assert body["available"] is True
    assert (body["temperature_celsius"], body["power_watts"], body["utilization"]) == (41, 70.5, 0.25)
    assert (body["xids"], body["other_processes"]) == ({}, [])
    bench.nvml.state = replace(COOL, temperature_celsius=80)
    bench.nvml.processes = {3: 1 << 20, OWN: 2 << 30, 99: 5 << 30}
    await bench.watch.look()
    body = bench.status.gpu.body()
    assert body["temperature_celsius"] == 80
    assert body["other_processes"] == [{"pid": 99, "memory_bytes": 5 << 30}]
    await bench.watch.close()
    assert bench.nvml.closed


async def test_a_driver_that_shows_no_processes_is_said_to_whoever_wants_to_yield() -> None:
    bench = Bench(FakeNvml(processes=None))
    await bench.open()
    assert bench.status.gpu.body()["other_processes"] is None
    bench.watch.warn_unless_told(wanted=True)
    assert "the driver does not show processes" in bench.events("warning")[0]["sentence"]
    visible = Bench(FakeNvml())
    await visible.open()
    visible.watch.warn_unless_told(wanted=True)
    assert not visible.log.getvalue()


async def test_xids_are_counted_told_and_judged() -> None:
    bench = Bench(FakeNvml())
    await bench.open()
    bench.nvml.xids = [31, 13, 31]  # of programs
    await bench.watch.look()
    assert bench.status.gpu.xids == {31: 2, 13: 1} and bench.status.gpu.fault is None
    await bench.watch.look()
    (told,) = bench.events("gpu_error")
    assert told["level"] == "error" and told["xids"] == [31, 13, 31] and "Xid 31, 13, 31" in told["sentence"]
    bench.nvml.xids = [79]
    await bench.watch.look()
    await bench.watch.look()
    assert bench.status.gpu.fault == "the GPU reported Xid 79"
    assert bench.status.degraded == "the GPU reported Xid 79"
    assert bench.status.gpu.body()["xids"] == {"31": 2, "13": 1, "79": 1}


async def test_ecc_errors_count_from_the_first_look() -> None:
    bench = Bench(FakeNvml())
    await bench.open()
    await bench.watch.look()
    assert bench.status.gpu.fault is None  # one is of the time before
    for _ in range(2):
        bench.nvml.state = replace(COOL, ecc_uncorrected=4)
        await bench.watch.look()
    assert bench.status.gpu.fault == "the GPU's memory has had 3 uncorrectable ECC errors"
    (told,) = bench.events("gpu_error")
    assert told["ecc_uncorrected"] == 3


async def test_a_gpu_that_is_lost_is_told_once_and_xids_are_remembered() -> None:
    bench = Bench(FakeNvml(xids=[48]))
    await bench.open()
    bench.nvml.lost = "NVML says: GPU is lost"
    for _ in range(3):
        await bench.watch.look()
    assert bench.status.gpu.body() == {"available": False, "reason": "NVML says: GPU is lost"}
    assert bench.status.gpu.others is None and bench.status.gpu.fault == "the GPU reported Xid 48"
    assert len(bench.events("warning")) == 1
    bench.nvml.lost = None
    await bench.watch.look()
    assert bench.status.gpu.body()["available"] is True


@pytest.mark.parametrize(
    ("nvml", "uuid", "reason"),
    [
        (FakeNvml(absent="the package nvidia-ml-py is not installed"), "0b5a", "the package nvidia-ml-py"),
        (FakeNvml(), "ffff", "NVML knows no GPU"),
        (FakeNvml(), None, "the model does not run on a GPU"),
    ],
)
async def test_without_nvml_it_says_why(nvml: FakeNvml, uuid: str | None, reason: str) -> None:
    bench = Bench(nvml)
    await bench.open(uuid)
    await bench.watch.look()
    body = bench.status.gpu.body()
    assert body["available"] is False and body["reason"].startswith(reason)
    bench.watch.warn_unless_told(wanted=False)
    assert not bench.log.getvalue()
    bench.watch.warn_unless_told(wanted=True)
    (told,) = bench.events("warning")
    assert told["sentence"].startswith(f"yield_to_others does nothing: {reason}")
    await bench.watch.close()
