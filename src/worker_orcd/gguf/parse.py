"""Header, metadata and tensor table of one GGUF file, read from untrusted bytes.

Every count and length is compared with the bytes that are left before anything of that size is read or
allocated; sizes are Python integers, so nothing wraps. Errors are InvalidModelFile or UnsupportedFormat and
name the key or tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from worker_orcd.errors import InvalidModelFile, UnsupportedFormat
from worker_orcd.gguf.metadata import Metadata, Value, quoted
from worker_orcd.gguf.types import (
    DEFAULT_ALIGNMENT,
    DTYPES,
    LAYOUTS,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NESTED_ARRAYS,
    MAX_NESTING,
    MAX_STRING_BYTES,
    MAX_STRINGS,
    MAX_TENSORS,
    MIN_ALIGNMENT,
    TENSOR_TYPES,
    UNSUPPORTED_TENSOR_TYPES,
    VERSIONS,
    ValueType,
)

HEADER_BYTES = 24  # magic, version, number of tensors, number of keys
MIN_KEY_VALUE_BYTES = 14  # length, one character, type, one byte
MIN_TENSOR_BYTES = 33  # length, one character, number of dimensions, one of them, type, offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table. `shape` is numpy order: the fastest-varying dimension comes last."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # bytes from the start of its file
    nbytes: int
    part: int = 0  # which file of a split model


@dataclass(frozen=True, slots=True)
class Part:
    """What one file says."""

    version: int
    metadata: Metadata
    tensors: list[TensorInfo]


def parse(data: mmap.mmap | bytes, size: int, label: str, part: int = 0) -> Part:
    """Read and check everything but the tensors' contents. `label` names the file in messages."""
    cursor = Cursor(data, size, label)
    version, num_tensors, num_keys = read_header(cursor)
    metadata = read_metadata(cursor, num_keys)
    try:
        alignment = metadata.integer(
            "general.alignment", low=MIN_ALIGNMENT, high=MAX_ALIGNMENT, default=DEFAULT_ALIGNMENT
        )
    except InvalidModelFile as error:
        cursor.fail(str(error))
    if alignment & (alignment - 1):
        cursor.fail(f"metadata key 'general.alignment' is {alignment}, but needs a power of two")
    entries = [read_tensor(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    tensors = [place(cursor, entry, start, alignment, size, part) for entry in entries]
    check_distinct(cursor, tensors)
    return Part(version, metadata, tensors)


class Cursor:
    """A position in the bytes of a file. Reading past the end fails with what was being read."""

    def __init__(self, data: mmap.mmap | bytes, size: int, label: str) -> None:
        self.data = data
        self.label = label
        self.position = 0
        self.end = min(size, MAX_HEADER_BYTES)
        self.truncated = size <= MAX_HEADER_BYTES  # whether the file ends at `end`
        self.strings_left = MAX_STRINGS
        self.arrays_left = MAX_NESTED_ARRAYS

    def fail(self, message: str) -> NoReturn:
        raise InvalidModelFile(f"{self.label}: {message}")

    def need(self, num_bytes: int, what: str) -> None:
        left = self.end - self.position
        if num_bytes <= left:
            return
        if self.truncated:
            self.fail(f"{what} needs {num_bytes} bytes at byte {self.position}, but only {left} are left")
        self.fail(
            f"{what} ends after byte {self.position + num_bytes}, "
            f"but metadata and tensor table may take at most {MAX_HEADER_BYTES} bytes"
        )

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start = self.position
        self.position = start + num_bytes
        return self.data[start : self.position]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.u64(what)
        if length > limit:
            self.fail(f"{what} is {length} bytes long; at most {limit} are allowed")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8 (byte {error.start} of {length})")

    def strings(self, count: int, what: str) -> list[str]:
        self.strings_left -= count
        if self.strings_left < 0:
            self.fail(f"{what} has {count} strings; at most {MAX_STRINGS} are allowed in all arrays together")
        self.need(8 * count, what)
        data, position, end = self.data, self.position, self.end
        from_bytes = int.from_bytes
        found: list[str] = []
        for index in range(
            count
        ):  # a vocabulary has hundreds of thousands: nothing is called that need not be
            start = position + 8
            position = start + from_bytes(data[position:start], "little")
            if position > end or position - start > MAX_STRING_BYTES:
                self.position = start
                limit = min(MAX_STRING_BYTES, max(0, end - start))
                self.fail(
                    f"{what}, string {index}, has {position - start} bytes; at most {limit} are possible"
                )
            try:
                found.append(str(data[start:position], "utf-8"))
            except UnicodeDecodeError as error:
                self.fail(f"{what}, string {index}, is not valid UTF-8 (byte {error.start})")
        self.position = position
        return found


def read_header(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    if cursor.end < HEADER_BYTES:
        cursor.fail(f"a GGUF file has at least {HEADER_BYTES} bytes, this one {cursor.end}")
    magic = cursor.take(4, "magic number")
    if magic != MAGIC:
        cursor.fail(f"not a GGUF file: it starts with {magic!r} instead of {MAGIC!r}")
    version = cursor.u32("version")
    if version not in VERSIONS:
        hint = " (big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
        cursor.fail(f"GGUF version {version}{hint} is not supported; supported: 2 and 3, little-endian")
    num_tensors = cursor.u64("number of tensors")
    num_keys = cursor.u64("number of metadata keys")
    left = cursor.end - cursor.position
    most = min(MAX_KEYS, left // MIN_KEY_VALUE_BYTES)
    if num_keys > most:
        cursor.fail(f"the header announces {num_keys} metadata keys; at most {most} are possible")
    most = min(MAX_TENSORS, left // MIN_TENSOR_BYTES)
    if num_tensors > most:
        cursor.fail(f"the header announces {num_tensors} tensors; at most {most} are possible")
    return version, num_tensors, num_keys


def read_metadata(cursor: Cursor, num_keys: int) -> Metadata:
    values: dict[str, Value] = {}
    kinds: dict[str, ValueType] = {}
    for index in range(num_keys):
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        if not key:
            cursor.fail(f"metadata key {index} is empty")
        what = f"metadata key {quoted(key)}"
        if key in values:
            cursor.fail(f"{what} occurs twice")
        kinds[key] = value_type(cursor, what)
        values[key] = read_value(cursor, kinds[key], what)
    return Metadata(values, kinds)


def value_type(cursor: Cursor, what: str) -> ValueType:
    number = cursor.u32(what)
    try:
        return ValueType(number)
    except ValueError:
        cursor.fail(f"{what} has the unknown value type {number}; known: 0 to {max(ValueType)}")


def read_value(cursor: Cursor, kind: ValueType, what: str) -> Value:
    if kind is ValueType.STRING:
        return cursor.string(what)
    if kind is ValueType.ARRAY:
        return read_array(cursor, what, 1)
    if kind is ValueType.BOOL:
        (byte,) = cursor.take(1, what)
        if byte > 1:
            cursor.fail(f"{what} is a boolean stored as {byte}; allowed: 0 and 1")
        return byte == 1
    layout = LAYOUTS[kind]
    return layout.unpack(cursor.take(layout.size, what))[0]


def read_array(cursor: Cursor, what: str, depth: int) -> Value:
    kind = value_type(cursor, what)
    count = cursor.u64(what)
    if kind is ValueType.STRING:
        return list[Value](cursor.strings(count, what))
    if kind is ValueType.ARRAY:
        if depth == MAX_NESTING:
            cursor.fail(f"{what} nests arrays more than {MAX_NESTING} deep")
        cursor.arrays_left -= count
        if cursor.arrays_left < 0:
            cursor.fail(f"{what} has {count} arrays; at most {MAX_NESTED_ARRAYS} are allowed within arrays")
        return [read_array(cursor, what, depth + 1) for _ in range(count)]
    dtype = DTYPES[kind]
    cursor.need(count * dtype.itemsize, what)
    stored = np.uint8 if kind is ValueType.BOOL else dtype
    array = np.frombuffer(cursor.take(count * dtype.itemsize, what), stored)  # (count,), owns its bytes
    if kind is ValueType.BOOL and array.size and array.max() > 1:
        cursor.fail(f"{what} holds a boolean stored as {array.max()}; allowed: 0 and 1")
    return array.view(dtype)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the tensor table, its offset not yet placed."""

    name: str
    dims: tuple[int, ...]  # fastest-varying first
    ggml_type: int
    offset: int  # bytes from the start of the data


def read_tensor(cursor: Cursor) -> Entry:
    name = cursor.string("a tensor's name", MAX_KEY_BYTES)
    what = f"tensor {quoted(name)}"
    if not name:
        cursor.fail("a tensor has an empty name")
    num_dims = cursor.u32(what)
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {num_dims} dimensions; allowed: 1 to {MAX_DIMS}")
    dims: tuple[int, ...] = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, what))
    ggml_type, offset = struct.unpack("<IQ", cursor.take(12, what))
    if 0 in dims or math.prod(dims) >= 2**63:
        cursor.fail(f"{what} has dimensions {dims}; each must be at least 1 and their product below 2^63")
    return Entry(name, dims, ggml_type, offset)


def place(cursor: Cursor, entry: Entry, start: int, alignment: int, size: int, part: int) -> TensorInfo:
    """Check that the tensor is of a known type, of whole blocks, aligned, and within the file."""
    what = f"tensor {quoted(entry.name)}"
    kind = TENSOR_TYPES.get(entry.ggml_type)
    if kind is None:
        found = UNSUPPORTED_TENSOR_TYPES.get(entry.ggml_type, "unknown")
        supported = ", ".join(f"{known.name} ({number})" for number, known in TENSOR_TYPES.items())
        raise UnsupportedFormat(
            f"{cursor.label}: {what} has type {entry.ggml_type} ({found}); supported: {supported}"
        )
    if entry.dims[0] % kind.block_size:
        cursor.fail(f"{what} has rows of {entry.dims[0]}; {kind.name} needs a multiple of {kind.block_size}")
    if entry.offset % alignment:
        cursor.fail(f"{what} has offset {entry.offset}, which is not a multiple of the alignment {alignment}")
    nbytes = math.prod(entry.dims) // kind.block_size * kind.type_size
    offset = start + entry.offset
    if offset + nbytes > size:
        cursor.fail(f"{what} ends at byte {offset + nbytes}, but the file has {size}; it may be truncated")
    return TensorInfo(entry.name, entry.dims[::-1], entry.ggml_type, offset, nbytes, part)


def check_distinct(cursor: Cursor, tensors: list[TensorInfo]) -> None:
    """No two tensors of a file share a name or a byte."""
    names: set[str] = set()
    end, last = 0, ""
    for tensor in tensors:
        if tensor.name in names:
            cursor.fail(f"tensor {quoted(tensor.name)} occurs twice")
        names.add(tensor.name)
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            cursor.fail(f"tensors {quoted(last)} and {quoted(tensor.name)} overlap at byte {tensor.offset}")
        end, last = tensor.offset + tensor.nbytes, tensor.name
