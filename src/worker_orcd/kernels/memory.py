"""
The memory of the device that a backend computes on: what it is, what lies where, what is taken.

`Backend.memory` is one of these. A device that counts (`counts`) is a GPU, whose memory moves only when
somebody asks for it: a plan can be checked against it. A machine's memory moves by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Use = Literal["weights", "KV cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What does not change. None: the device has no such thing."""

    memory_bytes: int
    uuid: str | None = None  # of a GPU, as CUDA tells it
    index: int | None = None  # likewise
    sm: str | None = None  # compute capability: "9.0"
    cuda_runtime_version: str | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that must be of the device as long as the model is loaded."""

    use: Use
    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Widths:
    """What the sizes of a model's buffers follow from, in numbers."""

    widest: int  # of a token's activations
    vocab_size: int
    angles: int = 0  # of a position, over all kinds of rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspaces:
    """What a compiled step takes beside weights and KV cache."""

    buffers_bytes: int  # activations, logits, the inputs of a step
    sampler_bytes: int = 0  # on the device
    graphs_bytes: int = 0  # and the code of kernels

    @property
    def total_bytes(self) -> int:
        return self.buffers_bytes + self.sampler_bytes + self.graphs_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a loaded model takes, to the byte."""

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int  # whatever else has been allocated
    spare_bytes: int  # between and behind allocations, in what the allocator has taken
    driver_bytes: int  # graphs and code, as the driver has less memory left than the allocator took

    @property
    def allocator_bytes(self) -> int:
        """What torch has taken from the driver."""
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes + self.spare_bytes

    @property
    def total_bytes(self) -> int:
        return self.allocator_bytes + self.driver_bytes


class DeviceMemory(Protocol):
    """Of one backend, whose methods note what they allocate."""

    @property
    def facts(self) -> DeviceFacts: ...

    @property
    def counts(self) -> bool:
        """Whether `allocated_bytes` and `held` tell anything."""
        ...

    def regions(self) -> Sequence[Region]:
        """Of weights and KV cache, all that have been noted. Empty where the device is the host."""
        ...

    def allocated_bytes(self) -> int:
        """What this process has allocated on the device now."""
        ...

    def taken_bytes(self) -> int:
        """What this process's allocator has taken from the driver now, spare memory given back."""
        ...

    def forget(self, use: Use) -> None:
        """Regions of this use are no more."""
        ...

    def held(self) -> Held | None:
        """All there is once a step has been compiled."""
        ...

    def seal(self) -> None:
        """Nothing more may be taken from the driver: from here on whoever wants more gets OutOfMemory."""
        ...

    def release(self) -> int | None:
        """Give back to the driver what nobody refers to any more, and forget regions and seal.

        Bytes that this process still has allocated; None where that is not counted.
        """
        ...


def sum_of(regions: Sequence[Region], use: Use) -> int:
    return sum(region.num_bytes for region in regions if region.use == use)
