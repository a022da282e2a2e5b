"""A compiled forward pass on a GPU, and the draws of its tokens behind it on the same stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from worker_orcd.errors import DeviceError, OutOfMemory
from worker_orcd.kernels.backend import Counts
from worker_orcd.kernels.cuda.draw_slab import MAX_DRAWS, Wanted
from worker_orcd.kernels.cuda.executor import Executor
from worker_orcd.kernels.cuda.rounds import Rounds
from worker_orcd.kernels.cuda.sampler import DeviceSampler
from worker_orcd.kernels.draw import Draw
from worker_orcd.sequence import RowResult

# Rows whose MAX_DRAWS rounds are one graph too: what lies between the graphs of rounds, a twentieth of a
# millisecond, counts where a round is short. And what they draw with.
_BURST_ROWS = 8
_BURST_DRAWS = (Wanted(), Wanted(filters=True))
_Compute = Callable[[Counts], torch.Tensor]


class CudaStep:
    """Implements `kernels.backend.CompiledForward`."""

    def __init__(self, executor: Executor, device: torch.device) -> None:
        self.executor, self._device = executor, device

    @property
    def sampler_bytes(self) -> int:
        """On the device."""
        return 0

    def warm(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile every kernel and capture every graph. `on_progress(done, all)`."""
        self.executor.warm(on_progress)
        self.executor.forget_launches()

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
    it, is in the order of the stream: the second reads, and counts, what the first has drawn before it draws
    itself.
    """

    max_draws = MAX_DRAWS

    def __init__(
        self, executor: Executor, device: torch.device, sampler: DeviceSampler, rounds: Rounds
    ) -> None:
        super().__init__(executor, device)
        self._sampler, self._rounds = sampler, rounds
        self._bursts: dict[tuple[int, Wanted], torch.cuda.CUDAGraph] = {}  # by rows

    @property
    def sampler_bytes(self) -> int:
        return self._sampler.allocated_bytes

    def warm(self, on_progress: Callable[[int, int], None]) -> None:
        """As `CudaStep.warm`."""

        def launch_more(logits: torch.Tensor) -> None:
            self._sampler.launch_all(logits)
            self._rounds.launch(1, 1)

        self.executor.warm(on_progress, launch_more)
        for rows in [one.tokens for one in self.executor.buckets if one.tokens == one.logits <= _BURST_ROWS]:
            counts = Counts(num_tokens=rows, num_rows=rows, num_logits=rows, num_rounds=MAX_DRAWS)
            for wanted in _BURST_DRAWS:
                work = partial(self._compute, counts, wanted, self.executor.launched)
                graph = self.executor.captured(work)
                if graph is not None:
                    self._bursts[rows, wanted] = graph
        self.executor.forget_launches()

    def launch(self, counts: Counts, draws: Iterable[Draw | None]) -> Callable[[], Sequence[RowResult]]:
        with on_device(self._device):
            try:
                self._start(counts, draws)
            except BaseException:
                torch.cuda.current_stream().synchronize()  # what was queued must not outlive the step
                raise
        return self._results

    def _start(self, counts: Counts, draws: Iterable[Draw | None]) -> None:
        if self._may_burst(counts):
            self.executor.stage(counts)
            wanted = self._prepare(draws)
            burst = self._bursts.get((counts.num_rows, wanted))
            if burst is None:
                self._compute(counts, wanted, self.executor.again)
            else:
                burst.replay()
        else:
            # The forward pass first: the draws are made and written down while the device computes.
            logits = self.executor.start(counts)
            self._draw(logits, counts, self._prepare(draws), self.executor.again)
        self._sampler.download(counts.num_rounds)

    def _may_burst(self, counts: Counts) -> bool:
        """A row that is not there would draw with what another had: rows are as many as the graph has."""
        return (
            counts.num_rounds == MAX_DRAWS
            and counts.num_tokens == counts.num_rows == counts.num_logits
            and (counts.num_rows, _BURST_DRAWS[0]) in self._bursts
        )

    def _prepare(self, draws: Iterable[Draw | None]) -> Wanted:
        wanted = self._sampler.prepare(list(draws))
        self._sampler.upload()
        return wanted

    def _compute(self, counts: Counts, wanted: Wanted, compute: _Compute) -> None:
        """All rounds, on the inputs that are on the device."""
        self._draw(compute(counts), counts, wanted, compute)

    def _draw(self, logits: torch.Tensor, counts: Counts, wanted: Wanted, compute: _Compute) -> None:
        """From the first round's `logits`, and the rounds behind it."""
        last = counts.num_rounds - 1
        if len(logits):
            self._sampler.launch(logits, wanted, slot=last)
        for slot in range(last - 1, -1, -1):
            self._rounds.launch(counts.num_rows, slot + 1)
            self._sampler.launch(compute(counts), wanted, slot=slot, behind=slot + 1)

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
