"""NVML without a driver: a test says what the GPU is like, and who is on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from worker_orcd.nvml import GpuProcess, GpuSample, NvmlGpu, NvmlUnavailable

COOL = GpuSample(
    temperature_celsius=41,
    power_watts=70.5,
    power_limit_watts=700.0,
    utilization=0.25,
    memory_utilization=0.5,
    memory_used_bytes=3 << 30,
    memory_total_bytes=80 << 30,
    ecc_corrected=2,
    ecc_uncorrected=1,
)


@dataclass
class FakeNvml:
    """Implements Nvml and NvmlGpu for one GPU. Change its fields to inject faults."""

    state: GpuSample = COOL
    xids: list[int] = field(default_factory=list)
    processes: dict[int, int | None] | None = field(default_factory=dict)  # bytes by process id
    lost: str | None = None  # why it cannot be asked any more
    absent: str | None = None  # why there is no NVML
    uuid: str = "0b5a"
    num_samples: int = 0
    closed: bool = False

    def __call__(self) -> FakeNvml:
        """As `open_nvml`."""
        if self.absent is not None:
            raise NvmlUnavailable(self.absent)
        return self

    def pids(self) -> frozenset[int]:
        return frozenset(self.processes or ())

    def gpu(self, uuid: str) -> NvmlGpu:
        if uuid != self.uuid:
            raise NvmlUnavailable("NVML knows no GPU of the UUID that CUDA tells")
        return self

    def sample(self) -> GpuSample:
        self.num_samples += 1
        if self.lost is not None:
            raise NvmlUnavailable(self.lost)
        taken, self.xids = tuple(self.xids), []
        processes = None
        if self.processes is not None:
            processes = tuple(GpuProcess(pid, used) for pid, used in self.processes.items())
        return replace(self.state, xids=taken, processes=processes)

    def close(self) -> None:
        self.closed = True
