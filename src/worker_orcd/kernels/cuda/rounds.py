"""From a round of a step to the next, on the device: see `advance`."""

from __future__ import annotations

import torch

from worker_orcd.kernels.backend import BatchInputs, Limits
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.draw_slab import Int

_BLOCK = 128  # rows of a program


class Rounds:
    """Changes a step's inputs to those of its next round, on the current stream."""

    def __init__(
        self,
        kernels: Kernels,
        inputs: BatchInputs,
        limits: Limits,
        drawn: torch.Tensor,
        ints: torch.Tensor,
    ) -> None:
        """All on the device. `drawn`: (slots, rows) tokens; `ints`: `draw_slab.Int` of as many rows."""
        self._kernels, self._inputs, self._drawn, self._ints = kernels, inputs, drawn, ints
        arguments = (("drawn", "*i32"), ("ints", "*i64"))
        arguments += tuple(
            (name, "*i32") for name in ("token_ids", "positions", "context_lens", "slots", "block_tables")
        )
        arguments += tuple(
            (name, "i32") for name in ("rows", "slots_stride", "tables_stride", "tables_row_stride")
        )
        self._kernel = Kernel(
            module="advance",
            function="advance",
            arguments=arguments,
            constants=(
                ("POSITION", int(Int.POSITION)),
                ("LAST", int(Int.LAST)),
                ("ROWS", drawn.shape[1]),
                ("GROUPS", limits.num_groups),
                ("BLOCK_SIZE", limits.block_size),
                ("BLOCK", _BLOCK),
            ),
        )

    def launch(self, rows: int, slot: int) -> None:
        """The step's rows, all of one token, compute what they have drawn into `slot`."""
        inputs = self._inputs
        self._kernels.launch(
            self._kernel,
            (-(-rows // _BLOCK), 1, 1),
            self._drawn[slot],
            self._ints,
            inputs.token_ids,
            inputs.positions,
            inputs.context_lens,
            inputs.slots,
            inputs.block_tables,
            rows,
            inputs.slots.stride(0),
            inputs.block_tables.stride(0),
            inputs.block_tables.stride(1),
        )
