"""Writes GGUF files (version 3, little-endian) in bounded memory.

Metadata is kept until `write`; tensors given as iterables are taken piece by piece while writing, so a file
may be much larger than memory. What is written is what `reader` accepts; misuse raises ValueError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.types import (
    DEFAULT_ALIGNMENT,
    DTYPES,
    LAYOUTS,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MIN_ALIGNMENT,
    TENSOR_TYPES,
    VERSIONS,
    ValueType,
)

Piece = bytes | NDArray[Any]
Written = bool | int | float | str | NDArray[Any] | Sequence["Written"]  # a value, as given

VALUE_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor whose bytes are still to come."""

    name: str
    shape: tuple[int, ...]  # numpy order
    ggml_type: int
    nbytes: int
    pieces: Iterable[Piece]


class GGUFWriter:
    """Owns a file in the making. As a context manager it writes at the end of the block, unless that failed.

    The file appears under its name only when it is complete.
    """

    def __init__(self, path: Path, *, alignment: int = DEFAULT_ALIGNMENT, version: int = 3) -> None:
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(
                f"alignment is {alignment}; needs a power of two, {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
            )
        if version not in VERSIONS:
            raise ValueError(f"version is {version}; allowed: {VERSIONS}")
        self._path = path
        self._alignment = alignment
        self._version = version
        self._values: dict[str, bytes] = {}
        self._tensors: dict[str, Pending] = {}
        if alignment != DEFAULT_ALIGNMENT:
            self.add("general.alignment", alignment, ValueType.UINT32)

    def add(self, key: str, value: Written, kind: ValueType | None = None) -> None:
        """Add a metadata value.

        `kind` is the stored type of a scalar or of a list's items. Without it: BOOL, FLOAT32, the first of
        UINT32, INT32, UINT64, INT64 that holds an integer; a numpy array's own type. Numbers in a list must
        be of one type, and so need `kind` or a numpy array.
        """
        if not key or key in self._values:
            raise ValueError(f"metadata key {quoted(key)} is empty or was added before")
        number, encoded = encode(value, kind)
        self._values[key] = encode_string(key) + struct.pack("<I", number) + encoded

    def add_tensor(
        self, name: str, shape: Sequence[int], ggml_type: int, data: Piece | Iterable[Piece]
    ) -> None:
        """Add a tensor of `shape` (numpy order) whose bytes are `data`, or its pieces joined."""
        what = f"tensor {quoted(name)}"
        if not name or name in self._tensors:
            raise ValueError(f"{what}: its name is empty or was added before")
        kind = TENSOR_TYPES.get(ggml_type)
        if kind is None:
            raise ValueError(f"{what} has type {ggml_type}; allowed: {sorted(TENSOR_TYPES)}")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % kind.block_size:
            raise ValueError(
                f"{what} has shape {tuple(shape)}; needs 1 to {MAX_DIMS} positive dimensions, "
                f"the last a multiple of {kind.block_size}"
            )
        nbytes = math.prod(shape) // kind.block_size * kind.type_size
        self._tensors[name] = Pending(name, tuple(shape), ggml_type, nbytes, pieces_of(data))

    def write(self) -> None:
        """Write the file. Raises ValueError where a tensor's data have the wrong size, and OSError."""
        partial = self._path.with_name(self._path.name + ".partial")
        try:
            with partial.open("wb") as file:
                self._write_header(file)
                for tensor in self._tensors.values():
                    self._pad(file)
                    write_tensor(file, tensor)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _write_header(self, file: BinaryIO) -> None:
        file.write(MAGIC + struct.pack("<IQQ", self._version, len(self._tensors), len(self._values)))
        file.writelines(self._values.values())
        offset = 0
        for tensor in self._tensors.values():
            dims = tensor.shape[::-1]
            file.write(encode_string(tensor.name))
            file.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.ggml_type, offset))
            offset += -(-tensor.nbytes // self._alignment) * self._alignment

    def _pad(self, file: BinaryIO) -> None:
        file.write(bytes(-file.tell() % self._alignment))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.write()


def pieces_of(data: Piece | Iterable[Piece]) -> Iterable[Piece]:
    if isinstance(data, np.ndarray):
        return (cast("NDArray[Any]", data),)
    return (data,) if isinstance(data, bytes) else data


def write_tensor(file: BinaryIO, tensor: Pending) -> None:
    written = 0
    for piece in tensor.pieces:
        view = memoryview(piece) if isinstance(piece, bytes) else np.ascontiguousarray(piece).data
        written += view.nbytes
        if written > tensor.nbytes:
            break
        file.write(view)
    if written != tensor.nbytes:
        more = " or more" if written > tensor.nbytes else ""
        raise ValueError(
            f"tensor {quoted(tensor.name)} gave {written}{more} bytes, but needs {tensor.nbytes}"
        )


def encode_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def encode(value: Written, kind: ValueType | None) -> tuple[ValueType, bytes]:
    """The value type and the bytes after it."""
    if isinstance(value, str):
        return ValueType.STRING, encode_string(value)
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value).reshape(-1)
        array = array.astype(DTYPES[kind] if kind is not None else array.dtype.newbyteorder("<"))
        item = VALUE_TYPES[array.dtype]
        return ValueType.ARRAY, struct.pack("<IQ", item, array.size) + array.tobytes()
    if isinstance(value, bool | int | float):
        kind = scalar_type(value) if kind is None else kind
        return kind, encode_scalar(value, kind)
    return ValueType.ARRAY, encode_list(value, kind)


def encode_scalar(value: bool | int | float, kind: ValueType) -> bytes:
    layout = LAYOUTS.get(kind)
    try:
        if layout is not None and (kind is ValueType.BOOL) == isinstance(value, bool):
            return layout.pack(value)
    except (struct.error, OverflowError):
        pass
    raise ValueError(f"{value!r} cannot be stored as {kind.name}")


def encode_list(items: Sequence[Written], kind: ValueType | None) -> bytes:
    encoded = [encode(item, kind) for item in items]
    kinds = {item_kind for item_kind, _ in encoded} or {ValueType.STRING if kind is None else kind}
    if len(kinds) != 1:
        raise ValueError(f"an array must hold one kind of value, not {sorted(kind.name for kind in kinds)}")
    return struct.pack("<IQ", kinds.pop(), len(items)) + b"".join(data for _, data in encoded)


def scalar_type(value: bool | int | float) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, float):
        return ValueType.FLOAT32
    for kind in (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64):
        bits = 8 * LAYOUTS[kind].size
        low, high = (0, 2**bits) if kind.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        if low <= value < high:
            return kind
    raise ValueError(f"the integer {value} does not fit into 64 bits")
