"""
The matrices of experts on a GPU: one packed matrix for all experts, each filling whole tiles on its own.

The gates of experts and what goes with them become one matrix where both have the same format: eight rows of
gates, then the eight that go with them, so that a program has both and can finish the gated unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.contract import num_expert_chunks
from worker_orcd.kernels.cuda.variants import Shape
from worker_orcd.kernels.cuda.weights import GROUP, PackedMatrix, Uploader, check
from worker_orcd.quant import BY_NAME
from worker_orcd.quant.gpu_layout import TILE


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """An (n, k) matrix of each expert; of a pair of parts, n counts both."""

    matrix: PackedMatrix  # expert after expert, each with rows of zeros up to whole tiles
    num_experts: int
    n: int
    paired: bool
    bias: torch.Tensor | None  # (num_experts, n) float32, in the order of the rows

    @property
    def shape(self) -> Shape:
        return self.matrix.shape

    @property
    def operand(self) -> torch.dtype:
        """What activations must be."""
        return self.matrix.operand


def expert_shape(format_name: str, n: int, k: int) -> Shape:
    """The shape of an expert's (n, k) matrix under the contract. Raises ValueError for no layout."""
    layout = BY_NAME[format_name].gpu
    if layout is None:
        raise ValueError(f"{format_name} has no GPU layout")
    chunks = num_expert_chunks(layout, n, k)
    return Shape(format=format_name, k=k, step=layout.step(k), chunks=chunks, aligned=n % 16 == 0)


def pack_experts(
    parts: Sequence[Matrix],
    num_experts: int,
    bias: Sequence[NDArray[np.float32] | None],
    uploader: Uploader,
) -> tuple[PackedExperts, ...]:
    """As `kernels.backend.Backend.experts`: one stack a part, or one of two parts that pair up.

    Raises UnsupportedFormat naming the tensor, or Internal for parts that do not fit each other.
    """
    _check_parts(parts, num_experts, bias)
    biases = list(bias) or [None] * len(parts)
    if pair_up(parts):
        return (_pack(parts, num_experts, biases, uploader),)
    return tuple(_pack([part], num_experts, [own], uploader) for part, own in zip(parts, biases, strict=True))


def pair_up(parts: Sequence[Matrix]) -> bool:
    """Whether these are two parts whose rows can alternate."""
    return len(parts) == 2 and parts[0].format is parts[1].format and parts[0].n % GROUP == 0


def alternate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One or two parts, (num_experts, n, width) each, as one: of two, eight rows and eight."""
    if len(parts) == 1:
        return parts[0]
    num_experts, n, width = parts[0].shape
    groups = [part.reshape(num_experts, n // GROUP, GROUP, width) for part in parts]
    return torch.stack(groups, dim=2).view(num_experts, -1, width)


def arrange(parts: Sequence[torch.Tensor], num_experts: int) -> torch.Tensor:
    """One or two parts' rows, (num_experts * n, row_bytes) each, in the order they are packed in.

    (num_experts * tiles * 64, row_bytes): zeros follow each expert where its rows fill no whole tile.
    """
    width = parts[0].shape[1]
    rows = alternate([part.view(num_experts, -1, width) for part in parts])
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % TILE)).view(-1, width)


def _pack(
    parts: Sequence[Matrix],
    num_experts: int,
    bias: Sequence[NDArray[np.float32] | None],
    uploader: Uploader,
) -> PackedExperts:
    layout, *_ = [check(part, uploader.hands) for part in parts]
    first, n = parts[0], sum(part.n for part in parts)
    shape = expert_shape(first.format.name, n, first.k)
    rows = arrange([uploader.rows([part.data]) for part in parts], num_experts)
    size = layout.sections(len(rows), first.k, shape.step).size
    packed = torch.empty(size, dtype=torch.uint8, device=uploader.device)
    matrix = uploader.packed(rows, shape, packed)
    joined = None
    if any(values is not None for values in bias):
        columns = [
            torch.as_tensor(
                np.zeros((num_experts, part.n, 1), np.float32)
                if values is None
                else np.array(values, np.float32)[:, :, None]
            )
            for part, values in zip(parts, bias, strict=True)
        ]
        joined = alternate(columns).reshape(num_experts, n).to(uploader.device)
    return PackedExperts(
        matrix=matrix,
        num_experts=num_experts,
        n=n,
        paired=len(parts) == 2,
        bias=joined,
    )


def _check_parts(
    parts: Sequence[Matrix], num_experts: int, bias: Sequence[NDArray[np.float32] | None]
) -> None:
    if not parts or any(part.k != parts[0].k for part in parts):
        raise Internal(f"matrices side by side need one k; these have {[part.k for part in parts]}")
    if bias and len(bias) != len(parts):
        raise Internal(f"{len(bias)} biases for {len(parts)} stacks of matrices")
    for index, part in enumerate(parts):
        own = bias[index] if bias else None
        if part.data.shape[0] != num_experts * part.n or (
            own is not None and own.shape != (num_experts, part.n)
        ):
            raise Internal(f"tensor {part.name} or its bias is not of {num_experts} experts of {part.n} rows")
