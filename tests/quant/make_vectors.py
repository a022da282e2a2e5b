"""Store a few blocks of a format and what the `gguf` package makes of them, for `test_stored_vectors`.

    python tests/quant/make_vectors.py IQ4_XS

Run once a format, when it is added: the vectors then hold whatever a later `gguf` package says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from test_formats import EXTREME, SCALES, expected, random_blocks

from worker_orcd.quant import BY_NAME

DIRECTORY = Path(__file__).parent.parent / "data" / "quant"


def make(name: str) -> None:
    fmt = BY_NAME[name]
    blocks = random_blocks(fmt, 1000 + fmt.ggml_type, 24 if fmt.block_size < 256 else 12)
    for turn, start in enumerate(SCALES[name]):
        scales = np.resize(np.roll(EXTREME, turn), len(blocks))  # (n,)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        blocks[:16, 0] = [0, 1, 2, 3, 100, 120, 126, 127, 128, 150, 200, 250, 252, 253, 254, 255]
    bits = expected(fmt, blocks).view(np.uint32)
    np.savez_compressed(DIRECTORY / f"{name}.npz", blocks=blocks, bits=bits)


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        make(name)
