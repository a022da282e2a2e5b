"""A GGUF file (or the parts of a split one), memory-mapped and checked. Interface; see the class docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.metadata import Metadata


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table. `shape` is numpy order: the fastest-varying dimension comes last."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # bytes from the start of its file
    nbytes: int
    part: int = 0  # which file of a split model


class GGUFFile:
    """Owns the mapping. Everything in it has been checked before the constructor returns.

    Raises InvalidModelFile (naming the key or tensor) or ModelNotFound; never anything else.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    version: int
    file_bytes: int  # of all parts

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, (nbytes,) uint8, a read-only view of the mapping."""
        raise NotImplementedError

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The same as (rows, row_bytes): every dimension but the last is a row."""
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
