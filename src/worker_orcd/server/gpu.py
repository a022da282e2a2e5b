"""What is known of the GPU and of where the model's memory lies, for `/health` and `/metrics`.

`GpuState` is replaced as a whole by whoever watches the GPU (`worker.gpu_watch`), on the event loop; nobody
asks the driver on behalf of a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker_orcd.nvml import GpuProcess, GpuSample

# Xid errors that the program which got them is to blame for, as a rule: the GPU is none the worse. Others are
# of the GPU, its memory or its links. NVIDIA, "XID Errors", the table of causes.
_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 94})


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """The last look at the GPU, and what was seen since the worker started."""

    sample: GpuSample | None = None
    unavailable: str = "the model is not loaded yet"  # why there is no sample
    others: tuple[GpuProcess, ...] | None = None  # neither this worker nor there before it; None: unknown
    xids: Mapping[int, int] = field(default_factory=dict[int, int])  # how often each was seen
    ecc_at_first: int | None = (
        None  # uncorrectable errors that the first look found: not of this worker's time
    )

    def seen(self, sample: GpuSample, others: tuple[GpuProcess, ...] | None) -> GpuState:
        """The state after one more look."""
        xids = dict(self.xids)
        for xid in sample.xids:
            xids[xid] = xids.get(xid, 0) + 1
        first = sample.ecc_uncorrected if self.ecc_at_first is None else self.ecc_at_first
        return GpuState(sample=sample, others=others, xids=xids, ecc_at_first=first)

    def unseen(self, reason: str) -> GpuState:
        """The state after a look that saw nothing, for that reason."""
        return replace(self, sample=None, others=None, unavailable=reason)

    @property
    def new_ecc_errors(self) -> int:
        """Uncorrectable ones since the first look."""
        now = None if self.sample is None else self.sample.ecc_uncorrected
        return 0 if now is None or self.ecc_at_first is None else max(0, now - self.ecc_at_first)

    @property
    def fault(self) -> str | None:
        """What is wrong with the GPU itself, in words."""
        broken = sorted(xid for xid in self.xids if xid not in _OF_PROGRAMS)
        if broken:
            return f"the GPU reported Xid {', '.join(map(str, broken))}"
        if self.new_ecc_errors:
            return f"the GPU's memory has had {self.new_ecc_errors} uncorrectable ECC errors"
        return None

    def body(self) -> dict[str, Any]:
        """The field `gpu` of /health."""
        if self.sample is None:
            return {"available": False, "reason": self.unavailable}
        sample = asdict(self.sample)
        del sample["xids"], sample["processes"]
        others = None if self.others is None else [asdict(process) for process in self.others]
        xids = {str(xid): count for xid, count in self.xids.items()}
        return {"available": True, **sample, "xids": xids, "other_processes": others}


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """What came of checking that weights and KV cache lie in device memory."""

    resident: bool | None = None  # None: not checked, or it cannot be
    checks: int = 0
    violations: int = 0  # checks that found some
    found: str | None = None  # what the last check found wrong


def gpu_metrics(state: GpuState) -> Iterator[Metric]:
    """Families of the last look; those that the GPU does not tell are left out."""
    sample = state.sample
    yield _gauge("worker_gpu_available", "1 while NVML can be asked about the GPU", int(sample is not None))
    xids = CounterMetricFamily("worker_gpu_xid_errors", "Critical errors by NVIDIA's numbers", labels=["xid"])
    for xid, count in state.xids.items():
        xids.add_metric([str(xid)], count)
    yield xids
    yield from _told(sample or GpuSample())
    if state.others is not None:
        held = sum(process.memory_bytes or 0 for process in state.others)
        yield _gauge("worker_gpu_other_processes", "Processes on the GPU that came later", len(state.others))
        yield _gauge("worker_gpu_other_memory_bytes", "Device memory that these hold, where told", held)


def residency_metrics(residency: Residency) -> Iterator[Metric]:
    if residency.resident is not None:
        text = "1 while weights and KV cache are where they should be"
        yield _gauge("worker_resident", text, int(residency.resident))
    yield CounterMetricFamily("worker_residency_checks", "Looks at where memory lies", value=residency.checks)
    yield CounterMetricFamily(
        "worker_residency_violations", "Those that found memory elsewhere", value=residency.violations
    )


def _told(sample: GpuSample) -> Iterator[Metric]:
    gauges = {
        "worker_gpu_temperature_celsius": ("Of the GPU", sample.temperature_celsius),
        "worker_gpu_power_watts": ("Drawn", sample.power_watts),
        "worker_gpu_power_limit_watts": ("Allowed", sample.power_limit_watts),
        "worker_gpu_utilization_ratio": ("Time in which a kernel ran", sample.utilization),
        "worker_gpu_memory_utilization_ratio": ("Time in which memory was used", sample.memory_utilization),
        "worker_gpu_memory_used_bytes": ("Device memory, of all processes", sample.memory_used_bytes),
        "worker_gpu_memory_total_bytes": ("Device memory there is", sample.memory_total_bytes),
    }
    for name, (text, value) in gauges.items():
        if value is not None:
            yield _gauge(name, text, value)
    kinds = {"corrected": sample.ecc_corrected, "uncorrected": sample.ecc_uncorrected}
    if any(count is not None for count in kinds.values()):
        ecc = GaugeMetricFamily(
            "worker_gpu_ecc_errors", "Of memory, since the driver was loaded", labels=["kind"]
        )
        for kind, count in kinds.items():
            if count is not None:
                ecc.add_metric([kind], count)
        yield ecc


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)
