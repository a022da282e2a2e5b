"""From a round of a step to the next."""

from __future__ import annotations

import pytest
import torch
import under_interpreter

from gpu_sampling import faults
from worker_orcd.kernels.backend import Counts, Limits
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.draw_slab import Int
from worker_orcd.kernels.cuda.inputs import Bucket, Staging
from worker_orcd.kernels.cuda.rounds import Rounds

CPU = torch.device("cpu")
LIMITS = Limits(max_tokens=8, max_rows=4, max_blocks_per_row=4, block_size=2, num_groups=2)


def test_rows_go_on_to_what_they_have_drawn_and_others_to_the_null_block() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    found = under_interpreter.run("interpreted_rounds.py")
    assert len(found) == 4 and found == {key: [] for key in found}


def kernel_of() -> tuple[Kernel, tuple[int, int, int]]:
    """As it is launched for three rows."""
    inputs = Staging(LIMITS, CPU).device
    launched: list[tuple[Kernel, tuple[int, int, int]]] = []

    class Watched(Kernels):
        def launch(
            self, kernel: Kernel, grid: tuple[int, int, int], *arguments: torch.Tensor | float
        ) -> None:
            for (name, kind), value in zip(kernel.arguments, arguments, strict=True):
                assert kind.startswith("*") == isinstance(value, torch.Tensor), name
                if isinstance(value, torch.Tensor):
                    assert value.data_ptr() % 16 == 0, name
            launched.append((kernel, grid))

    drawn, ints = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(8 * 4 * len(Int), dtype=torch.uint8)
    Rounds(Watched(CPU, 90), inputs, LIMITS, drawn, ints).launch(3, 1)
    return launched[0]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles_without_spills(capability: int) -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    kernel, grid = kernel_of()
    assert grid == (1, 1, 1) and faults(kernel, capability) == []


def test_the_copy_reaches_as_far_as_the_rounds_write() -> None:
    staging = Staging(LIMITS, CPU)
    staging.host.block_tables[...] = 9
    staging.host.context_lens[0] = 4
    for num_rounds, blocks in ((1, 2), (2, 3), (4, 4)):
        staging.device.block_tables.zero_()
        for _ in range(2):  # both sides
            staging.copy(Counts(1, 1, 1, num_rounds), Bucket(1, 1))
        assert staging.device.block_tables[:, 0].tolist() == [[9] * blocks + [0] * (4 - blocks)] * 2
