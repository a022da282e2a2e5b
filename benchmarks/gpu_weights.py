"""Random weight matrices for the GPU scripts and tests, as the file would have them and packed."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant import BY_NAME, WeightFormat
from worker_orcd.quant.gpu_layout import TILE

# Where a block keeps float16 scales, in bytes, and what keeps weights near 1 / 50.
HALVES = {
    "Q4_0": ((0, 0.004),), "Q4_1": ((0, 0.003), (2, 0.02)), "Q5_0": ((0, 0.002),),
    "Q5_1": ((0, 0.0015), (2, 0.02)), "Q8_0": ((0, 0.0003),), "IQ4_NL": ((0, 0.0003),),
    "Q2_K": ((80, 0.003), (82, 0.004)), "Q3_K": ((108, 0.0005),), "Q4_K": ((0, 0.0001), (2, 0.0006)),
    "Q5_K": ((0, 0.00005), (2, 0.0006)), "Q6_K": ((208, 0.00002),),
}  # fmt: skip


def random_rows(fmt: WeightFormat, n: int, k: int, seed: int = 0) -> NDArray[np.uint8]:
    """(n, row_bytes) of random weights of about 1 / 50."""
    rng = np.random.default_rng(seed)
    if fmt.block_size == 1:
        values = 0.02 * rng.standard_normal((n, k), np.float32)
        if fmt.name == "F16":
            values = values.astype(np.float16)
        return (values.view(np.uint16)[:, 1::2].copy() if fmt.name == "BF16" else values).view(np.uint8)
    blocks = rng.integers(0, 256, (n, k // fmt.block_size, fmt.type_size), dtype=np.uint8)
    for at, size in HALVES.get(fmt.name, ()):
        scales = (
            size * rng.uniform(0.5, 1.5, (*blocks.shape[:2], 1)) * rng.choice([-1, 1], (*blocks.shape[:2], 1))
        )
        blocks[:, :, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    if fmt.name == "MXFP4":
        blocks[:, :, 0] = rng.integers(118, 123, blocks.shape[:2])
    return blocks.reshape(n, -1)


def packed_tiles(name: str, n: int, k: int, step: int = 0) -> NDArray[np.uint8]:
    """A packed matrix of `n` rows, all tiles alike: for timing. Packing all of it takes minutes."""
    layout = BY_NAME[name].gpu
    assert layout is not None
    one = layout.pack(random_rows(BY_NAME[name], TILE, k), k, step)
    bounds = [*layout.sections(TILE, k, step).starts, len(one)]
    tiles = -(-n // TILE)
    return np.concatenate([np.tile(one[a:b], tiles) for a, b in itertools.pairwise(bounds)])
