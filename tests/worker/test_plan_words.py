"""What is told of a model's memory, by a worker whose device counts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from worker_bench import Start

from worker_orcd.config import ServerConfig
from worker_orcd.kernels.memory import Held
from worker_orcd.worker import loading

pytestmark = pytest.mark.slow

HELD = Held(
    weights_bytes=100 << 20,
    kv_cache_bytes=50 << 20,
    workspace_bytes=20 << 20,
    spare_bytes=1 << 20,
    driver_bytes=(9 << 20) + 1,
)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that comes of measuring has another length, and all of it is held."""
    monkeypatch.setattr(
        loading,
        "settled",
        lambda plan, *_: replace(plan, measured=True, max_model_len=plan.max_model_len - 16),
    )
    monkeypatch.setattr(loading, "seal", lambda *_: HELD)


async def test_what_is_held_is_told_to_the_byte(start: Start, counting: None) -> None:
    async with start() as running:
        await running.until_ready()
        health = await running.health()
        metrics = (await running.client.get("/metrics")).text
    assert health["vram_bytes_used"] == HELD.total_bytes == (180 << 20) + 1
    assert health["context_length"] == 512 - 16  # of the plan that was settled
    (line,) = [line for line in metrics.splitlines() if line.startswith("worker_vram_bytes ")]
    assert float(line.split()[1]) == HELD.total_bytes
    (told,) = running.events("memory_measured")
    assert told["bytes"]["graphs and code"] == (9 << 20) + 1
    parts = {what: size for what, size in told["bytes"].items() if what != "total"}
    assert sum(parts.values()) == told["bytes"]["total"] == HELD.total_bytes
    names: list[Any] = [event["event"] for event in running.events()]
    assert names.index("memory_plan") < names.index("memory_measured") < names.index("ready")


async def test_people_see_bytes_too(start: Start, counting: None) -> None:
    async with start(server=ServerConfig(port=0, narration="pretty")) as running:
        await running.until_ready()
    lines = running.log.getvalue().splitlines()
    shown = [line.split() for line in lines]
    assert ["total", "180.0", "MiB", f"{HELD.total_bytes:,}", "bytes"] in shown, "\n".join(lines)


async def test_a_device_that_does_not_count_tells_the_plan_only(start: Start) -> None:
    async with start() as running:
        await running.until_ready()
        health = await running.health()
    assert running.events("memory_measured") == []
    assert health["vram_bytes_used"] == running.events("memory_plan")[0]["bytes"]["total"]
