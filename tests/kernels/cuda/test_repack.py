"""Packing with torch gives the bytes that packing with numpy gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_weights import random_rows
from worker_orcd.kernels.cuda import repack as module
from worker_orcd.kernels.cuda.repack import repack
from worker_orcd.kernels.cuda.variants import FORMATS
from worker_orcd.quant import BY_NAME


@pytest.mark.parametrize("batch", [1, 64 << 20])
@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_are_those_of_the_layout(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BITS", batch)
    fmt = BY_NAME[name]
    layout = fmt.gpu
    assert layout is not None
    for n, k in ((200, 256 * 3), (1, 512), (64, 256), *(((96, 160),) if fmt.block_size <= 32 else ())):
        for step in {layout.step(k), *(step for step in layout.steps if k % step == 0)}:
            rows = random_rows(fmt, n, k, n + k)
            expected = layout.pack(rows, k, step)
            out = torch.full((len(expected),), 0xA5, dtype=torch.uint8)
            repack(torch.from_numpy(rows), layout, k, step, out)
            np.testing.assert_array_equal(out.numpy(), expected)


def test_rows_are_not_written_to() -> None:
    fmt = BY_NAME["Q8_0"]
    layout = fmt.gpu
    assert layout is not None
    rows = torch.from_numpy(random_rows(fmt, 64, 64, 1))
    before = rows.clone()
    repack(rows, layout, 64, layout.step(64), torch.empty(layout.sections(64, 64).size, dtype=torch.uint8))
    assert torch.equal(rows, before)
