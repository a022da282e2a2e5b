"""
What looks after a worker that serves: the GPU's condition, where memory lies, whether others need the GPU.

One task, one thing after the other, so that no look at memory meets a model that is being given up. With
`yield_to_others` the worker leaves the GPU as soon as a look finds somebody else's process there, and comes
back once several looks in a row have found none: whoever starts a job often starts another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from worker_orcd.config import WatchConfig
from worker_orcd.kernels.memory import DeviceFacts, DeviceMemory
from worker_orcd.narration import Narration
from worker_orcd.nvml import GpuProcess
from worker_orcd.runner.residency import PointerProbe, ProbeFailed, check
from worker_orcd.server.gpu import Residency
from worker_orcd.server.status import Status
from worker_orcd.worker.gpu_watch import GpuWatch
from worker_orcd.worker.off_loop import off_loop

QUIET_LOOKS = 3  # that must find nobody before the worker comes back
_SHOWN = 3  # violations that are told one by one

OpenProbe = Callable[[DeviceFacts], PointerProbe]


class Pausable(Protocol):
    """The worker, as the guard knows it."""

    async def pause(self, reason: str) -> None:
        """End jobs, give up the model, free the device."""
        ...

    async def resume(self) -> bool:
        """Load the model again. False where there is no room for it yet."""
        ...


class Yielding:
    """When to leave the GPU to others, and when to come back."""

    def __init__(self, quiet_looks: int = QUIET_LOOKS) -> None:
        self._needed, self._quiet = quiet_looks, 0

    def wanted(
        self, others: tuple[GpuProcess, ...] | None, *, is_paused: bool
    ) -> Literal["pause", "resume"] | None:
        """After a look. `others`: None where nobody can tell; then nobody is waited for."""
        if others:
            self._quiet = 0
            return None if is_paused else "pause"
        self._quiet += 1
        return "resume" if is_paused and self._quiet >= self._needed else None

    def wait_longer(self) -> None:
        """Coming back has failed: look for others from the beginning."""
        self._quiet = 0


class ResidencyWatch:
    """Where a loaded model's memory lies, kept in `Status.residency`. On the event loop; the driver is
    asked elsewhere.
    """

    def __init__(self, status: Status, narration: Narration, open_probe: OpenProbe) -> None:
        self._status, self._narration, self._open_probe = status, narration, open_probe
        self._memory: DeviceMemory | None = None
        self._probe: PointerProbe | None = None

    async def open(self, memory: DeviceMemory) -> None:
        """A model has been loaded: look at it now, and at every `look`. The host's memory is left alone."""
        self._memory, self._probe = None, None
        before = self._status.residency
        if memory.facts.index is None:
            self._status.residency = Residency(
                resident=True, checks=before.checks, violations=before.violations
            )
            return
        try:
            self._probe = self._open_probe(memory.facts)
        except ProbeFailed as error:
            self._narration.warn(f"Where the model's memory lies cannot be checked: {error}.")
            return
        self._memory = memory
        await self.look()

    def close(self) -> None:
        """The model is about to be given up."""
        self._memory, self._probe = None, None

    async def look(self) -> None:
        memory, probe = self._memory, self._probe
        if memory is None or probe is None or memory.facts.index is None:
            return
        index, before = memory.facts.index, self._status.residency
        try:
            found = await off_loop(lambda: check(memory.regions(), probe, index), name="residency")
        except ProbeFailed as error:
            self._narration.warn(f"Where the model's memory lies could not be checked: {error}.")
            return
        words = "; ".join(violation.sentence for violation in found[:_SHOWN])
        if len(found) > _SHOWN:
            words += f"; and {len(found) - _SHOWN} more"
        self._status.residency = Residency(
            resident=not found,
            checks=before.checks + 1,
            violations=before.violations + bool(found),
            found=words or None,
        )
        if found:
            self._narration.tell(
                "residency_violation",
                f"The model is not in its GPU's memory: {words}.",
                violations=len(found),
                bytes=sum(violation.region.num_bytes for violation in found),
            )
        elif before.resident is False:
            self._narration.warn("The model is in its GPU's memory again.")


class Guard:
    """Looks at times. On the event loop."""

    def __init__(
        self, config: WatchConfig, status: Status, gpu: GpuWatch, residency: ResidencyWatch, worker: Pausable
    ) -> None:
        self._config, self._status = config, status
        self._gpu, self._residency, self._worker = gpu, residency, worker
        self._yielding = Yielding()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        self._gpu.warn_unless_told(wanted=self._config.yield_to_others)
        every: dict[Callable[[], Awaitable[None]], float] = {
            self.look_at_gpu: self._config.gpu_poll_seconds,
            self._residency.look: self._config.residency_check_seconds,
        }
        due = {look: loop.time() + seconds for look, seconds in every.items()}
        while True:
            look = min(due, key=due.__getitem__)
            await asyncio.sleep(max(0.0, due[look] - loop.time()))
            await look()
            due[look] = loop.time() + every[look]

    async def look_at_gpu(self) -> None:
        await self._gpu.look()
        if not self._config.yield_to_others:
            return
        others = self._status.gpu.others
        match self._yielding.wanted(others, is_paused=self._status.paused is not None):
            case "pause":
                await self._worker.pause(f"{_people(others)} the GPU; the worker has left it to them for now")
            case "resume":
                if not await self._worker.resume():
                    self._yielding.wait_longer()
            case None:
                return


def _people(others: tuple[GpuProcess, ...] | None) -> str:
    count = len(others or ())
    return "another process uses" if count == 1 else f"{count} other processes use"
