"""
What is allocated on a GPU, by torch's caching allocator and beside it.

Two counts that agree: the allocator's, and the driver's of what is free. Their difference is what torch does
not allocate itself, graphs and the code of kernels; others on the GPU disturb it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import torch

from worker_orcd.kernels.memory import DeviceFacts, Held, Region, Use, sum_of

T = TypeVar("T")


class CudaMemory:
    """Implements `kernels.memory.DeviceMemory` for one GPU; on another device it knows the regions only."""

    def __init__(self, device: torch.device) -> None:
        if str(device) == "cuda":  # some calls want its number
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        if self.counts:
            self._allow(1.0)  # the model that this process had before may have sealed it
        self._regions: dict[int, Region] = {}  # by address
        self._free_at_first = self._free_bytes() if self.counts else 0
        self._taken_at_first = torch.cuda.memory_reserved(device) if self.counts else 0
        self.facts = _facts(device)

    @property
    def counts(self) -> bool:
        return self._device.type == "cuda"

    def note(self, use: Use, value: T) -> T:
        """`value`. Its tensors, in dataclasses and tuples too, are of this use: all of their memory, once."""
        for tensor in _tensors_in(value):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                address = storage.data_ptr()
                self._regions[address] = Region(use, address, storage.nbytes())
        return value

    def regions(self) -> Sequence[Region]:
        return tuple(self._regions.values())

    def allocated_bytes(self) -> int:
        """As they were asked for: how far the allocator rounds up depends on what it has left over."""
        if not self.counts:
            return 0
        statistics: dict[str, int] = torch.cuda.memory_stats(self._device)
        return statistics.get("requested_bytes.all.current", 0)

    def free_bytes(self) -> int:
        """What the driver could still give."""
        if self.counts:
            torch.cuda.empty_cache()  # what the allocator keeps for later is free too
        return self._free_bytes()

    def _free_bytes(self) -> int:
        free, _total = torch.cuda.mem_get_info(self._device)
        return free

    def taken_bytes(self) -> int:
        if not self.counts:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def forget(self, use: Use) -> None:
        self._regions = {key: one for key, one in self._regions.items() if one.use != use}

    def held(self) -> Held | None:
        if not self.counts:
            return None
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        allocated, taken = self.allocated_bytes(), torch.cuda.memory_reserved(self._device)
        weights, cache = sum_of(self.regions(), "weights"), sum_of(self.regions(), "KV cache")
        gone = self._free_at_first - self._free_bytes()
        return Held(
            weights_bytes=weights,
            kv_cache_bytes=cache,
            workspace_bytes=max(0, allocated - weights - cache),
            spare_bytes=taken - allocated,
            driver_bytes=max(0, gone - (taken - self._taken_at_first)),
        )

    def seal(self) -> None:
        if self.counts:
            torch.cuda.empty_cache()
            taken = torch.cuda.memory_reserved(self._device)
            _free, total = torch.cuda.mem_get_info(self._device)
            self._allow(min(1.0, (taken + 1) / total))  # a byte more: rounding must not make it less

    def release(self) -> int | None:
        self._regions.clear()
        if not self.counts:
            return None
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        self._allow(1.0)
        return self.allocated_bytes()

    def _allow(self, fraction: float) -> None:
        """Of all the GPU's memory, for torch's allocator."""
        cuda: Any = torch.cuda
        cuda.set_per_process_memory_fraction(fraction, self._device)


def _facts(device: torch.device) -> DeviceFacts:
    if device.type != "cuda":
        return DeviceFacts(memory_bytes=0)
    cuda: Any = torch.cuda
    properties = cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    return DeviceFacts(
        memory_bytes=int(properties.total_memory),
        uuid=None if uuid is None else str(uuid),
        index=device.index,
        sm=f"{properties.major}.{properties.minor}",
        cuda_runtime_version=torch.version.cuda,
    )


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in cast("tuple[Any, ...]", value):
            yield from _tensors_in(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _tensors_in(getattr(value, one.name))
