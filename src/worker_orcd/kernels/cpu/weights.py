"""Weight matrices in the layout of the native kernels: re-arranged once at load, a lossless move of bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One (n, k) matrix of each expert, end to end, each padded to whole panels."""

    ggml_type: int
    n: int
    k: int
    data: NDArray[np.uint8]
    bias: NDArray[np.float32] | None  # (num_experts, n)


@dataclass(frozen=True, slots=True)
class NativeExperts:
    """What `expert_linear` multiplies by: one output a part."""

    parts: tuple[PackedExperts, ...]
    num_experts: int

    @property
    def k(self) -> int:
        return self.parts[0].k


@dataclass(frozen=True, slots=True)
class _Job:
    """Some rows, as the file has them, and where they go."""

    rows: NDArray[np.uint8]
    panel_row: int  # of the first, in the packed matrix
    target: NDArray[np.uint8]


def pack_matrices(
    library: Library, parts: Sequence[Matrix], bias: Sequence[NDArray[np.float32] | None], threads: int
) -> NativeWeight:
    """Pack matrices with equal k. Neighbours of one format become one matrix where panels allow.

    Raises UnsupportedFormat naming the tensor, InsufficientMemory, or Internal for parts that do not fit.
    """
    _check_k(parts)
    joined = join_bias(parts, bias)
    packed: list[PackedMatrix] = []
    column = 0
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for run in _runs_of_one_format(parts):
            packed.append(_pack_run(library, run, column, pool))
            column += packed[-1].n
    return NativeWeight(tuple(packed), None if joined is None else joined.numpy())


def pack_experts(
    library: Library,
    parts: Sequence[Matrix],
    num_experts: int,
    bias: Sequence[NDArray[np.float32] | None],
    threads: int,
) -> NativeExperts:
    """Pack the matrices of all experts, which lie one below the other in a part's data.

    Raises as `pack_matrices` does.
    """
    _check_k(parts)
    if bias and len(bias) != len(parts):
        raise Internal(f"{len(bias)} biases for {len(parts)} stacks of matrices")
    packed: list[PackedExperts] = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for part, values in zip(parts, bias or [None] * len(parts), strict=True):
            own = None if values is None else np.array(values, dtype=np.float32, order="C")
            if part.data.shape[0] != num_experts * part.n or (
                own is not None and own.shape != (num_experts, part.n)
            ):
                raise Internal(
                    f"tensor {part.name} or its bias is not of {num_experts} experts of {part.n} rows"
                )
            data = _pack_stack(library, part, num_experts, pool)
            packed.append(PackedExperts(part.format.ggml_type, part.n, part.k, data, own))
    return NativeExperts(tuple(packed), num_experts)


def _check_k(parts: Sequence[Matrix]) -> None:
    if not parts or any(part.k != parts[0].k for part in parts):
        raise Internal(f"matrices side by side need one k; these have {[part.k for part in parts]}")


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
    n = sum(part.n for part in run)
    target = aligned_zeros(_packed_bytes(library, first, n), f"the weights of tensor {first.name}")
    jobs: list[_Job] = []
    above = 0
    for part in run:
        jobs += _jobs(part, part.data, target, above)
        above += part.n
    _pack(library, first, n, jobs, pool)
    return PackedMatrix(first.format.ggml_type, n, first.k, target, column)


def _pack_stack(
    library: Library, part: Matrix, num_experts: int, pool: ThreadPoolExecutor
) -> NDArray[np.uint8]:
    """The packed matrices of all experts, end to end."""
    size = _packed_bytes(library, part, part.n)
    target = aligned_zeros(num_experts * size, f"the weights of tensor {part.name}")
    jobs: list[_Job] = []
    for expert in range(num_experts):
        rows = part.data[expert * part.n : (expert + 1) * part.n]
        jobs += _jobs(part, rows, target[expert * size : (expert + 1) * size], 0)
    _pack(library, part, part.n, jobs, pool)
    return target


def _packed_bytes(library: Library, part: Matrix, n: int) -> int:
    size = library.packed_bytes(part.format.ggml_type, n, part.k)
    if size is None:
        raise UnsupportedFormat(
            f"tensor {part.name} is {part.format.name} of {n} x {part.k}; "
            "the CPU backend has no kernel for that"
        )
    return size


def _jobs(part: Matrix, rows: NDArray[np.uint8], target: NDArray[np.uint8], above: int) -> Iterator[_Job]:
    """Pieces of `rows`, which go below the `above` rows of the packed matrix at `target`."""
    step = max(_PANEL, _JOB_BYTES // part.format.row_bytes(part.k) // _PANEL * _PANEL)
    for begin in range(0, len(rows), step):
        yield _Job(rows[begin : begin + step], above + begin, target)


def _pack(library: Library, part: Matrix, n: int, jobs: Sequence[_Job], pool: ThreadPoolExecutor) -> None:
    """Run the jobs of (n, k) matrices in the format of `part`."""

    def run(job: _Job) -> bool:
        rows = np.ascontiguousarray(job.rows)
        where = (job.panel_row, rows.shape[0])
        return library.pack(
            part.format.ggml_type, (n, part.k), where, rows.ctypes.data, job.target.ctypes.data
        )

    if not all(pool.map(run, jobs)):
        raise Internal(f"tensor {part.name} could not be packed")
