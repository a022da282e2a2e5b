"""What a weight format is: a block of weights as bytes, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.quant.gpu_layout import GpuLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One of GGUF's tensor types. Registered in `quant.FORMATS`; one file a format."""

    name: str  # "Q4_K"
    ggml_type: int  # the id in the tensor table
    block_size: int  # weights in a block
    type_size: int  # bytes in a block
    # (num_blocks, type_size) uint8 -> (num_blocks, block_size) float32; the reference for every device.
    # Finite scales give no NaN. Infinite and NaN scales propagate by IEEE rules, without a warning.
    dequantize: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    # The reverse: finite weights, each block by itself. None: a format that is read and not made here.
    quantize: Callable[[NDArray[np.float32]], NDArray[np.uint8]] | None = None
    gpu: GpuLayout | None = None  # None: no GPU kernel for it

    def row_bytes(self, num_weights: int) -> int:
        """Bytes of a row; `num_weights` must be a multiple of `block_size`."""
        return num_weights // self.block_size * self.type_size

    def dequantize_rows(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, row_bytes) uint8 -> (n, k) float32."""
        n = rows.shape[0]
        blocks = np.ascontiguousarray(rows).reshape(-1, self.type_size)
        return self.dequantize(blocks).reshape(n, -1)

    def quantize_rows(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(n, k) finite float32 -> (n, row_bytes) uint8. Raises ValueError for a format that is only read."""
        if self.quantize is None:
            raise ValueError(f"{self.name} cannot be made here, only read")
        n = rows.shape[0]
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, self.block_size)
        return self.quantize(blocks).reshape(n, -1)
