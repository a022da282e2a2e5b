"""Weight matrices in the layout of the native kernels: re-arranged once at load, a lossless move of bits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import Internal, UnsupportedFormat
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cpu.inputs import join_bias
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.kernels.cpu.program import aligned_zeros

_JOB_BYTES = 1 << 20  # of the source that one job re-arranges
_PANEL = 16  # rows that are packed together


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """(n, k) weights of one format; its outputs begin at `column` of the weight's."""

    ggml_type: int
    n: int
    k: int
    data: NDArray[np.uint8]
    column: int


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """What `linear` multiplies by: matrices side by side, and their bias."""

    parts: tuple[PackedMatrix, ...]
    bias: NDArray[np.float32] | None  # (n,)

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k


def pack_matrices(
    library: Library, parts: Sequence[Matrix], bias: Sequence[NDArray[np.float32] | None], threads: int
) -> NativeWeight:
    """Pack matrices with equal k. Neighbours of one format become one matrix where panels allow.

    Raises UnsupportedFormat naming the tensor, InsufficientMemory, or Internal for parts that do not fit.
    """
    if not parts or any(part.k != parts[0].k for part in parts):
        raise Internal(f"matrices side by side need one k; these have {[part.k for part in parts]}")
    joined = join_bias(parts, bias)
    packed: list[PackedMatrix] = []
    column = 0
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for run in _runs_of_one_format(parts):
            packed.append(_pack_run(library, run, column, pool))
            column += packed[-1].n
    return NativeWeight(tuple(packed), None if joined is None else joined.numpy())


def _runs_of_one_format(parts: Sequence[Matrix]) -> list[list[Matrix]]:
    """Neighbours of one format, as long as each but the last of a run fills its panels."""
    runs: list[list[Matrix]] = []
    for part in parts:
        if runs and runs[-1][-1].format is part.format and runs[-1][-1].n % _PANEL == 0:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _pack_run(library: Library, run: Sequence[Matrix], column: int, pool: ThreadPoolExecutor) -> PackedMatrix:
    """One packed matrix of all parts of `run`, one below the other."""
    first = run[0]
    shape = (sum(part.n for part in run), first.k)
    size = library.packed_bytes(first.format.ggml_type, *shape)
    if size is None:
        raise UnsupportedFormat(
            f"tensor {first.name} is {first.format.name} of {shape[0]} x {shape[1]}; "
            "the CPU backend has no kernel for that"
        )
    target = aligned_zeros(size, f"the weights of tensor {first.name}")
    step = max(_PANEL, _JOB_BYTES // first.format.row_bytes(first.k) // _PANEL * _PANEL)

    def pack_rows(job: tuple[Matrix, int, int]) -> bool:
        part, begin, panel_row = job
        rows = np.ascontiguousarray(part.data[begin : begin + step])
        where = (panel_row, rows.shape[0])
        return library.pack(first.format.ggml_type, shape, where, rows.ctypes.data, target.ctypes.data)

    jobs: list[tuple[Matrix, int, int]] = []
    above = 0
    for part in run:
        jobs += [(part, begin, above + begin) for begin in range(0, part.n, step)]
        above += part.n
    if not all(pool.map(pack_rows, jobs)):
        raise Internal(f"tensor {first.name} could not be packed")
    return PackedMatrix(first.format.ggml_type, *shape, target, column)
