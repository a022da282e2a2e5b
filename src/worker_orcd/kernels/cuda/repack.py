"""
`GpuLayout.pack` where the packed bytes will be used: torch operations on whatever device the rows are on.

The same bits from the same places as in `quant.gpu_layout`, which is the definition and, in numpy, the slow
way. Bits are moved around one byte each, a batch of tiles at a time, so the memory needed beside rows and
result is bounded by `MAX_BITS`, not by the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.quant.gpu_layout import TILE, GpuLayout, Sections

# Eight bytes of a bit each, times this, are their eight bits in the uppermost byte: byte i is shifted by
# 56 - 7 * i among others, and no two shifted bits of all meet.
_GATHER = sum(1 << (56 - 7 * byte) for byte in range(8))
MAX_BITS = 64 << 20  # unpacked at a time, a byte each; some copies of them are alive at once


@dataclass(frozen=True, slots=True)
class Places:
    """Of the bits of a layout's block, on a device. Made once: a copy to a GPU waits for all that it does."""

    codes: torch.Tensor
    header: torch.Tensor
    flipped: torch.Tensor | None
    word_bits: torch.Tensor | None
    shifts: torch.Tensor  # 0 to 7


def places_of(layout: GpuLayout, device: torch.device) -> Places:
    def on_device(bits: NDArray[np.intp]) -> torch.Tensor:
        return torch.as_tensor(bits.astype(np.int64).reshape(-1), device=device)

    return Places(
        codes=on_device(layout.codes),
        header=on_device(layout.header),
        flipped=None if layout.flipped is None else on_device(layout.flipped),
        word_bits=None if layout.word_bits is None else on_device(np.array(layout.word_bits)),
        shifts=torch.arange(8, dtype=torch.uint8, device=device),
    )


def repack(
    rows: torch.Tensor, layout: GpuLayout, k: int, step: int, out: torch.Tensor, places: Places | None = None
) -> None:
    """(n, row_bytes) uint8 as the file has them -> out (sections(n, k, step).size,) uint8 on that device.

    `places`: the layout's, where they are known.
    """
    sections = layout.sections(len(rows), k, step)
    tiles = -(-len(rows) // TILE)
    if layout.is_plain:
        width = step * layout.block_bits // 8
        padded = torch.zeros(tiles, TILE, -(-k // step), width, dtype=torch.uint8, device=rows.device)
        padded.view(tiles * TILE, -1)[: len(rows), : rows.shape[1]] = rows
        out.view(tiles, -(-k // step), TILE, width).copy_(padded.transpose(1, 2))
        return
    packer = _Packer(layout, k, step, places or places_of(layout, rows.device))
    views = _views(out, sections, tiles)
    batch = max(1, MAX_BITS // packer.bits_of_tile)
    for start in range(0, tiles, batch):
        stop = min(start + batch, tiles)
        parts = packer.sections_of(rows[start * TILE : stop * TILE], stop - start)
        for view, part in zip(views, parts, strict=True):
            view[start:stop] = part


def _views(out: torch.Tensor, sections: Sections, tiles: int) -> list[torch.Tensor]:
    words, high, headers = sections.starts
    parts = out[words:high], out[high:headers], out[headers : sections.size]
    return [part.view(tiles, len(part) // tiles) for part in parts]


class _Packer:
    """Of matrices with one layout and k."""

    def __init__(self, layout: GpuLayout, k: int, step: int, places: Places) -> None:
        self._layout, self._step, self._places = layout, step, places
        self._groups = -(-k // layout.group(step))
        self._blocks = self._groups * layout.group(step) // len(layout.codes)

    @property
    def bits_of_tile(self) -> int:
        return TILE * self._blocks * self._layout.block_bits

    def sections_of(self, rows: torch.Tensor, tiles: int) -> list[torch.Tensor]:
        """The sections of some tiles, (tiles, bytes) each. As `GpuLayout._sections_of`."""
        layout, groups = self._layout, self._groups
        steps = groups * layout.group(self._step) // self._step
        planes, share, low, high = layout.planes, layout.share, layout.low_bits, layout.high_bits
        width = self._step // planes
        bits = self._block_bits(rows, tiles)  # (tiles, TILE, groups, blocks of a group, block_bits)
        codes = bits[..., self._places.codes].reshape(tiles, TILE, steps, planes, width, low + high)
        words = codes[..., :low].permute(0, 2, 1, 4, 3, 5).reshape(tiles, steps, TILE, width, planes * low)
        if self._places.word_bits is not None:
            words = words[..., self._places.word_bits]
        parts = [words]
        upper = codes[..., low:].roll(1, dims=3)
        upper = upper.reshape(tiles, TILE // share, share, steps, planes, width, high)
        parts.append(upper.permute(0, 3, 1, 5, 4, 2, 6))
        header = bits[..., self._places.header].reshape(tiles, TILE, groups, -1)
        whole = header.shape[-1] // 32 * 32
        full = header[..., :whole].reshape(tiles, TILE, groups, whole // 32, 32).permute(0, 2, 3, 1, 4)
        half = header[..., whole:].permute(0, 2, 1, 3)
        sides = [full.reshape(tiles, groups, whole * TILE), half.reshape(tiles, groups, -1)]
        parts.append(torch.cat(sides, dim=-1))
        return [self._packed(part, tiles) for part in parts]

    def _block_bits(self, rows: torch.Tensor, tiles: int) -> torch.Tensor:
        layout = self._layout
        of_row = self._blocks * layout.block_bits // 8
        padded = torch.zeros(tiles * TILE, of_row, dtype=torch.uint8, device=rows.device)
        padded[: len(rows), : rows.shape[1]] = rows
        bits = (padded.unsqueeze(-1) >> self._places.shifts) & 1
        bits = bits.view(tiles, TILE, self._groups, self._blocks // self._groups, layout.block_bits)
        if self._places.flipped is not None:
            bits[..., self._places.flipped] ^= 1
        return bits

    @staticmethod
    def _packed(bits: torch.Tensor, tiles: int) -> torch.Tensor:
        """Eight bits a byte, the lowest first: (tiles, bytes)."""
        if bits.numel() == 0:
            return torch.empty(tiles, 0, dtype=torch.uint8, device=bits.device)
        eights = bits.reshape(tiles, -1, 8).contiguous().view(torch.int64)
        return (eights * _GATHER).view(torch.uint8)[..., 7]
