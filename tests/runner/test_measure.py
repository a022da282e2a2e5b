"""The memory plan from what is measured: on the CUDA backend without a GPU, whose memory is counted here."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS
from tiny_variants import tiny_file
from torch_launcher import TorchLauncher

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.errors import InsufficientMemory
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.backend import GRAPH_BYTES, CudaBackend
from worker_orcd.kernels.cuda.compiler import Kernels
from worker_orcd.kernels.cuda.memory import CudaMemory
from worker_orcd.kernels.cuda.weights import STAGING_BYTES
from worker_orcd.kernels.memory import Held
from worker_orcd.model.architectures import configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import Weights, load_weights
from worker_orcd.runner.measure import seal, settled
from worker_orcd.runner.plan import MemoryPlan, make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner

MIB = 1 << 20
ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
DEVICE = DeviceConfig(memory_fraction=1.0)


def live_bytes(*, collect: bool = True) -> int:
    """Of all tensors there are, but for what loading copies through: where there is a GPU that is pinned."""
    if collect:
        gc.collect()
    stores = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
    sizes = {store.data_ptr(): store.nbytes() for store in stores}
    return sum(size for size in sizes.values() if size != STAGING_BYTES)


class Counted(CudaMemory):
    """As if every tensor lay on a GPU that has `free` bytes left."""

    counts = True
    free = 512 * MIB

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._before = live_bytes()
        self.sealed = False

    def _allow(self, fraction: float) -> None:
        assert fraction == 1.0

    def _free_bytes(self) -> int:
        return self.free

    def free_bytes(self) -> int:
        return self.free

    def allocated_bytes(self) -> int:
        return live_bytes(collect=False) - self._before

    def taken_bytes(self) -> int:
        return self.allocated_bytes()

    def held(self) -> Held | None:
        taken = self.allocated_bytes()
        return Held(weights_bytes=0, kv_cache_bytes=0, workspace_bytes=taken, spare_bytes=0, driver_bytes=0)

    def seal(self) -> None:
        self.sealed = True


class Loaded:
    """A tiny model's weights on a device, and the plan from before they were."""

    def __init__(self, tmp_path: Path, backend: Any, engine: EngineConfig = ENGINE) -> None:
        self.backend, self.engine = backend, engine
        path = tiny_file(MODELS["llama"]).write(tmp_path / "tiny.gguf")
        with GGUFFile(path) as file:
            self.config: ModelConfig = configure(file)
            self.plan: MemoryPlan = make_plan(
                self.config, tensor_bytes(file), backend, engine, DEVICE, 512 * MIB
            )
            self.weights: Weights = load_weights(file, self.config, backend)

    def settle(self) -> MemoryPlan:
        return settled(self.plan, self.config, self.weights, self.backend, self.engine, DEVICE)


@pytest.fixture
def counted() -> CudaBackend:
    backend = CudaBackend(Kernels(torch.device("cpu"), 90), TorchLauncher)
    backend.memory = Counted()
    return backend


def test_what_was_rehearsed_is_what_a_step_takes(counted: CudaBackend, tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, counted)
    counted._uploader.close()  # tables for packing, which nobody needs once weights are there
    before, alive = counted.memory.allocated_bytes(), live_bytes()
    gc.disable()
    try:
        plan = loaded.settle()
        assert live_bytes(collect=False) == alive  # nothing stays, not even until it is collected
    finally:
        gc.enable()
    assert {region.use for region in counted.memory.regions()} == {"weights"}
    assert plan.measured and plan.graphs_bytes == GRAPH_BYTES
    assert 0 < plan.workspace_bytes < loaded.plan.workspace_bytes  # that was a bound
    assert plan.weights_bytes == before
    decoder = Decoder(loaded.config.serving(plan.max_model_len), loaded.weights, counted)
    runner = ModelRunner(decoder, counted, plan, ENGINE)
    host = sum(one.nbytes for one in runner._batch.__dict__.values() if isinstance(one, torch.Tensor))
    taken = counted.memory.allocated_bytes() - before - plan.kv_cache_bytes
    assert abs(taken - plan.workspace_bytes) <= host + 4096  # the batch's own host memory is counted here


def test_a_neighbour_that_came_meanwhile_leaves_less_to_the_cache(
    counted: CudaBackend, tmp_path: Path
) -> None:
    loaded = Loaded(tmp_path, counted, replace(ENGINE, max_num_seqs=64))
    roomy = loaded.settle()
    counted.memory.free = GRAPH_BYTES + roomy.workspace_bytes + roomy.kv_cache_bytes // 2
    tight = loaded.settle()
    assert tight.kv_groups[0].num_blocks < roomy.kv_groups[0].num_blocks
    assert tight.fixed_bytes + tight.kv_cache_bytes <= tight.usable_bytes
    counted.memory.free = GRAPH_BYTES // 2
    with pytest.raises(InsufficientMemory, match=r"requires .* of weights.* of graphs.* available on cuda"):
        loaded.settle()
    assert {region.use for region in counted.memory.regions()} == {"weights"}


def test_memory_that_is_not_counted_leaves_the_plan_as_it_is(tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, ReferenceBackend())
    assert loaded.settle() is loaded.plan
    warned: list[str] = []
    assert seal(loaded.plan, loaded.backend, warned.append) is None and warned == []


def test_sealing_tells_what_is_held_and_warns_of_too_much(counted: CudaBackend, tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, counted)
    warned: list[str] = []
    held = seal(loaded.plan, counted, warned.append)
    assert held is not None and held.total_bytes > 0 and warned == []
    assert counted.memory.sealed
    seal(replace(loaded.plan, usable_bytes=held.total_bytes - 1), counted, warned.append)
    assert len(warned) == 1 and warned[0].startswith("the model takes ")
