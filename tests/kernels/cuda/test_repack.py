"""Packing with torch gives the bytes that packing with numpy gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_weights import random_rows
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda import repack as module
from worker_orcd.kernels.cuda import weights
from worker_orcd.kernels.cuda.repack import Places, places_of, repack
from worker_orcd.kernels.cuda.variants import FORMATS
from worker_orcd.kernels.cuda.weights import Uploader, shifts_of
from worker_orcd.quant import BY_NAME
from worker_orcd.quant.gpu_layout import GpuLayout


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


def test_eight_bits_become_a_byte_whatever_they_are() -> None:
    wanted = torch.arange(256, dtype=torch.uint8)
    bits = (wanted[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert torch.equal(module._Packer._packed(bits, 4), wanted.view(4, 64))
    assert module._Packer._packed(bits[:0], 4).shape == (4, 0)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "Q6_K"])
def test_where_bits_are_is_found_out_once_for_a_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of matrices of one format alone: the next has its own."""
    asked: list[int] = []

    def counted(layout: GpuLayout, device: torch.device) -> Places:
        asked.append(len(layout.codes))
        return places_of(layout, device)

    monkeypatch.setattr(weights, "places_of", counted)
    uploader = Uploader(torch.device("cpu"))
    for which in (name, "Q8_0", name):
        fmt = BY_NAME[which]
        assert fmt.gpu is not None
        for n in (64, 200):
            rows = random_rows(fmt, n, 512, n)
            packed = uploader.matrix([Matrix("w", fmt, n, 512, rows)])
            found = np.frombuffer(bytes(packed.words.untyped_storage()), np.uint8)
            np.testing.assert_array_equal(found, fmt.gpu.pack(rows, 512, packed.shape.step))
            assert torch.equal(packed.shifts, shifts_of(fmt.gpu, torch.device("cpu")))
    assert asked == [BY_NAME[name].block_size, 32]
