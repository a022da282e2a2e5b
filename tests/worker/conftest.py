"""A tiny model, settings for it, and workers on it in this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

for shared in ("model", "text", "worker"):
    sys.path.insert(0, str(Path(__file__).parents[1] / shared))

from worker_bench import Running, Start, tiny_file  # noqa: E402

from worker_orcd.config import DeviceConfig, EngineConfig, ServerConfig, WorkerConfig  # noqa: E402
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library  # noqa: E402
from worker_orcd.narration import Narration  # noqa: E402
from worker_orcd.server.status import Status  # noqa: E402
from worker_orcd.worker.listening import listen, uri_of  # noqa: E402
from worker_orcd.worker.process import Doors, Worker, model_ref  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Compile what may have to be compiled before any test counts seconds."""
    with contextlib.suppress(LibraryUnavailable):
        load_library()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_file().write(tmp_path_factory.mktemp("models") / "tiny-00001-of-00001.gguf")


@pytest.fixture
def config(tiny_model: Path) -> WorkerConfig:
    return WorkerConfig(
        model=str(tiny_model),
        worker_id="w1",
        device=DeviceConfig(cpu_threads=1, kv_cache_size_mb=4),
        engine=EngineConfig(max_num_seqs=8, max_num_batched_tokens=64),
        server=ServerConfig(port=0, shutdown_grace_seconds=60.0),
    )


@pytest.fixture
def start(config: WorkerConfig) -> Start:
    """`async with start(callback=…) as running`: changes are of the WorkerConfig. `doors`: what opens NVML
    (`open_library`) and the driver (`open_probe`).
    """

    @contextlib.asynccontextmanager
    async def started(
        token: str | None = None, doors: dict[str, Any] | None = None, **changes: Any
    ) -> AsyncIterator[Running]:
        wanted = replace(config, **changes)
        log = io.StringIO()
        status = Status(worker_id=wanted.worker_id or "", model_ref=model_ref(wanted.model))
        style = "pretty" if wanted.server.narration == "pretty" else "json"
        narration = Narration(style, stream=log, worker_id=status.worker_id, model_ref=status.model_ref)
        with listen(wanted.server) as listener:
            uri = uri_of(listener, wanted.server)
            worker = Worker(wanted, status, narration, listener, token, None, doors=Doors(**(doors or {})))
            task = asyncio.create_task(worker.run())
            async with httpx.AsyncClient(base_url=uri, timeout=60, trust_env=False) as client:
                running = Running(worker, client, log, task)
                try:
                    yield running
                finally:
                    if not task.done():
                        with contextlib.suppress(httpx.HTTPError):
                            await client.post("/shutdown")
            if not task.done():
                await asyncio.wait_for(task, 120)

    return started
