"""
Weights on a GPU: packed, a buffer a matrix.

Rows go from the file's mapping through a pinned buffer to the device and are packed there, a tensor at a
time: beside the weights, that tensor as the file has it is the most that is alive; twice, where its rows
change places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.errors import Internal, UnsupportedFormat
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.hands import Hands
from worker_orcd.kernels.cuda.repack import Places, places_of, repack
from worker_orcd.kernels.cuda.variants import Shape, shape_of
from worker_orcd.quant import BY_NAME
from worker_orcd.quant.gpu_layout import TILE, GpuLayout

MAX_UNPACKED = 256  # outputs of a float32 matrix, a router's, that is multiplied by without tensor cores
GROUP = 8  # rows of gates, and of what goes with them, that alternate
STAGING_BYTES = 32 << 20  # of each of two buffers
MAX_EXPONENT = 128  # of MXFP4's bytes: scales up to 2. Beyond, bfloat16 cannot hold what the kernels need

_ZEROS = {"Q4_0": 8, "Q5_0": 16}  # formats that Q8_0 holds, a scale and 32 codes too; the code of zero
_SMALL = 1 << 22  # weights
_HALF = 16  # weights of a block of theirs

_WORDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The sections of `quant.gpu_layout`, as views of one buffer."""

    shape: Shape
    n: int
    words: torch.Tensor
    high: torch.Tensor  # `words` where there are none: a kernel must be given something
    headers: torch.Tensor  # likewise
    shifts: torch.Tensor  # (2, 64) uint16: how far a row's bits are up in its high word, its last header word
    paired: bool = False  # rows have been put in another order: see `alternate`
    head: int = 0  # likewise, within each head of so many rows

    @property
    def num_bytes(self) -> int:
        return self.words.untyped_storage().nbytes()

    @property
    def operand(self) -> torch.dtype:
        """What activations must be."""
        return torch.bfloat16 if self.shape.operand == "bf16" else torch.float16


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A matrix whose outputs begin at `column` of its weight's."""

    weight: PackedMatrix | torch.Tensor  # a small float32 matrix (n, k) is not packed
    bias: torch.Tensor | None  # (n,) float32, in the order of the rows
    column: int
    n: int


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """What `linear` multiplies by: matrices side by side, one for each run of parts in the same format."""

    parts: tuple[WeightPart, ...]
    n: int
    k: int

    @property
    def table(self) -> PackedMatrix:
        """Of an embedding, which is one packed matrix."""
        (part,) = self.parts
        if not isinstance(part.weight, PackedMatrix):
            raise Internal("an embedding is packed")
        return part.weight


def check(matrix: Matrix, hands: Hands | None = None) -> GpuLayout:
    """How the matrix will lie. Raises UnsupportedFormat where the backend cannot compute with it.

    `hands`: who reads what must be read of it for that.
    """
    layout = matrix.format.gpu
    if layout is None:
        raise UnsupportedFormat(
            f"{matrix.name} is {matrix.format.name}; the CUDA backend has no kernel for it"
        )
    if matrix.format.name == "MXFP4":
        largest = (hands or Hands(1)).largest(matrix.data.reshape(-1, matrix.format.type_size), 0)
        if largest > MAX_EXPONENT:
            raise UnsupportedFormat(
                f"{matrix.name} has a block with scale exponent {largest}; the CUDA backend computes with at"
                f" most {MAX_EXPONENT}"
            )
    return layout


def pack(matrix: Matrix, step: int = 0) -> tuple[Shape, NDArray[np.uint8]]:
    """The matrix as kernels want it, in host memory; `step` is for experiments. Raises UnsupportedFormat."""
    layout = check(matrix)
    shape = shape_of(matrix.format.name, matrix.n, matrix.k, step)
    return shape, layout.pack(matrix.data, matrix.k, shape.step)


def can_pair(parts: Sequence[Matrix]) -> bool:
    """Whether rows can alternate: of a matrix of gates and what goes with them, or of a matrix of each."""
    alike = all((part.format, part.n) == (parts[0].format, parts[0].n) for part in parts)
    return alike and len(parts) <= 2 and sum(part.n for part in parts) % (2 * GROUP) == 0


def alike(parts: Sequence[Matrix]) -> Sequence[Matrix]:
    """Small matrices of several formats as Q8_0, where that loses nothing, so that one product has them all.

    What a small matrix takes is a launch, not its bytes.
    """
    names = {part.format.name for part in parts}
    if len(names) == 1 or not names <= {"Q8_0", *_ZEROS} or sum(part.n * part.k for part in parts) > _SMALL:
        return parts
    return [part if part.format.name == "Q8_0" else as_q8_0(part) for part in parts]


def as_q8_0(matrix: Matrix) -> Matrix:
    """The same weights, bit for bit, in blocks of a scale and 32 bytes."""
    check(matrix)
    blocks = matrix.data.reshape(matrix.n, -1, matrix.format.type_size)
    halves = blocks[..., -_HALF:]  # of each byte the low bits of a code, and of that so many further on
    rows = np.empty((*blocks.shape[:2], 2 + 2 * _HALF), np.uint8)
    rows[..., :2] = blocks[..., :2]
    codes = rows[..., 2:]
    np.bitwise_and(halves, 15, out=codes[..., :_HALF])
    np.right_shift(halves, 4, out=codes[..., _HALF:])
    if matrix.format.name == "Q5_0":  # whose high bits stand between scale and halves
        codes |= np.unpackbits(blocks[..., 2:-_HALF], axis=-1, bitorder="little") << np.uint8(4)
    codes -= np.uint8(_ZEROS[matrix.format.name])
    rows = rows.reshape(matrix.n, -1)
    return replace(matrix, format=BY_NAME["Q8_0"], data=rows)


def alternate(rows: torch.Tensor, length: int = 0) -> torch.Tensor:
    """Of (n, …), the first half of which are gates: eight of them, then the eight that go with them.

    So a kernel's program has both and can finish the gated unit. With `length` the same in each run of so
    many rows, a head's: what is rotated together is together.
    """
    runs = rows.view(-1, 2, (length or len(rows)) // (2 * GROUP), GROUP, *rows.shape[1:])
    return runs.transpose(1, 2).reshape(rows.shape)


def upload(
    shape: Shape,
    n: int,
    packed: torch.Tensor,
    *,
    paired: bool = False,
    head: int = 0,
    shifts: torch.Tensor | None = None,
) -> PackedMatrix:
    """Views of a packed matrix in `packed`, uint8, wherever it lies: start aligned to 16 bytes.

    `shifts`: the format's, where they are known.
    """
    layout = shape.layout
    sections = layout.sections(n, shape.k, shape.step)
    _, high, headers = sections.starts
    words = packed[:high].view(_WORDS.get(shape.format, torch.uint16))
    return PackedMatrix(
        shape=shape,
        n=n,
        words=words,
        high=packed[high:headers].view(torch.uint16) if sections.high else words,
        headers=packed[headers : sections.size].view(torch.uint32) if sections.headers else words,
        shifts=shifts_of(layout, packed.device) if shifts is None else shifts,
        paired=paired,
        head=head,
    )


def shifts_of(layout: GpuLayout, device: torch.device) -> torch.Tensor:
    """`PackedMatrix.shifts`."""
    row = torch.arange(TILE, device=device)
    return torch.stack([row % layout.share * layout.high_bits, row % 2 * 16]).to(torch.uint16)


class Uploader:
    """Brings matrices to a device. `close` gives its staging memory back."""

    def __init__(self, device: torch.device, staging_bytes: int = STAGING_BYTES) -> None:
        self.device = device
        pinned = device.type == "cuda"
        self._staging = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self.hands = Hands()
        self._places: dict[str, Places] = {}  # by format
        self._shifts: dict[str, torch.Tensor] = {}  # likewise

    def close(self) -> None:
        self._staging = []
        self._places, self._shifts = {}, {}
        self.hands.close()

    def weight(
        self,
        parts: Sequence[Matrix],
        bias: Sequence[NDArray[np.float32] | None] = (),
        *,
        packed: bool = False,
        gated: bool = False,
        head_dim: int = 0,
    ) -> CudaWeight:
        """As `Backend.matrix`; `packed` even where small and float32. Raises UnsupportedFormat."""
        parts = alike(parts)
        biases = list(bias) or [None] * len(parts)
        made: list[WeightPart] = []
        column = 0
        for _, run in itertools.groupby(range(len(parts)), key=lambda index: parts[index].format):
            indices = list(run)
            matrices = [parts[index] for index in indices]
            n = sum(matrix.n for matrix in matrices)
            paired, head = False, 0
            if matrices[0].format.name == "F32" and n <= MAX_UNPACKED and not packed:
                weight = self.rows([matrix.data for matrix in matrices]).view(torch.float32)
            else:
                paired = gated and len(matrices) == len(parts) and can_pair(matrices)
                head = head_dim if len(matrices) == len(parts) and head_dim % (2 * GROUP) == 0 else 0
                weight = self.matrix(matrices, paired=paired, head=head)
            values = _joined(matrices, [biases[index] for index in indices])
            joined = None if values is None else torch.as_tensor(values, device=self.device)
            if joined is not None and (paired or head):
                joined = alternate(joined, head)
            made.append(WeightPart(weight, joined, column, n))
            column += n
        return CudaWeight(tuple(made), column, parts[0].k)

    def matrix(self, parts: Sequence[Matrix], *, paired: bool = False, head: int = 0) -> PackedMatrix:
        """Parts of one format and k as one matrix, outputs in order, or if `paired` as `alternate` has them.

        With `head`, those of each head of so many rows.

        Raises UnsupportedFormat.
        """
        layouts = [check(part, self.hands) for part in parts]
        first, n = parts[0], sum(part.n for part in parts)
        shape = shape_of(first.format.name, n, first.k)
        layout = layouts[0]
        packed = torch.empty(
            layout.sections(n, first.k, shape.step).size, dtype=torch.uint8, device=self.device
        )
        rows = self.rows([part.data for part in parts])
        if paired or head:
            rows = alternate(rows, head)
        return self.packed(rows, shape, packed, paired=paired, head=head)

    def packed(
        self, rows: torch.Tensor, shape: Shape, out: torch.Tensor, *, paired: bool = False, head: int = 0
    ) -> PackedMatrix:
        """Rows as the file has them, on the device, packed into `out`."""
        name, layout = shape.format, shape.layout
        if name not in self._places:
            self._places[name] = places_of(layout, self.device)
            self._shifts[name] = shifts_of(layout, self.device)
        repack(rows, layout, shape.k, shape.step, out, self._places[name])
        return upload(shape, len(rows), out, paired=paired, head=head, shifts=self._shifts[name])

    def rows(self, arrays: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Arrays of equally long rows, one below the other, on the device."""
        lengths = [array.nbytes for array in arrays]
        width = arrays[0].shape[1]
        rows = torch.empty(sum(lengths), dtype=torch.uint8, device=self.device)
        start = 0
        for array, length in zip(arrays, lengths, strict=True):
            self._copy(array, rows[start : start + length])
            start += length
        return rows.view(-1, width)

    def _copy(self, array: NDArray[np.uint8], target: torch.Tensor) -> None:
        flat = array.reshape(-1)
        size = len(self._staging[0])
        for start in range(0, len(flat), size):
            piece = flat[start : start + size]
            self._turn ^= 1
            staging, copied = self._staging[self._turn], self._copied[self._turn]
            if copied is not None:
                copied.synchronize()
            self.hands.copy(piece, staging[: len(piece)].numpy())
            target[start : start + len(piece)].copy_(staging[: len(piece)], non_blocking=True)
            if self.device.type == "cuda":
                copied = torch.cuda.Event()
                copied.record()
                self._copied[self._turn] = copied


def _joined(
    parts: Sequence[Matrix], bias: Sequence[NDArray[np.float32] | None]
) -> NDArray[np.float32] | None:
    """The biases of all parts as one vector, zero where a part has none; None where none has."""
    if all(values is None for values in bias):
        return None
    columns = [
        np.zeros(part.n, np.float32) if values is None else values
        for part, values in zip(parts, bias, strict=True)
    ]
    return np.concatenate(columns).astype(np.float32)
