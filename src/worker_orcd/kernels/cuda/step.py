"""A compiled forward pass on a GPU, and the draws of its tokens behind it on the same stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager

import torch

from worker_orcd.errors import DeviceError, OutOfMemory
from worker_orcd.kernels.backend import Counts
from worker_orcd.kernels.cuda.executor import Executor
from worker_orcd.kernels.cuda.rounds import Rounds
from worker_orcd.kernels.cuda.sampler import MAX_DRAWS, DeviceSampler
from worker_orcd.kernels.draw import Draw
from worker_orcd.sequence import RowResult


class CudaStep:
    """Implements `kernels.backend.CompiledForward`."""

    def __init__(self, executor: Executor, device: torch.device) -> None:
        self.executor, self._device = executor, device

    def __call__(self, counts: Counts) -> torch.Tensor:
        if self._device.type != "cuda":
            with torch.inference_mode():
                return self.executor.start(counts).cpu()
        with on_device(self._device):
            logits = self.executor.start(counts).cpu()
            # A copy of nothing waits for nothing; and until the step is over, its inputs must stay.
            torch.cuda.current_stream().synchronize()
            return logits


class DrawingStep(CudaStep):
    """Implements `kernels.backend.DrawingForward`: logits stay on the device, tokens come back.

    Two steps may be under way. All that they share on the device, the inputs and the tokens drawn last among
    it, is in the order of the stream: the second reads what the first has drawn before it draws itself.
    """

    max_draws = MAX_DRAWS

    def __init__(
        self, executor: Executor, device: torch.device, sampler: DeviceSampler, rounds: Rounds
    ) -> None:
        super().__init__(executor, device)
        self._sampler, self._rounds = sampler, rounds

    def warm(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile every kernel and capture every graph. `on_progress(done, all)`."""

        def launch_more(logits: torch.Tensor) -> None:
            self._sampler.launch_all(logits)
            self._rounds.launch(1, 1)

        self.executor.warm(on_progress, launch_more)

    def launch(self, counts: Counts, draws: Iterable[Draw | None]) -> Callable[[], Sequence[RowResult]]:
        with on_device(self._device):
            try:
                self._start(counts, draws)
            except BaseException:
                torch.cuda.current_stream().synchronize()  # what was queued must not outlive the step
                raise
        return self._results

    def _start(self, counts: Counts, draws: Iterable[Draw | None]) -> None:
        # The forward pass first: the draws are made and written down while the device computes.
        logits = self.executor.start(counts)
        wanted = self._sampler.prepare(list(draws))
        self._sampler.upload()
        last = counts.num_rounds - 1
        if len(logits):
            self._sampler.launch(logits, wanted, slot=last)
        for slot in range(last - 1, -1, -1):
            self._rounds.launch(counts.num_rows, slot + 1)
            self._sampler.launch(self.executor.again(counts), wanted, slot=slot)
        self._sampler.download(counts.num_rounds)

    def _results(self) -> Sequence[RowResult]:
        with on_device(self._device):
            return self._sampler.results()


@contextmanager
def on_device(device: torch.device) -> Generator[None]:
    """Launches go to this GPU, and its errors are told as `errors` names them.

    A thread has a current device of its own, and the one that computes is not the one that loaded.
    """
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory("the GPU has no memory left for this step") from error
    except torch.AcceleratorError as error:
        # Sticky: a context in which a kernel failed gives the same error to whatever is called next.
        raise DeviceError("the GPU reported an error and cannot be used any more") from error
