"""
How the blocks of a weight format lie on a GPU: the same bits in an order that tensor cores can be fed from.

A matrix is cut into tiles of 64 rows and steps of `step` columns, tile by tile, within a tile step by step.
A weight's *code* is its unsigned integer (or its float) as the file has it. Of a row's `step` codes, word j
(16 bits) holds those of columns j, j + width, j + 2 * width, …: each such *plane* is a run of columns, and
two adjacent words in a register are an operand pair of every plane. Three sections follow each other:

* words   [tile][step][64 rows][width]: the low bits of the codes, plane p at bits p * b … (b = 16 / planes)
* high    [tile][step][64 / share rows][width]: the bits that the words have no room for. `share` rows share
  a word: the i-th has plane p at bits (p + 1) * b % 16 + i * high_bits, where adding them costs least
* headers [tile][step, or block of two][32-bit words][64 rows]: scales, minimums and exponents; two bytes
  over are kept in a last [32], whose words are two rows each

Rows are padded to 64 with zero bytes, and columns only where they are no multiple of 64, which no published
model has. A format is described by where its bits come from, so packing is a permutation and loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TILE = 64  # rows
Bits = NDArray[np.intp]  # positions in a block: bit b of byte i is 8 * i + b
_MAX_BITS = 1 << 20  # unpacked at a time, a byte each: what a core's cache holds


def byte_bits(start: int, count: int) -> Bits:
    """The bits of bytes `start` … `start + count - 1`. (count, 8)"""
    return np.arange(8 * start, 8 * (start + count)).reshape(count, 8)


def plane_bits(start: int, count: int, bits: int) -> Bits:
    """Where `fields.planes` reads: (8 // bits * count, bits) from `count` bytes at `start`."""
    return byte_bits(start, count).reshape(count, 8 // bits, bits).transpose(1, 0, 2).reshape(-1, bits)


def in_words(*fields: Bits) -> Bits:
    """Header bits in order, the lowest of the first field first."""
    return np.concatenate([field.reshape(-1) for field in fields])


def pairs(values: Bits) -> list[Bits]:
    """(n, 4 or 2) to (n / 2,): the two fields of a pair, which a kernel wants 16 bits apart."""
    return [values[0::2], values[1::2]]


def k_header_bits() -> Bits:
    """Of Q4_K and Q5_K: see `fields.k_scales_and_mins` for where the file has them.

    Words 0 and 1: low nibbles of the scales (low half) and minimums (high half) of four sub-blocks each.
    Word 2: the upper two bits of all eight, likewise. Word 3: d and dmin.
    """
    first, second, low = byte_bits(4, 4), byte_bits(8, 4), byte_bits(12, 4)  # (4, 8)
    return in_words(
        first[:, :4], second[:, :4],
        low[:, :4], low[:, 4:],
        first[:, 4:6], first[:, 6:], second[:, 4:6], second[:, 6:],
        byte_bits(0, 4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sections:
    """How long the sections of a packed matrix are."""

    words: int  # of 16 bits; 32 for F32
    high: int  # of 16 bits
    headers: int  # of 32 bits
    word_size: int  # bytes

    @property
    def starts(self) -> tuple[int, int, int]:
        """Bytes, all multiples of 64."""
        high = self.words * self.word_size
        return 0, high, high + 2 * self.high

    @property
    def size(self) -> int:
        """Bytes."""
        return self.starts[2] + 4 * self.headers


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLayout:
    """Of one format."""

    codes: Bits  # (block_size, bits of a code), lowest first
    header: Bits  # (8 * bytes,): the rest of the block, in the order of the header words
    steps: tuple[int, ...]  # widths of a step, best first
    high_bits: int = 0  # of a code's bits, the upper ones, that stand in `high`
    flipped: Bits | None = None  # bits stored inverted: signed integers become unsigned
    word_bits: tuple[int, ...] | None = None  # which bit of the word of planes stands at bit 0, 1, …

    @property
    def low_bits(self) -> int:
        return self.codes.shape[1] - self.high_bits

    @property
    def planes(self) -> int:
        return max(1, 16 // self.low_bits)

    @property
    def share(self) -> int:
        """Rows whose high bits share a word."""
        return self.low_bits // self.high_bits if self.high_bits else 1

    @property
    def block_bits(self) -> int:
        return self.codes.size + self.header.size

    @property
    def is_plain(self) -> bool:
        """A weight is a word: only the order of steps changes."""
        return len(self.codes) == 1 and not self.header.size

    def step(self, k: int) -> int:
        """The columns of a step of a matrix with `k`: the first width that divides it, or the narrowest."""
        return next((step for step in self.steps if k % step == 0), self.steps[-1])

    def group(self, step: int) -> int:
        """The columns that a row's header words are for: a step, or a block of several."""
        return max(step, len(self.codes))

    def header_bytes(self, step: int) -> int:
        """Of a row and group."""
        return self.group(step) // len(self.codes) * self.header.size // 8

    def sections(self, n: int, k: int, step: int = 0) -> Sections:
        step = step or self.step(k)
        tiles, width = -(-n // TILE), step // self.planes
        steps, groups = tiles * -(-k // step), tiles * -(-k // self.group(step))
        return Sections(
            words=steps * TILE * width,
            high=steps * TILE // self.share * width if self.high_bits else 0,
            headers=groups * TILE * self.header_bytes(step) // 4,
            word_size=4 if self.low_bits == 32 else 2,
        )

    def pack(self, rows: NDArray[np.uint8], k: int, step: int = 0) -> NDArray[np.uint8]:
        """(n, row_bytes) uint8 as the file has them -> (sections(n, k).size,) uint8."""
        n = len(rows)
        step = step or self.step(k)
        sections = self.sections(n, k, step)
        if self.is_plain:
            of_step = step * self.block_bits // 8
            padded = np.zeros((-(-n // TILE), TILE, -(-k // step), of_step), np.uint8)
            padded.reshape(-1, padded.shape[2] * of_step)[:n, : rows.shape[1]] = rows
            return padded.swapaxes(1, 2).reshape(-1)
        packed = np.empty(sections.size, np.uint8)
        tiles = -(-n // TILE)
        views = self._views(packed, sections, tiles)
        for start, stop in self._batches(tiles, k, step):
            bits = self._block_bits(rows[start * TILE : stop * TILE], stop - start, k, step)
            parts = self._sections_of(bits, step)
            for view, part in zip(views, parts, strict=True):
                view[start:stop] = part
        return packed

    def unpack(self, packed: NDArray[np.uint8], n: int, k: int, step: int = 0) -> NDArray[np.uint8]:
        """The inverse of `pack`: (n, row_bytes) uint8."""
        step = step or self.step(k)
        tiles = -(-n // TILE)
        row_bytes = k // len(self.codes) * self.block_bits // 8
        if self.is_plain:
            steps = packed.reshape(tiles, -1, TILE, step * self.block_bits // 8)
            return steps.swapaxes(1, 2).reshape(tiles * TILE, -1)[:n, :row_bytes].copy()
        rows = np.empty((tiles * TILE, row_bytes), np.uint8)
        views = self._views(packed, self.sections(n, k, step), tiles)
        for start, stop in self._batches(tiles, k, step):
            bits = self._bits_of([view[start:stop] for view in views], k, step)  # (rows, blocks, block_bits)
            batch = np.packbits(bits, axis=-1, bitorder="little").reshape((stop - start) * TILE, -1)
            rows[start * TILE : stop * TILE] = batch[:, :row_bytes]
        return rows[:n]

    # -- bits: uint8 of 0 and 1 ----------------------------------------------------------------------------

    def _batches(self, tiles: int, k: int, step: int) -> list[tuple[int, int]]:
        """Ranges of tiles that are unpacked together."""
        of_tile = TILE * -(-k // step) * step // len(self.codes) * self.block_bits
        count = max(1, _MAX_BITS // of_tile)
        return [(start, min(start + count, tiles)) for start in range(0, tiles, count)]

    @staticmethod
    def _views(packed: NDArray[np.uint8], sections: Sections, tiles: int) -> list[NDArray[np.uint8]]:
        """The three sections, (tiles, bytes) each."""
        words, high, headers = sections.starts
        parts = packed[words:high], packed[high:headers], packed[headers : sections.size]
        return [part.reshape(tiles, len(part) // tiles) for part in parts]

    def _block_bits(self, rows: NDArray[np.uint8], tiles: int, k: int, step: int) -> NDArray[np.uint8]:
        """(tiles, 64, groups, blocks of a group, block_bits), padded with zeros."""
        groups = -(-k // self.group(step))
        blocks = groups * self.group(step) // len(self.codes)
        padded = np.zeros((tiles * TILE, blocks * self.block_bits // 8), np.uint8)
        padded[: len(rows), : rows.shape[1]] = rows
        bits = np.unpackbits(
            padded.reshape(tiles, TILE, groups, blocks // groups, -1), axis=-1, bitorder="little"
        )
        if self.flipped is not None:
            bits[..., self.flipped] ^= 1
        return bits

    def _sections_of(self, bits: NDArray[np.uint8], step: int) -> list[NDArray[np.uint8]]:
        """The sections of some tiles, (tiles, bytes) each."""
        tiles, _, groups = bits.shape[:3]
        steps = groups * self.group(step) // step
        planes, share, low, high = self.planes, self.share, self.low_bits, self.high_bits
        width = step // planes
        codes = bits[..., self.codes].reshape(tiles, TILE, steps, planes, width, low + high)
        words = codes[..., :low].transpose(0, 2, 1, 4, 3, 5).reshape(tiles, steps, TILE, width, planes * low)
        if self.word_bits is not None:
            words = words[..., self.word_bits]
        upper = np.roll(codes[..., low:], 1, axis=3).reshape(
            tiles, TILE // share, share, steps, planes, width, high
        )
        header = bits[..., self.header].reshape(tiles, TILE, groups, -1)
        whole = header.shape[-1] // 32 * 32
        full = header[..., :whole].reshape(tiles, TILE, groups, -1, 32).transpose(0, 2, 3, 1, 4)
        half = header[..., whole:].transpose(0, 2, 1, 3)
        headers = np.concatenate([full.reshape(tiles, groups, -1), half.reshape(tiles, groups, -1)], axis=-1)
        parts = words, upper.transpose(0, 3, 1, 5, 4, 2, 6), headers
        return [np.packbits(part.reshape(tiles, -1), axis=-1, bitorder="little") for part in parts]

    def _bits_of(self, sections: list[NDArray[np.uint8]], k: int, step: int) -> NDArray[np.uint8]:
        """The inverse of `_sections_of`: (rows, blocks, block_bits)."""
        words, upper, headers = (np.unpackbits(part, axis=-1, bitorder="little") for part in sections)
        tiles, steps, groups = len(words), -(-k // step), -(-k // self.group(step))
        planes, share, low, high = self.planes, self.share, self.low_bits, self.high_bits
        width, blocks = step // planes, self.group(step) // len(self.codes)
        words = words.reshape(tiles, steps, TILE, width, planes * low)
        if self.word_bits is not None:
            words = words[..., np.argsort(self.word_bits)]
        words = words.reshape(tiles, steps, TILE, width, planes, low).transpose(0, 2, 1, 4, 3, 5)
        upper = upper.reshape(tiles, steps, TILE // share, width, planes, share, high).transpose(
            0, 2, 5, 1, 4, 3, 6
        )
        upper = np.roll(upper.reshape(tiles, TILE, steps, planes, width, high), -1, axis=3)
        codes = np.concatenate([words, upper], axis=-1)
        bits = np.empty((tiles, TILE, groups, blocks, self.block_bits), np.uint8)
        bits[..., self.codes] = codes.reshape(tiles, TILE, groups, blocks, -1, low + high)
        of_row = 8 * self.header_bytes(step)
        whole = of_row // 32 * 32
        headers = headers.reshape(tiles, groups, of_row * TILE)
        full = headers[..., : whole * TILE].reshape(tiles, groups, -1, TILE, 32).transpose(0, 3, 1, 2, 4)
        half = headers[..., whole * TILE :].reshape(tiles, groups, TILE, -1).transpose(0, 2, 1, 3)
        header = np.concatenate([full.reshape(tiles, TILE, groups, whole), half], axis=-1)
        bits[..., self.header] = header.reshape(tiles, TILE, groups, blocks, -1)
        if self.flipped is not None:
            bits[..., self.flipped] ^= 1
        return bits.reshape(tiles * TILE, groups * blocks, self.block_bits)
