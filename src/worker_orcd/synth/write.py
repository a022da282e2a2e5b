"""Streams a made-up model to disk: several threads make blocks, one writes them, some megabytes at a time.

Each piece of a tensor has a generator of its own, seeded by (seed, number of the piece): the file's bytes
depend on the seed, the shape and the mixture, not on the threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.mixture import Network, tensor_type
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.quant import BY_NAME
from worker_orcd.synth.blocks import random_blocks
from worker_orcd.synth.metadata import metadata
from worker_orcd.synth.shapes import Shape
from worker_orcd.synth.tensors import TensorSpec, tensor_specs

PIECE_BYTES = 8 << 20
STAGE = "writing random weights"

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor and the type that the mixture gives it."""

    spec: TensorSpec
    type_name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Piece:
    number: int  # in the file
    tensor: PlannedTensor
    num_blocks: int


def plan(shape: Shape, mixture: str) -> list[PlannedTensor]:
    """What a file of `shape` holds in `mixture` (a key of `gguf.mixture.MIXTURES`), in file order."""
    network = Network(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        num_experts=shape.num_experts,
        tied=shape.tied,
    )
    planned: list[PlannedTensor] = []
    for spec in tensor_specs(shape):
        name = tensor_type(mixture, spec.name, spec.shape, network) or "F32"
        planned.append(PlannedTensor(spec, name, BY_NAME[name].row_bytes(math.prod(spec.shape))))
    return planned


def tensor_bytes(planned: list[PlannedTensor]) -> int:
    return sum(tensor.nbytes for tensor in planned)


def write_model(
    path: Path,
    shape: Shape,
    name: str,
    mixture: str,
    *,
    seed: int = 0,
    threads: int = 2,
    on_progress: Progress | None = None,
) -> list[PlannedTensor]:
    """Write the file; it appears at `path` only when it is whole. Raises OSError.

    `name` is what the model is called; `on_progress` is called on this thread.
    """
    planned = plan(shape, mixture)
    writer = GGUFWriter(path)
    for key, value in metadata(shape, name, mixture).items():
        writer.add(key, value)
    with ThreadPoolExecutor(threads, thread_name_prefix="synth") as pool:
        ready = _made(pool, list(_pieces(planned)), seed, 2 * threads)
        done = _Done(tensor_bytes(planned), on_progress)
        for tensor in planned:
            number = BY_NAME[tensor.type_name].ggml_type
            writer.add_tensor(tensor.spec.name, tensor.spec.shape, number, _taken(ready, tensor, done))
        try:
            writer.write()
        finally:
            ready.close()
    return planned


class _Done:
    """How many bytes have been handed over."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self._done, self._total, self._report = 0, total, report

    def add(self, count: int) -> None:
        self._done += count
        if self._report is not None:
            self._report(STAGE, self._done, self._total)


def _taken(
    ready: Iterator[NDArray[np.uint8]], tensor: PlannedTensor, done: _Done
) -> Iterator[NDArray[np.uint8]]:
    """The pieces of one tensor, which is written after those before it."""
    left = tensor.nbytes
    while left:
        piece = next(ready)
        left -= piece.nbytes
        yield piece
        done.add(piece.nbytes)


def _pieces(planned: list[PlannedTensor]) -> Iterator[_Piece]:
    number = 0
    for tensor in planned:
        weight_format = BY_NAME[tensor.type_name]
        left = tensor.nbytes // weight_format.type_size
        at_most = PIECE_BYTES // weight_format.type_size
        while left:
            size = min(left, at_most)
            yield _Piece(number, tensor, size)
            number, left = number + 1, left - size


def _made(
    pool: ThreadPoolExecutor, pieces: list[_Piece], seed: int, ahead: int
) -> Generator[NDArray[np.uint8]]:
    """The pieces' bytes in order, at most `ahead` of them made before they are asked for."""
    futures: deque[Future[NDArray[np.uint8]]] = deque()
    try:
        for piece in pieces:
            futures.append(pool.submit(_make, piece, seed))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _make(piece: _Piece, seed: int) -> NDArray[np.uint8]:
    """(num_blocks, type_size)."""
    spec = piece.tensor.spec
    if spec.values is not None:
        return spec.values.astype("<f4").view(np.uint8).reshape(-1, 4)
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, piece.number))))
    return random_blocks(piece.tensor.type_name, generator, piece.num_blocks, spec.std, spec.mean)
