"""Where weights and KV cache lie: what is a violation, and how the driver is asked."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from worker_orcd.kernels.memory import DeviceFacts, Region
from worker_orcd.runner.residency import DriverProbe, Found, Place, ProbeFailed, check

ON_GPU_1 = Found(Place.DEVICE, 1)


class Map:
    """A PointerProbe: what lies from which address on."""

    def __init__(self, *places: tuple[int, Found]) -> None:
        self._places = sorted(places, key=lambda place: place[0], reverse=True)
        self.looks: list[int] = []
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def look(self, address: int) -> Found:
        assert self.begun
        self.looks.append(address)
        return next((found for start, found in self._places if address >= start), Found(Place.UNKNOWN))


def test_every_region_is_looked_at_from_end_to_end() -> None:
    probe = Map((0, ON_GPU_1))
    regions = [Region("weights", 4096, 512), Region("KV cache", 8192, 1)]
    assert check(regions, probe, 1) == []
    assert probe.looks == [4096, 4607, 8192, 8192]
    assert check([], probe, 1) == []


@pytest.mark.parametrize(
    ("found", "where"),
    [
        (Found(Place.HOST), "host memory"),
        (Found(Place.MANAGED), "managed memory"),
        (Found(Place.UNKNOWN), "memory that the driver does not know"),
        (Found(Place.DEVICE, 0), "device memory of GPU 0"),
    ],
)
def test_memory_that_is_elsewhere_is_found(found: Found, where: str) -> None:
    planted = Region("KV cache", 1 << 20, 4096)
    probe = Map((0, ON_GPU_1), (1 << 20, found), (2 << 20, ON_GPU_1))
    (violation,) = check([Region("weights", 4096, 512), planted, Region("weights", 2 << 20, 9)], probe, 1)
    assert violation.region is planted and violation.found == found
    assert violation.sentence == f"4096 bytes of KV cache lie in {where}"


def test_a_region_that_only_begins_in_device_memory_is_found() -> None:
    probe = Map((0, ON_GPU_1), (4096 + 511, Found(Place.HOST)))
    assert len(check([Region("weights", 4096, 512)], probe, 1)) == 1
    assert check([Region("weights", 4096, 511)], probe, 1) == []


class Library:
    """libcuda, as far as the probe knows it: an address tells what is there."""

    def __init__(self, answers: dict[int, tuple[int, int, int]], result: int = 0) -> None:
        self.cuPointerGetAttributes = Function(answers, result)


class Function:
    argtypes: Any = None
    restype: Any = None

    def __init__(self, answers: dict[int, tuple[int, int, int]], result: int) -> None:
        self._answers, self._result = answers, result

    def __call__(self, count: int, wanted: Any, places: Any, address: int) -> int:
        names = {2: 0, 8: 1, 9: 2}  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, …_IS_MANAGED, …_DEVICE_ORDINAL
        for index in range(count):
            answer = self._answers.get(address)
            if answer is None:  # as the driver does for what it does not know
                continue
            kind = ctypes.c_uint8 if wanted[index] == 8 else ctypes.c_int
            ctypes.cast(places[index], ctypes.POINTER(kind))[0] = answer[names[wanted[index]]]
        return self._result


def probe_of(answers: dict[int, tuple[int, int, int]], result: int = 0) -> DriverProbe:
    facts = DeviceFacts(memory_bytes=0, index=3)
    return DriverProbe(facts, lambda name: Library(answers, result) if name == "libcuda.so.1" else None)


def test_the_driver_s_answers_are_understood() -> None:
    answers = {1: (2, 0, 3), 2: (1, 0, 3), 3: (2, 1, 3), 4: (1, 1, 0), 5: (4, 0, 0), 6: (2, 0, 0)}
    probe = probe_of(answers)
    assert [probe.look(address) for address in range(1, 8)] == [
        Found(Place.DEVICE, 3),
        Found(Place.HOST),
        Found(Place.MANAGED),
        Found(Place.MANAGED),
        Found(Place.MANAGED),
        Found(Place.DEVICE, 0),
        Found(Place.UNKNOWN),  # and nothing is left of the answer before
    ]


def test_a_driver_that_cannot_be_asked_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    facts = DeviceFacts(memory_bytes=0)
    with pytest.raises(ProbeFailed, match="driver library cannot be used: OSError"):
        DriverProbe(facts, absent)
    with pytest.raises(ProbeFailed, match="AttributeError"):
        DriverProbe(facts, lambda _name: object())
    with pytest.raises(ProbeFailed, match="error 201"):
        probe_of({}, result=201).look(1)

    def lost(_device: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    with pytest.raises(ProbeFailed, match="the GPU cannot be asked: RuntimeError"):
        probe_of({}).begin()
