"""Writes a GGUF file anew with its matrices in the types of a mixture; everything else stays as it is.

Tensors are read, converted and written a piece at a time, so a file may be larger than memory. A tensor that
has its type already is copied. Metadata keep their order and the way they are stored; `general.file_type` and
`general.quantization_version` say what the new file is, and a split file becomes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.mixture import MIXTURES, Network, tensor_type
from worker_orcd.gguf.pieces import Make, PieceStream, Progress, pieces_of_rows
from worker_orcd.gguf.reader import GGUFFile, TensorInfo
from worker_orcd.gguf.types import DEFAULT_ALIGNMENT, ValueType
from worker_orcd.gguf.writer import GGUFWriter, Written
from worker_orcd.quant import BY_NAME, FORMATS, WeightFormat

PIECE_WEIGHTS = 1 << 20
STAGE = "quantising"
QUANTIZATION_VERSION = 2  # of ggml's blocks; all files since 2023 have it

_FLOATS = ("F32", "F16", "BF16")
_LARGEST_HALF = 65504.0  # most formats keep their scales in a float16
_LARGEST_FLOAT = 3.38e38  # what a bfloat16 can hold
_REPLACED = ("general.file_type", "general.quantization_version", "general.alignment")
_MAX_COUNT = 1 << 20


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file, and the format it will have."""

    info: TensorInfo
    source: WeightFormat
    target: WeightFormat

    @property
    def nbytes(self) -> int:
        return self.target.row_bytes(math.prod(self.info.shape))

    @property
    def loses_twice(self) -> bool:
        """Whether rounded weights are rounded once more."""
        kept = self.target is self.source or self.target.name in _FLOATS
        return not kept and self.source.name not in _FLOATS


def plan(file: GGUFFile, mixture: str) -> list[PlannedTensor]:
    """What `requantize` will write, in file order. `mixture`: a key of `gguf.mixture.MIXTURES`."""
    network = _network(file)
    planned: list[PlannedTensor] = []
    for info in file.tensors.values():
        source = FORMATS[info.ggml_type]
        name = tensor_type(mixture, info.name, info.shape, network)
        planned.append(PlannedTensor(info, source, BY_NAME[name] if name else source))
    return planned


def tensor_bytes(planned: list[PlannedTensor]) -> int:
    return sum(tensor.nbytes for tensor in planned)


def requantize(
    file: GGUFFile,
    path: Path,
    mixture: str,
    *,
    threads: int = 2,
    on_progress: Progress | None = None,
) -> list[PlannedTensor]:
    """Write `file` to `path`, which appears when it is whole.

    Raises InvalidModelFile for weights that are not finite or too large, and OSError. `on_progress` is called
    on this thread.
    """
    planned = plan(file, mixture)
    alignment = file.metadata.integer("general.alignment", default=DEFAULT_ALIGNMENT)
    writer = GGUFWriter(path, alignment=alignment)
    _copy_metadata(file, writer, mixture)
    jobs = (job for tensor in planned for job in _jobs(file, tensor))
    total = tensor_bytes(planned)
    with PieceStream(jobs, threads=threads, stage=STAGE, total=total, on_progress=on_progress) as stream:
        for tensor in planned:
            info = tensor.info
            pieces = _released(stream.take(tensor.nbytes), file, info.name)
            writer.add_tensor(info.name, info.shape, tensor.target.ggml_type, pieces)
        writer.write()
    return planned


def _network(file: GGUFFile) -> Network:
    """What the rules of mixtures ask. A file that does not say has one head and no experts."""
    metadata = file.metadata
    architecture = metadata.string("general.architecture", default="")

    def count(key: str, default: int) -> int:
        found = metadata.raw(f"{architecture}.{key}")
        return found if isinstance(found, int) and 0 < found <= _MAX_COUNT else default

    heads = count("attention.head_count", 1)
    return Network(
        num_layers=count("block_count", 1),
        num_heads=heads,
        num_kv_heads=min(heads, count("attention.head_count_kv", heads)),
        num_experts=count("expert_count", 0),
        tied="output.weight" not in file.tensors,
    )


def _copy_metadata(file: GGUFFile, writer: GGUFWriter, mixture: str) -> None:
    metadata = file.metadata
    for key in metadata:
        value = metadata.raw(key)
        if value is None or key in _REPLACED or key.startswith("split."):
            continue
        kind = metadata.kind(key)
        scalar = isinstance(value, bool | int | float)
        writer.add(key, cast("Written", value), kind if scalar else None)
    writer.add("general.quantization_version", QUANTIZATION_VERSION, ValueType.UINT32)
    writer.add("general.file_type", MIXTURES[mixture], ValueType.UINT32)


def _jobs(file: GGUFFile, tensor: PlannedTensor) -> Iterator[Make]:
    """Each makes the bytes of some rows."""
    rows = file.rows(tensor.info.name)  # (n, row bytes)
    at_once = max(1, PIECE_WEIGHTS // tensor.info.shape[-1])
    for part in pieces_of_rows(len(rows), at_once):
        yield partial(_convert, rows[part], tensor)


def _convert(rows: NDArray[np.uint8], tensor: PlannedTensor) -> NDArray[np.uint8]:
    """(n, row bytes) -> (n, row bytes of the target)."""
    if tensor.target is tensor.source:
        return rows.copy()  # read here, where it holds up no other piece
    weights = tensor.source.dequantize_rows(rows)
    largest = max(float(weights.max()), -float(weights.min()))  # NaN, if there is one
    most = _LARGEST_FLOAT if tensor.target.name in ("F32", "BF16", "MXFP4") else _LARGEST_HALF
    if not largest <= most:
        raise InvalidModelFile(
            f"tensor {quoted(tensor.info.name)} has a weight of {largest:g}; "
            f"{tensor.target.name} needs numbers up to {most:g} in size"
        )
    return tensor.target.quantize_rows(weights)


def _released(pieces: Iterator[NDArray[np.uint8]], file: GGUFFile, name: str) -> Iterator[NDArray[np.uint8]]:
    """The pieces; after them, the tensor's pages need not stay in memory."""
    yield from pieces
    file.release(name)
