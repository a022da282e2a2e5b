"""A weight matrix on a GPU: packed, in one buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.errors import UnsupportedFormat
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.variants import Shape, shape_of
from worker_orcd.quant.gpu_layout import TILE

MAX_EXPONENT = 128  # of MXFP4's bytes: scales up to 2. Beyond, bfloat16 cannot hold what the kernels need

_WORDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The sections of `quant.gpu_layout`, as views of one buffer."""

    shape: Shape
    n: int
    words: torch.Tensor
    high: torch.Tensor  # `words` where there are none: a kernel must be given something
    headers: torch.Tensor  # likewise
    shifts: torch.Tensor  # (64,) uint16: how far each row's bits are up in its high word

    @property
    def num_bytes(self) -> int:
        return self.words.untyped_storage().nbytes()

    @property
    def operand(self) -> torch.dtype:
        """What activations must be."""
        return torch.bfloat16 if self.shape.operand == "bf16" else torch.float16


def pack(matrix: Matrix, step: int = 0) -> tuple[Shape, NDArray[np.uint8]]:
    """The matrix as kernels want it, in host memory; `step` is for experiments. Raises UnsupportedFormat."""
    layout = matrix.format.gpu
    if layout is None:
        raise UnsupportedFormat(
            f"{matrix.name} is {matrix.format.name}; the CUDA backend has no kernel for it"
        )
    if matrix.format.name == "MXFP4":
        largest = int(matrix.data.reshape(-1, matrix.format.type_size)[:, 0].max(initial=0))
        if largest > MAX_EXPONENT:
            raise UnsupportedFormat(
                f"{matrix.name} has a block with scale exponent {largest}; the CUDA backend computes with at"
                f" most {MAX_EXPONENT}"
            )
    shape = shape_of(matrix.format.name, matrix.n, matrix.k, step)
    return shape, layout.pack(matrix.data, matrix.k, shape.step)


def upload(shape: Shape, n: int, packed: torch.Tensor) -> PackedMatrix:
    """Views of a packed matrix in `packed`, uint8, wherever it lies: start aligned to 16 bytes."""
    layout = shape.layout
    sections = layout.sections(n, shape.k, shape.step)
    _, high, headers = sections.starts
    words = packed[:high].view(_WORDS.get(shape.format, torch.uint16))
    shifts = torch.arange(TILE, device=packed.device) % layout.share * layout.high_bits
    return PackedMatrix(
        shape=shape,
        n=n,
        words=words,
        high=packed[high:headers].view(torch.uint16) if sections.high else words,
        headers=packed[headers : sections.size].view(torch.uint32) if sections.headers else words,
        shifts=shifts.to(torch.uint16),
    )
