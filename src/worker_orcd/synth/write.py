"""Streams a made-up model to disk: several threads make blocks, one writes them, some megabytes at a time.

Each piece of a tensor has a generator of its own, seeded by (seed, number of the piece): the file's bytes
depend on the seed, the shape and the mixture, not on the threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.mixture import Network, tensor_type
from worker_orcd.gguf.pieces import PieceStream, Progress, pieces_of_rows
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.quant import BY_NAME
from worker_orcd.synth.blocks import random_blocks
from worker_orcd.synth.metadata import metadata
from worker_orcd.synth.shapes import Shape
from worker_orcd.synth.tensors import TensorSpec, tensor_specs

PIECE_BYTES = 8 << 20
STAGE = "writing random weights"


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
    jobs = (partial(_make, piece, seed) for piece in _pieces(planned))
    total = tensor_bytes(planned)
    with PieceStream(jobs, threads=threads, stage=STAGE, total=total, on_progress=on_progress) as stream:
        for tensor in planned:
            number = BY_NAME[tensor.type_name].ggml_type
            writer.add_tensor(tensor.spec.name, tensor.spec.shape, number, stream.take(tensor.nbytes))
        writer.write()
    return planned


def _pieces(planned: list[PlannedTensor]) -> Iterator[_Piece]:
    number = 0
    for tensor in planned:
        weight_format = BY_NAME[tensor.type_name]
        num_blocks = tensor.nbytes // weight_format.type_size
        for part in pieces_of_rows(num_blocks, PIECE_BYTES // weight_format.type_size):
            yield _Piece(number, tensor, part.stop - part.start)
            number += 1


def _make(piece: _Piece, seed: int) -> NDArray[np.uint8]:
    """(num_blocks, type_size)."""
    spec = piece.tensor.spec
    if spec.values is not None:
        return spec.values.astype("<f4").view(np.uint8).reshape(-1, 4)
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, piece.number))))
    return random_blocks(piece.tensor.type_name, generator, piece.num_blocks, spec.std, spec.mean)
