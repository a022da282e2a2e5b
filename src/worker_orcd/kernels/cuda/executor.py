"""
Gives a fused program memory and runs it: one CUDA graph for each bucket of steps.

Everything a step computes lies in one arena, placed once; a bucket's launches are fixed, whatever the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from worker_orcd.errors import Internal
from worker_orcd.kernels import placement
from worker_orcd.kernels.backend import Counts, Limits
from worker_orcd.kernels.cuda.compiler import Kernels
from worker_orcd.kernels.cuda.inputs import Bucket, Staging
from worker_orcd.kernels.cuda.program import Buffer, Operation, Rows, Value
from worker_orcd.kernels.placement import Lifetime

ALIGNMENT = 256  # bytes, of every buffer
_ROW_ALIGNMENT = 16  # bytes: what kernels load at once
_DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)  # rows of a token each
_PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens
Launch = Callable[[], object]


class Launcher(Protocol):
    """Knows the kernels of each operation."""

    def prepare(self, bucket: Bucket) -> Sequence[Launch]:
        """What a step launches before its operations."""
        ...

    def launch(self, operation: Operation, view: View, bucket: Bucket) -> Launch:
        """`operation` on the memory that `view` says, to be called as often as wanted."""
        ...


View = Callable[[Value], torch.Tensor]


class Arena:
    """Memory for the buffers of a program, at the largest bucket."""

    def __init__(
        self, operations: Sequence[Operation], result: Value, limits: Limits, device: torch.device
    ) -> None:
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for index, operation in enumerate(operations):
            for value in (*operation.writes, *operation.reads):
                first.setdefault(value.buffer, index)
                last[value.buffer] = index
        if result.buffer not in last:
            raise Internal("the forward function returned a value that no operation wrote")
        last[result.buffer] = len(operations)
        rows = {Rows.TOKENS: limits.max_tokens, Rows.LOGITS: limits.max_rows}
        lifetimes = [
            Lifetime(_up(rows[buffer.rows] * row_bytes(buffer), ALIGNMENT), begin, last[buffer])
            for buffer, begin in first.items()
        ]
        offsets, size = placement.place(lifetimes)
        self._offsets = dict(zip(first, offsets, strict=True))
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def view(self, value: Value, bucket: Bucket) -> torch.Tensor:
        """(rows of the bucket, width), rows `row_bytes` apart."""
        buffer = value.buffer
        rows = bucket.tokens if value.rows is Rows.TOKENS else bucket.logits
        memory, size = self._memory_as(buffer.dtype), buffer.dtype.itemsize
        start = self._offsets[buffer] // size + value.column
        return memory.as_strided((rows, value.width), (row_bytes(buffer) // size, 1), start)

    def _memory_as(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it."""
        found = self._typed.get(dtype)
        if found is None:
            found = self._typed[dtype] = self._memory.view(dtype)
        return found


def row_bytes(buffer: Buffer) -> int:
    """From a row to the next. Rows of integers, which experts are, follow each other without a gap."""
    if buffer.dtype is torch.int32:
        return buffer.width * buffer.dtype.itemsize
    return _up(buffer.width * buffer.dtype.itemsize, _ROW_ALIGNMENT)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def buckets(limits: Limits) -> list[Bucket]:
    """All that steps are padded to, the smallest first: few sizes, and no step much larger than it is."""
    few = [size for size in _DECODES if size < limits.max_rows]
    decodes = [Bucket(size, size) for size in [*few, limits.max_rows] if size <= limits.max_tokens]
    many = [size for size in _PROMPTS if size < limits.max_tokens]
    prompts = [
        Bucket(tokens, logits)
        for tokens in [*many, limits.max_tokens]
        for logits in sorted({min(16, limits.max_rows), limits.max_rows})
        if tokens >= logits
    ]
    return sorted({*decodes, *prompts}, key=lambda bucket: (bucket.tokens, bucket.logits))


def bucket_for(counts: Counts, among: Sequence[Bucket]) -> Bucket:
    """The first that holds the step."""
    for bucket in among:
        if counts.num_tokens <= bucket.tokens and counts.num_logits <= bucket.logits:
            return bucket
    raise Internal(f"a step of {counts.num_tokens} tokens and {counts.num_logits} logits fits no bucket")


class Executor:
    """Runs steps on a device's stream. With `graphs`, a bucket's launches are captured at its first use."""

    def __init__(
        self,
        operations: Sequence[Operation],
        result: Value,
        launcher: Launcher,
        staging: Staging,
        limits: Limits,
        kernels: Kernels,
        *,
        graphs: bool = True,
    ) -> None:
        self._operations, self._result = list(operations), result
        self._launcher, self._staging = launcher, staging
        self._kernels = kernels
        self._arena = Arena(operations, result, limits, kernels.device)
        self.buckets = buckets(limits)
        self._use_graphs = graphs and kernels.device.type == "cuda"
        self._launches: dict[Bucket, list[Launch]] = {}
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    @property
    def num_bytes(self) -> int:
        return self._arena.num_bytes

    def start(self, counts: Counts) -> torch.Tensor:
        """Queue a step on the current stream. The result: (num_logits, vocab_size) float32, on the device."""
        self.stage(counts)
        return self.again(counts)

    def stage(self, counts: Counts) -> None:
        """Queue the copy of a step's inputs to the device."""
        self._staging.copy(counts, bucket_for(counts, self.buckets))

    def again(self, counts: Counts) -> torch.Tensor:
        """Queue a step on what the inputs on the device are by then."""
        bucket = bucket_for(counts, self.buckets)
        graph = self._graph(bucket) if self._use_graphs else None
        if graph is None:
            return self.launched(counts)
        graph.replay()
        return self._arena.view(self._result, bucket)[: counts.num_logits]

    def launched(self, counts: Counts) -> torch.Tensor:
        """As `again`, kernel by kernel."""
        bucket = bucket_for(counts, self.buckets)
        for launch in self._of(bucket):
            launch()
        return self._arena.view(self._result, bucket)[: counts.num_logits]

    def captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """What `work` launches as a graph, in which `launched` is part of it; None where there are no graphs.

        Kernels are loaded onto the device at their first launch: all of them have been launched before.
        """
        if not self._use_graphs:
            return None
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def forget_launches(self) -> None:
        """All that can be captured has been: there are some thousand launches in it."""
        self._launches.clear()

    def warm(
        self,
        on_progress: Callable[[int, int], None],
        launch_more: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Compile every kernel and make every bucket ready, the largest first. `on_progress(done, all)`.

        `launch_more`, given logits, launches each kernel that works on them.
        """

        def launch_all() -> None:
            for bucket in self.buckets:
                for launch in self._of(bucket):
                    launch()
            if launch_more is not None:
                launch_more(self._arena.view(self._result, self.buckets[0]))

        self._kernels.compile_all(self._kernels.collect(launch_all), on_progress)
        if launch_more is not None:  # kernels are loaded onto the device at their first launch
            launch_more(self._arena.view(self._result, self.buckets[0]))
        if self._use_graphs:
            for bucket in reversed(self.buckets):
                self._graph(bucket)

    def _of(self, bucket: Bucket) -> list[Launch]:
        found = self._launches.get(bucket)
        if found is None:

            def view(value: Value) -> torch.Tensor:
                return self._arena.view(value, bucket)

            found = list(self._launcher.prepare(bucket))
            found += [self._launcher.launch(one, view, bucket) for one in self._operations]
            self._launches[bucket] = found
        return found

    def _graph(self, bucket: Bucket) -> torch.cuda.CUDAGraph | None:
        found = self._graphs.get(bucket)
        if found is None:
            launches = self._of(bucket)
            # Once outside of a graph, to load the kernels. Computing a step twice gives the same result.
            for launch in launches:
                launch()
            found = self.captured(lambda: [launch() for launch in launches])
            if found is not None:
                self._graphs[bucket] = found
        return found
