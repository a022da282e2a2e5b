"""
Looks at the GPU from time to time: its condition, and who else is there.

All of it is for people and machines that watch the worker, and for `yield_to_others`; without NVML the worker
does the same work and says why nothing is known.

Whose processes these are. NVML gives ids of the host, which a container does not know its processes by. So
the worker looks before it opens the GPU and after: what it finds under its own id is itself, else what has
come meanwhile. If neither is there, the driver shows no processes and nobody can be told apart. Who was there
before the worker (a display server, say) is no reason to leave.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from worker_orcd.narration import Narration
from worker_orcd.nvml import GpuProcess, Nvml, NvmlGpu, NvmlUnavailable, open_nvml
from worker_orcd.server.status import Status
from worker_orcd.worker.off_loop import off_loop

OpenNvml = Callable[[], Nvml]


class Neighbours:
    """Tells the processes of others from the worker's own and from those that were there before it."""

    def __init__(self, before: frozenset[int], own_pid: int) -> None:
        """`before`: who was on any GPU before this process opened one."""
        self._before, self._own_pid = before, own_pid
        self._own: frozenset[int] | None = None  # None: the GPU has not been seen open yet

    def others(self, processes: tuple[GpuProcess, ...] | None) -> tuple[GpuProcess, ...] | None:
        """Of those on the GPU now, first asked once this process has opened it. None: nobody can tell."""
        if processes is None:
            return None
        now = frozenset(process.pid for process in processes)
        if self._own is None:
            self._own = now & {self._own_pid} or now - self._before
        self._before &= now  # an id may be given to another process later
        if not self._own:
            return None
        known = self._own | self._before
        return tuple(process for process in processes if process.pid not in known)


class GpuWatch:
    """The GPU as NVML tells of it, kept in `Status.gpu`. Methods run on the event loop; NVML does not."""

    def __init__(self, status: Status, narration: Narration, open_library: OpenNvml = open_nvml) -> None:
        self._status, self._narration, self._open_library = status, narration, open_library
        self._library: Nvml | None = None
        self._unavailable = ""  # why there is no library
        self._gpu: NvmlGpu | None = None
        self._neighbours: Neighbours | None = None

    def warn_unless_told(self, *, wanted: bool) -> None:
        """Where somebody wants to know who else is there, say so if nobody can."""
        gpu = self._status.gpu
        if wanted and gpu.others is None:
            reason = gpu.unavailable if gpu.sample is None else "the driver does not show processes"
            self._narration.warn(f"yield_to_others does nothing: {reason}.")

    async def prepare(self) -> None:
        """Before the GPU is opened: look who is there."""

        def work() -> tuple[Nvml | None, frozenset[int], str]:
            try:
                library = self._open_library()
                return library, library.pids(), ""
            except NvmlUnavailable as error:
                return None, frozenset(), str(error)

        self._library, before, self._unavailable = await off_loop(work, name="nvml")
        self._neighbours = Neighbours(before, os.getpid())

    async def open(self, uuid: str | None) -> None:
        """The model's GPU is open: look at it from now on. None: the model runs on no GPU. Once."""
        if self._gpu is not None:
            return
        library = self._library
        if uuid is None:
            self._unavailable = "the model does not run on a GPU"
        elif library is not None:

            def work() -> NvmlGpu | str:
                try:
                    return library.gpu(uuid)
                except NvmlUnavailable as error:
                    return str(error)

            found = await off_loop(work, name="nvml")
            if isinstance(found, str):
                self._unavailable = found
            else:
                self._gpu = found
        if self._gpu is None:
            self._status.gpu = self._status.gpu.unseen(self._unavailable)
        else:
            await self.look()

    async def look(self) -> None:
        """Bring `Status.gpu` up to date, and tell what is new and bad."""
        gpu, neighbours = self._gpu, self._neighbours
        if gpu is None or neighbours is None:
            return
        before = self._status.gpu
        try:
            sample = await off_loop(gpu.sample, name="nvml")
        except NvmlUnavailable as error:
            if before.sample is not None:
                self._narration.warn(f"The GPU cannot be asked any more: {error}.")
            self._status.gpu = before.unseen(str(error))
            return
        now = self._status.gpu = before.seen(sample, neighbours.others(sample.processes))
        if sample.xids:
            numbers = ", ".join(map(str, sample.xids))
            self._narration.tell("gpu_error", f"The GPU reported Xid {numbers}.", xids=list(sample.xids))
        if now.new_ecc_errors > before.new_ecc_errors:
            self._narration.tell(
                "gpu_error",
                f"The GPU's memory has had {now.new_ecc_errors} uncorrectable ECC errors since the start.",
                ecc_uncorrected=now.new_ecc_errors,
            )

    async def close(self) -> None:
        if self._gpu is not None:
            gpu, self._gpu = self._gpu, None
            await off_loop(gpu.close, name="nvml")
