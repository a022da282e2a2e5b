"""NVML through nvidia-ml-py, which is a module made up here: what is asked, and what is done without."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from worker_orcd.nvml import GpuProcess, GpuSample, NvmlUnavailable, open_nvml

TIMEOUT, NOT_SUPPORTED = "Timeout", "Not Supported"


def made_up(**changes: Any) -> ModuleType:
    """A `pynvml` with one GPU. Changes are results of functions; the name of an error: it is raised."""
    module: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    module.NVMLError = NVMLError
    for name in ("NotFound", "GpuIsLost", "Uninitialized", "NotSupported", "Timeout"):
        setattr(module, f"NVMLError_{name}", type(f"NVMLError_{name}", (NVMLError,), {}))
    module.NVMLLibraryMismatchError = type("NVMLLibraryMismatchError", (Exception,), {})
    module.NVML_VOLATILE_ECC, module.NVML_TEMPERATURE_GPU = 0, 0
    module.NVML_MEMORY_ERROR_TYPE_CORRECTED, module.NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    module.nvmlEventTypeXidCriticalError = 8
    module.events, module.freed = [], []
    results: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlEventSetCreate": "events",
        "nvmlDeviceRegisterEvents": None,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetPowerUsage": 70500,
        "nvmlDeviceGetEnforcedPowerLimit": 700000,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=25, memory=50),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 << 30, total=80 << 30),
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7, usedGpuMemory=1 << 20)],
        "nvmlDeviceGetGraphicsRunningProcesses": [
            SimpleNamespace(pid=7, usedGpuMemory=5),
            SimpleNamespace(pid=8, usedGpuMemory=None),
        ],
    }

    def function(result: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        return call

    for name, result in results.items():
        change = changes.get(name, result)
        if isinstance(change, str) and change.startswith("NVMLError"):
            change = getattr(module, change)(change)
        setattr(module, name, function(change))
    module.nvmlEventSetFree = module.freed.append
    module.nvmlDeviceGetTotalEccErrors = lambda _handle, kind, _counter: [2, 1][kind]

    def wait(_events: Any, milliseconds: int) -> Any:
        assert milliseconds == 0
        if not module.events:
            raise module.NVMLError_Timeout(TIMEOUT)
        return SimpleNamespace(eventData=module.events.pop(0))

    module.nvmlEventSetWait_v2 = wait
    for name, value in changes.items():
        if callable(value):
            setattr(module, name, value)
    return module


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**changes: Any) -> ModuleType:
        module = made_up(**changes)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_a_sample_has_everything_in_plain_units(library: Any) -> None:
    module = library()
    nvml = open_nvml()
    assert nvml.pids() == {7, 8}
    gpu = nvml.gpu("0b5a-11")
    module.events += [79, 31]
    expected = GpuSample(
        temperature_celsius=41,
        power_watts=70.5,
        power_limit_watts=700.0,
        utilization=0.25,
        memory_utilization=0.5,
        memory_used_bytes=3 << 30,
        memory_total_bytes=80 << 30,
        ecc_corrected=2,
        ecc_uncorrected=1,
        xids=(79, 31),
        processes=(GpuProcess(7, 1 << 20), GpuProcess(8, None)),
    )
    assert gpu.sample() == expected
    assert gpu.sample().xids == ()  # told once
    gpu.close()
    gpu.close()
    assert module.freed == ["events"]


def test_xids_that_never_end_do_not_keep_a_sample(library: Any) -> None:
    module = library()
    module.nvmlEventSetWait_v2 = lambda *_: SimpleNamespace(eventData=13)
    assert open_nvml().gpu("0b5a").sample().xids == (13,) * 64


def test_what_a_gpu_does_not_tell_is_none_and_the_rest_is_there(library: Any) -> None:
    module = library()
    mismatch = module.NVMLLibraryMismatchError("the driver is older than the package")
    library(
        nvmlDeviceGetTemperature="NVMLError_NotSupported",
        nvmlDeviceGetPowerUsage="NVMLError_NotSupported",
        nvmlDeviceGetUtilizationRates="NVMLError_NotSupported",
        nvmlDeviceRegisterEvents="NVMLError_NotSupported",
        nvmlDeviceGetComputeRunningProcesses="NVMLError_NotSupported",
        nvmlDeviceGetGraphicsRunningProcesses="NVMLError_NotSupported",
    )
    nvml = open_nvml()
    assert nvml.pids() == frozenset()
    found = nvml.gpu("0b5a").sample()
    assert (found.temperature_celsius, found.power_watts, found.utilization) == (None, None, None)
    assert found.processes is None and found.xids == ()
    assert found.memory_total_bytes == 80 << 30 and found.power_limit_watts == 700.0
    module = library()
    module.NVMLLibraryMismatchError = type(mismatch)

    def raise_mismatch(_handle: Any) -> Any:
        raise mismatch

    module.nvmlDeviceGetMemoryInfo = raise_mismatch
    assert open_nvml().gpu("0b5a").sample().memory_used_bytes is None


def test_a_slice_of_a_gpu_is_found_by_its_own_uuid(library: Any) -> None:
    module = library()
    asked: list[str] = []

    def by_uuid(uuid: str) -> str:
        asked.append(uuid)
        if not uuid.startswith("MIG-"):
            raise module.NVMLError_NotFound("Not Found")
        return "handle"

    module.nvmlDeviceGetHandleByUUID = by_uuid
    open_nvml().gpu("MIG-0b5a")
    assert asked == ["GPU-0b5a", "MIG-0b5a"]
    library(nvmlDeviceGetHandleByUUID="NVMLError_NotFound")
    with pytest.raises(NvmlUnavailable, match="no GPU of the UUID"):
        open_nvml().gpu("0b5a")


def test_a_gpu_that_is_lost_is_said(library: Any) -> None:
    module = library()
    gpu = open_nvml().gpu("0b5a")

    def lost(_handle: Any) -> Any:
        raise module.NVMLError_GpuIsLost("GPU is lost")

    module.nvmlDeviceGetMemoryInfo = lost
    with pytest.raises(NvmlUnavailable, match="NVML says: GPU is lost"):
        gpu.sample()


def test_a_library_that_is_absent_or_broken_is_said(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library(nvmlInit="NVMLError_NotFound")
    with pytest.raises(NvmlUnavailable, match="NVML says"):
        open_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py is not installed"):
        open_nvml()

    def broken(_name: str) -> Any:
        raise OSError("wrong ELF class")

    monkeypatch.setattr("worker_orcd.nvml.importlib.import_module", broken)
    with pytest.raises(NvmlUnavailable, match="cannot be imported: OSError"):
        open_nvml()
