"""What a GPU's memory is told to hold, with a driver and an allocator made up here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import MODELS, load_runner
from tiny_variants import VARIANTS, tiny_file
from torch_launcher import on_torch

from worker_orcd.config import EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cuda.memory import CudaMemory
from worker_orcd.kernels.memory import Held, Region

MIB = 1 << 20
TOTAL = 1000 * MIB


class Gpu:
    """torch.cuda and the driver behind it, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reserved, self.allocated, self.cached = 900, 0, 0, 0
        self.fraction = 1.0
        self.asked: set[int | None] = set()  # devices whose allocator was told how much it may have
        properties = SimpleNamespace(total_memory=TOTAL, uuid="0b5a-11", major=9, minor=0)
        for name, function in {
            "mem_get_info": lambda _device: (self.free * MIB, TOTAL),
            "memory_reserved": lambda _device: (self.reserved + self.cached) * MIB,
            "memory_stats": lambda _device: {"requested_bytes.all.current": self.allocated * MIB},
            "current_device": lambda: 2,
            "empty_cache": self._empty_cache,
            "synchronize": lambda _device: None,
            "get_device_properties": lambda _device: properties,
            "set_per_process_memory_fraction": self._allow,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, reserved: int, allocated: int, *, beside: int = 0, cached: int = 0) -> None:
        self.free -= reserved + beside + cached
        self.reserved += reserved
        self.allocated += allocated
        self.cached += cached

    def _empty_cache(self) -> None:
        self.free, self.cached = self.free + self.cached, 0

    def _allow(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction
        self.asked.add(device.index)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def memory() -> CudaMemory:
    return CudaMemory(torch.device("cuda", 0))


def test_a_gpu_s_facts_are_cuda_s(gpu: Gpu) -> None:
    facts = memory().facts
    assert (facts.memory_bytes, facts.uuid, facts.index, facts.sm) == (TOTAL, "0b5a-11", 0, "9.0")


def test_a_device_without_a_number_is_the_current_one(gpu: Gpu) -> None:
    """Some calls of torch's refuse it."""
    assert CudaMemory(torch.device("cuda")).facts.index == 2
    assert gpu.asked == {2}


def test_what_is_held_adds_up_to_what_the_driver_misses(gpu: Gpu) -> None:
    found = memory()
    weights = torch.zeros(100 * MIB, dtype=torch.uint8)
    found.note("weights", weights)
    found.note("KV cache", (torch.zeros(50 * MIB, dtype=torch.uint8),))
    gpu.take(200, 170, beside=30, cached=64)
    held = found.held()
    assert held == Held(
        weights_bytes=100 * MIB,
        kv_cache_bytes=50 * MIB,
        workspace_bytes=20 * MIB,
        spare_bytes=30 * MIB,
        driver_bytes=30 * MIB,
    )
    assert held.total_bytes == (900 - gpu.free) * MIB  # to the byte
    assert held.allocator_bytes == 200 * MIB


def test_what_the_allocator_keeps_for_later_is_free(gpu: Gpu) -> None:
    found = memory()
    gpu.take(10, 10, cached=100)
    assert found.free_bytes() == 890 * MIB


def test_sealed_memory_is_exactly_what_is_taken_and_release_opens_it(gpu: Gpu) -> None:
    found = memory()
    found.note("weights", torch.zeros(8))
    gpu.take(333, 300, cached=50)
    found.seal()
    assert int(gpu.fraction * TOTAL) in (333 * MIB, 333 * MIB + 1)  # not a block more
    gpu.allocated = 0
    assert found.release() == 0
    assert gpu.fraction == 1.0 and found.regions() == ()
    found.seal()
    memory()
    assert gpu.fraction == 1.0  # the next model's


def test_memory_is_noted_once_and_whole(gpu: Gpu) -> None:
    found = memory()
    buffer = torch.zeros(64, dtype=torch.uint8)
    assert (
        found.note("weights", (buffer[:8], buffer[8:].view(torch.int32), None, "x", torch.zeros(0)))
        is not None
    )
    assert found.regions() == (Region("weights", buffer.data_ptr(), 64),)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss"])
def test_every_weight_and_every_cache_of_a_model_is_noted(name: str, tmp_path: Path) -> None:
    path = tiny_file((MODELS | VARIANTS)[name]).write(tmp_path / "tiny.gguf")
    backend, _ = on_torch()
    runner = load_runner(path, backend, EngineConfig(max_num_seqs=64, max_num_batched_tokens=64))
    regions = backend.memory.regions()
    assert len({region.address for region in regions}) == len(regions)
    caches = [region for region in regions if region.use == "KV cache"]
    assert {region.address for region in caches} == {cache.tensor.data_ptr() for cache in runner.caches}
    assert sum(region.num_bytes for region in caches) == runner.plan.kv_cache_bytes
    weights = sum(region.num_bytes for region in regions if region.use == "weights")
    with GGUFFile(path) as file:
        assert weights >= sum(info.nbytes for info in file.tensors.values())
    backend.memory.release()
    assert backend.memory.regions() == ()
