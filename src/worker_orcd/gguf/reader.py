"""A GGUF file (or the parts of a split one), memory-mapped and checked.

The file is untrusted: any bytes give either a checked object or an error, in bounded time and memory. Nothing
of the tensors is read here. Where a file is shortened while it is open, the mapping loses its pages: whoever
reads tensors watches them (`kernels.pages`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InsufficientMemory, InvalidModelFile, ModelNotFound
from worker_orcd.gguf.metadata import Metadata, quoted
from worker_orcd.gguf.parse import HEADER_BYTES, Part, TensorInfo, parse
from worker_orcd.gguf.types import MAX_PARTS, MAX_TENSORS

__all__ = ["GGUFFile", "TensorInfo"]

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


class GGUFFile:
    """Owns the mapping. Everything in it has been checked before the constructor returns.

    Raises InvalidModelFile (naming the key or tensor), UnsupportedFormat (naming a tensor's type),
    ModelNotFound, or InsufficientMemory where this process may not map the file; never anything else.
    A split model is opened by its first part, `…-00001-of-0000N.gguf`; the others lie beside it.
    """

    path: Path
    metadata: Metadata  # of the first part
    tensors: Mapping[str, TensorInfo]  # in file order
    version: int
    file_bytes: int  # of all parts

    def __init__(self, path: Path) -> None:
        try:
            self._open(path)
        except MemoryError:
            raise InsufficientMemory(f"{quoted(path.name)}: its metadata does not fit into memory") from None

    def _open(self, path: Path) -> None:
        first_map, first, version = open_part(path, 0)
        maps, parts, paths, versions = [first_map], [first], [path], [version]
        for number, part_path in enumerate(other_parts(path, first.metadata), 2):
            part_map, part, version = open_part(part_path, number - 1)
            check_part(part_path, part.metadata, first.metadata, number)
            maps.append(part_map)
            parts.append(part)
            paths.append(part_path)
            versions.append(version)
        self.path = path
        self._paths = paths
        self.metadata = first.metadata
        self.version = first.version
        self.tensors = MappingProxyType(merge(path, parts))
        self.file_bytes = sum(len(part_map) for part_map in maps)
        self._maps = maps
        self._versions = versions

    @property
    def num_parts(self) -> int:
        """Files that it was opened from; 0 once it is closed."""
        return len(self._maps)

    def ranges(self) -> list[tuple[int, int]]:
        """Where the parts are mapped: address and bytes."""
        views = [np.frombuffer(mapping, np.uint8) for mapping in self._maps]
        return [(view.ctypes.data, view.nbytes) for view in views]

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, (nbytes,) uint8, a read-only view of the mapping."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InvalidModelFile(f"{quoted(self.path.name)}: tensor {quoted(name)} is missing")
        if not self._maps:
            raise ValueError("the file is closed")
        return np.frombuffer(self._maps[tensor.part], np.uint8, tensor.nbytes, tensor.offset)

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The same as (rows, row_bytes): every dimension but the last is a row."""
        data = self.data(name)
        shape = self.tensors[name].shape
        num_rows = 1
        for dim in shape[:-1]:
            num_rows *= dim
        return data.reshape(num_rows, -1)

    def check_unchanged(self) -> None:
        """Raises InvalidModelFile if somebody has written to the file since it was opened.

        What was read may be of either version then. Another file that has been put in its place is none of
        our business: the mapping is of the one that was opened.
        """
        for mapping, path, version in zip(self._maps, self._paths, self._versions, strict=True):
            changed = mapping.size() != len(mapping)
            with contextlib.suppress(OSError):  # its name is gone
                now = Version.of(path.stat())
                changed |= now.inode == version.inode and now != version
            if changed:
                raise InvalidModelFile(f"{quoted(path.name)}: the file was changed while it was loaded")

    def release(self, name: str, *, forget: bool = False) -> None:
        """Let the tensor's pages leave this process's memory; they are read again if somebody looks.

        `forget`: and the machine's page cache, where nobody else has them mapped, and but for the ends, which
        the system may keep in pieces (folios, up to 2 MiB) with what is next to them.
        """
        tensor = self.tensors[name]
        if not self._maps or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.offset + tensor.nbytes - start
        self._maps[tensor.part].madvise(mmap.MADV_DONTNEED, start, length)
        if forget and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint; the file may have been renamed since
                descriptor = os.open(self._paths[tensor.part], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Let go of the mapping. It lives on as long as a view of it does."""
        self._maps = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Version:
    """Of a file: which one it is and when it was written to."""

    inode: tuple[int, int]
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls((status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


def open_part(path: Path, part: int) -> tuple[mmap.mmap, Part, Version]:
    """Map one file and check it."""
    label = quoted(path.name)
    try:
        # Opening a pipe would wait for a writer without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        raise ModelNotFound(f"{label}: no such file") from None
    except OSError as error:
        raise InvalidModelFile(f"{label}: cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelFile(f"{label}: not a regular file")
        if status.st_size < HEADER_BYTES:
            raise InvalidModelFile(
                f"{label}: a GGUF file has at least {HEADER_BYTES} bytes, this one {status.st_size}"
            )
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:  # emptied since fstat
        raise InvalidModelFile(f"{label}: the file changed while it was opened") from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise InsufficientMemory(f"{label}: no room to map the file into memory") from None
        raise InvalidModelFile(f"{label}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    return mapping, parse(mapping, len(mapping), label, part), Version.of(status)


def other_parts(path: Path, metadata: Metadata) -> list[Path]:
    """Where the parts after the first lie; empty for a file that is not split."""
    label = quoted(path.name)
    count = metadata.integer("split.count", low=0, high=MAX_PARTS, default=1)
    number = metadata.integer("split.no", low=0, high=MAX_PARTS, default=0)
    name = PART_NAME.fullmatch(path.name)
    if number != 0:
        first = f"{name['stem']}-00001-of-{name['count']}.gguf" if name else "…-00001-of-….gguf"
        raise InvalidModelFile(
            f"{label}: this is part {number + 1} of {count}; open the first, {quoted(first)}"
        )
    if count <= 1:
        return []
    if not name or int(name["number"]) != 1 or int(name["count"]) != count:
        raise InvalidModelFile(
            f"{label}: the first of {count} parts must be named like 'model-00001-of-{count:05d}.gguf'"
        )
    return [path.with_name(f"{name['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]


def check_part(path: Path, metadata: Metadata, first: Metadata, number: int) -> None:
    """The split.* keys of a later part must agree with its name and with the first part."""
    expected = {"split.no": number - 1, "split.count": first.integer("split.count")}
    for key, value in expected.items():
        found = metadata.integer(key)
        if found != value:
            raise InvalidModelFile(f"{quoted(path.name)}: metadata key '{key}' is {found}, but needs {value}")


def merge(path: Path, parts: list[Part]) -> dict[str, TensorInfo]:
    """The tensors of all parts by name."""
    label = quoted(path.name)
    total = sum(len(part.tensors) for part in parts)
    if total > MAX_TENSORS:
        raise InvalidModelFile(f"{label}: its parts hold {total} tensors; at most {MAX_TENSORS} are allowed")
    announced = parts[0].metadata.optional_integer("split.tensors.count")
    if announced is not None and announced != total:
        raise InvalidModelFile(
            f"{label}: metadata key 'split.tensors.count' is {announced}, but there are {total} tensors"
        )
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise InvalidModelFile(f"{label}: tensor {quoted(tensor.name)} is in two parts")
            tensors[tensor.name] = tensor
    return tensors
