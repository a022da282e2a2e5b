"""
From a round to the next under Triton's interpreter, beside numpy. Run in a process of its own, which
`TRITON_INTERPRET=1` must be set for before Triton is imported; see test_rounds.py.

Prints a line of JSON: by case the names of the inputs that are wrong.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from interpreted_sampling import InterpretedKernels

from worker_orcd.kernels.backend import Limits
from worker_orcd.kernels.cuda.draw_slab import DrawSlab, Int
from worker_orcd.kernels.cuda.inputs import Staging
from worker_orcd.kernels.cuda.rounds import Rounds

CPU = torch.device("cpu")
NAMES = ("token_ids", "positions", "context_lens", "slots", "block_tables", "query_start", "logit_tokens")


def case(rows: int, max_rows: int, num_groups: int, block_size: int) -> list[str]:
    """Random rows, some of which have drawn their last token."""
    random = np.random.default_rng(rows)
    limits = Limits(
        max_tokens=max_rows + 3,
        max_rows=max_rows,
        max_blocks_per_row=6,
        block_size=block_size,
        num_groups=num_groups,
    )
    inputs = Staging(limits, CPU).device
    for name in NAMES:
        view = getattr(inputs, name)
        view[...] = torch.from_numpy(random.integers(0, 90, tuple(view.shape))).int()
    padded = -(-max_rows // 4) * 4
    slab = DrawSlab(1000, padded, CPU)
    ints = slab.ints.view(torch.int64).view(len(Int), padded)
    ints[...] = torch.from_numpy(random.integers(1, 5, (len(Int), padded)))
    position = random.integers(1, 6 * block_size, rows)
    ints[Int.POSITION, :rows] = torch.from_numpy(position)
    ints[Int.LAST, :rows] = torch.from_numpy(position + random.integers(0, 3, rows))
    drawn = torch.from_numpy(random.integers(0, 1000, (8, padded))).int()

    wanted = {name: getattr(inputs, name).numpy().copy() for name in NAMES}
    wanted_ints = ints.numpy().copy()
    for row in range(rows):
        at = int(wanted_ints[Int.POSITION, row])
        wanted["token_ids"][row] = drawn[5, row]
        wanted["slots"][:, row] = 0
        if at < wanted_ints[Int.LAST, row]:
            wanted["positions"][row], wanted["context_lens"][row] = at, at + 1
            blocks = wanted["block_tables"][:, row, at // block_size]
            wanted["slots"][:, row] = blocks * block_size + at % block_size
            wanted_ints[Int.POSITION, row] += 1

    kernels = InterpretedKernels(CPU, 90)
    Rounds(kernels, inputs, limits, drawn, slab.ints).launch(rows, 5)
    wrong = [name for name in NAMES if not np.array_equal(getattr(inputs, name).numpy(), wanted[name])]
    return wrong + ["ints"] * (not np.array_equal(ints.numpy(), wanted_ints))


if __name__ == "__main__":
    cases = ((1, 1, 1, 16), (5, 7, 2, 4), (130, 200, 1, 32), (256, 256, 3, 16))
    print(json.dumps({str(one): case(*one) for one in cases}))
