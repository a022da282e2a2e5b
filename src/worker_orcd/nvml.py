"""
What the driver's management library (NVML) tells about a GPU: temperature, power, load, faults, processes.

* `Nvml` and `NvmlGpu` are the interface; `open_nvml` is the one real implementation, on nvidia-ml-py. Tests
  hand in others.
* The library is imported and initialised when it is asked for. Whatever keeps that from working, absence
  included, is an `NvmlUnavailable` with a sentence that says why: nothing that the worker does needs NVML.
* What one GPU or one driver does not tell (ECC on a consumer card, the memory of a process in a MIG slice) is
  None in a sample, and the rest is there.
* Calls may take as long as the driver likes: not for an event loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")
_MILLI = 1000.0
_MOST_EVENTS = 64  # that one sample takes: a GPU in trouble may have new ones faster than they are read


class NvmlUnavailable(Exception):
    """NVML cannot be asked, or not about this GPU; the message says why."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One that has a context on the GPU."""

    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One look at a GPU. None: it does not tell."""

    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    utilization: float | None = None  # 0 to 1: of the last moments, in how many a kernel ran
    memory_utilization: float | None = None  # likewise: in how many memory was read or written
    memory_used_bytes: int | None = None  # by everybody
    memory_total_bytes: int | None = None
    ecc_corrected: int | None = None  # since the driver was loaded
    ecc_uncorrected: int | None = None
    xids: tuple[int, ...] = ()  # critical errors since the sample before, by NVIDIA's numbers
    processes: tuple[GpuProcess, ...] | None = None


class NvmlGpu(Protocol):
    """One GPU. Used by one thread."""

    def sample(self) -> GpuSample:
        """Raises NvmlUnavailable where the GPU cannot be asked any more."""
        ...

    def close(self) -> None: ...


class Nvml(Protocol):
    """The library. Used by one thread."""

    def pids(self) -> frozenset[int]:
        """Every process that has a context on any GPU now, as far as the driver tells."""
        ...

    def gpu(self, uuid: str) -> NvmlGpu:
        """The GPU that CUDA gives this UUID (without a prefix). Raises NvmlUnavailable."""
        ...


def open_nvml() -> Nvml:
    """NVML, initialised. Raises NvmlUnavailable."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        raise NvmlUnavailable("the package nvidia-ml-py is not installed") from None
    except Exception as error:  # a broken installation: of the wrong platform, half removed, …
        raise NvmlUnavailable(f"nvidia-ml-py cannot be imported: {type(error).__name__}") from None
    return _Library(library)


class _Library:
    """Implements Nvml with the module pynvml."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call(library.nvmlInit)

    def pids(self) -> frozenset[int]:
        found: set[int] = set()
        for index in range(self._told(self._library.nvmlDeviceGetCount) or 0):
            handle = self._told(self._library.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                gpu = _Gpu(self._library, handle, events=None)
                found.update(process.pid for process in gpu.processes() or ())
        return frozenset(found)

    def gpu(self, uuid: str) -> NvmlGpu:
        library, prefixes = self._library, ("GPU-", "MIG-")
        bare = uuid
        for prefix in prefixes:
            bare = bare.removeprefix(prefix)
        for prefix in prefixes:  # a slice of a GPU has a UUID of its own
            try:
                handle = library.nvmlDeviceGetHandleByUUID(f"{prefix}{bare}")
            except library.NVMLError_NotFound:
                continue
            except library.NVMLError as error:
                raise _unavailable(error) from None
            return _Gpu(library, handle, events=self._events_of(handle))
        raise NvmlUnavailable("NVML knows no GPU of the UUID that CUDA tells")

    def _events_of(self, handle: Any) -> Any:
        """A set that Xid errors of the GPU come to; None where it has none, as a MIG slice."""
        library = self._library
        events = self._told(library.nvmlEventSetCreate)
        if events is None:
            return None
        try:
            library.nvmlDeviceRegisterEvents(handle, library.nvmlEventTypeXidCriticalError, events)
        except library.NVMLError:
            self._told(library.nvmlEventSetFree, events)
            return None
        return events

    def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return function(*arguments)
        except self._library.NVMLError as error:
            raise _unavailable(error) from None

    def _told(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return function(*arguments)
        except self._library.NVMLError:
            return None


class _Gpu:
    """Implements NvmlGpu."""

    def __init__(self, library: Any, handle: Any, events: Any) -> None:
        self._library, self._handle, self._events = library, handle, events
        # The second: the driver is older than the package, and has another version of a function.
        self._not_told = (library.NVMLError, getattr(library, "NVMLLibraryMismatchError", library.NVMLError))

    def sample(self) -> GpuSample:
        library = self._library
        ecc = library.NVML_VOLATILE_ECC
        load = self._told("nvmlDeviceGetUtilizationRates")
        memory = self._told("nvmlDeviceGetMemoryInfo")
        power = self._told("nvmlDeviceGetPowerUsage")
        limit = self._told("nvmlDeviceGetEnforcedPowerLimit")
        return GpuSample(
            temperature_celsius=self._told("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU),
            power_watts=None if power is None else power / _MILLI,
            power_limit_watts=None if limit is None else limit / _MILLI,
            utilization=None if load is None else load.gpu / 100.0,
            memory_utilization=None if load is None else load.memory / 100.0,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            ecc_corrected=self._told(
                "nvmlDeviceGetTotalEccErrors", library.NVML_MEMORY_ERROR_TYPE_CORRECTED, ecc
            ),
            ecc_uncorrected=self._told(
                "nvmlDeviceGetTotalEccErrors", library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, ecc
            ),
            xids=self._new_xids(),
            processes=self.processes(),
        )

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Those that compute and those that draw, each once; None where neither is told."""
        found: dict[int, GpuProcess] = {}
        tables = [
            self._told("nvmlDeviceGetComputeRunningProcesses"),
            self._told("nvmlDeviceGetGraphicsRunningProcesses"),
        ]
        if all(table is None for table in tables):
            return None
        for table in tables:
            for one in table or ():
                used = one.usedGpuMemory
                found.setdefault(one.pid, GpuProcess(one.pid, None if used is None else int(used)))
        return tuple(found.values())

    def close(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            try:
                self._library.nvmlEventSetFree(events)
            except self._library.NVMLError:  # the GPU is lost: nothing is left to free
                return

    def _new_xids(self) -> tuple[int, ...]:
        found: list[int] = []
        while self._events is not None and len(found) < _MOST_EVENTS:
            try:
                event = self._library.nvmlEventSetWait_v2(self._events, 0)
            except self._library.NVMLError:  # no more of them, most often
                break
            found.append(int(event.eventData))
        return tuple(found)

    def _told(self, function: str, *arguments: Any) -> Any:
        """None where GPU or driver have no such thing. Raises NvmlUnavailable for a GPU that is gone."""
        library = self._library
        try:
            return getattr(library, function)(self._handle, *arguments)
        except (library.NVMLError_GpuIsLost, library.NVMLError_Uninitialized) as error:
            raise _unavailable(error) from None
        except self._not_told:
            return None


def _unavailable(error: Exception) -> NvmlUnavailable:
    return NvmlUnavailable(f"NVML says: {str(error).rstrip('.')}")
