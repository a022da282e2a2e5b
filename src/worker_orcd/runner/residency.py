"""
Whether weights and KV cache lie in the memory of their GPU, as the driver tells of each pointer.

* A `PointerProbe` tells what is at an address: `DriverProbe` asks CUDA's driver what cudaPointerGetAttributes
  asks it, by ctypes on libcuda, which is there wherever a GPU can be used and is the same library for every
  CUDA version of torch. (torch's own binding of the runtime has no such call.) Tests hand in others.
* `check` looks at the first and the last byte of every region. Memory of the host, memory that the driver
  moves (managed), memory of another GPU, and addresses that the driver does not know are violations.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worker_orcd.kernels.memory import DeviceFacts, Region


class Place(enum.Enum):
    """Where an address lies."""

    DEVICE = "device memory"
    HOST = "host memory"
    MANAGED = "managed memory"
    UNKNOWN = "memory that the driver does not know"


@dataclass(frozen=True, slots=True)
class Found:
    place: Place
    device: int | None = None  # which GPU's, as CUDA counts them


class PointerProbe(Protocol):
    def begin(self) -> None:
        """Before the first look of a check, on its thread. Raises ProbeFailed."""
        ...

    def look(self, address: int) -> Found:
        """What is at the address. Raises ProbeFailed."""
        ...


class ProbeFailed(Exception):
    """Nothing can be said about any address; the message says why."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A region that is not where it must be."""

    region: Region
    found: Found

    @property
    def sentence(self) -> str:
        where = self.found.place.value
        if self.found.place is Place.DEVICE:
            where += f" of GPU {self.found.device}"
        return f"{self.region.num_bytes} bytes of {self.region.use} lie in {where}"


def check(regions: Sequence[Region], probe: PointerProbe, device: int) -> list[Violation]:
    """Every region that is not, from its first byte to its last, memory of that GPU. Raises ProbeFailed."""
    violations: list[Violation] = []
    probe.begin()
    for region in regions:
        for address in (region.address, region.address + region.num_bytes - 1):
            found = probe.look(address)
            if found.place is not Place.DEVICE or found.device != device:
                violations.append(Violation(region, found))
                break
    return violations


# CUpointer_attribute and CUmemorytype of cuda.h, and results of its functions.
_MEMORY_TYPE, _IS_MANAGED, _ORDINAL = 2, 8, 9
_HOST, _DEVICE, _ARRAY, _UNIFIED = 1, 2, 3, 4
_SUCCESS = 0
_BYTE, _WORD = 0xFF, 0xFFFFFFFF
_ATTRIBUTES = (_MEMORY_TYPE, _IS_MANAGED, _ORDINAL)

OpenLibrary = Callable[[str], Any]


class DriverProbe:
    """Implements PointerProbe with CUDA's driver. Used by one thread at a time; any may be the next."""

    def __init__(self, facts: DeviceFacts, open_library: OpenLibrary = ctypes.CDLL) -> None:
        """Raises ProbeFailed."""
        try:
            self._library = open_library("libcuda.so.1")
            self._ask = self._library.cuPointerGetAttributes
        except (OSError, AttributeError) as error:
            raise ProbeFailed(f"CUDA's driver library cannot be used: {type(error).__name__}") from None
        self._ask.argtypes = [ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
        self._ask.restype = ctypes.c_int
        self._device = facts.index
        # Of eight bytes each, whatever the driver writes of them: an enumerator, a truth value, a number.
        self._told = (ctypes.c_uint64 * len(_ATTRIBUTES))()
        first = ctypes.addressof(self._told)
        self._wanted = (ctypes.c_int * len(_ATTRIBUTES))(*_ATTRIBUTES)
        self._places = (ctypes.c_void_p * len(_ATTRIBUTES))(
            *range(first, first + ctypes.sizeof(self._told), 8)
        )

    def begin(self) -> None:
        """Make the GPU's context this thread's: the driver answers in no other."""
        import torch  # here: whoever serves knows of this module before torch has been imported

        try:
            torch.cuda.mem_get_info(self._device)
        except RuntimeError as error:
            raise ProbeFailed(f"the GPU cannot be asked: {type(error).__name__}") from None

    def look(self, address: int) -> Found:
        self._told[:] = [0] * len(_ATTRIBUTES)
        result = self._ask(len(_ATTRIBUTES), self._wanted, self._places, address)
        if result != _SUCCESS:
            raise ProbeFailed(f"CUDA's driver answers with error {result}")
        kind, is_managed, ordinal = self._told[0] & _WORD, self._told[1] & _BYTE, self._told[2] & _WORD
        if is_managed or kind == _UNIFIED:
            return Found(Place.MANAGED)
        if kind in (_DEVICE, _ARRAY):
            return Found(Place.DEVICE, ordinal)
        return Found(Place.HOST if kind == _HOST else Place.UNKNOWN)
