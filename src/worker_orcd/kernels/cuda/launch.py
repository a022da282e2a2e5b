"""Running matrix products on a GPU: kernels by variant, and the memory that split products share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from worker_orcd.kernels.cuda.variants import (
    MAX_SPLIT_TOKENS,
    Epilogue,
    Tile,
    Variant,
    choose_tile,
    compile_variant,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix

_OUT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_COUNTERS = 1 << 14  # row tiles times token tiles of a split product

Compile = Callable[[Variant, int], Any]


class Products:
    """Matrix products on the current stream of one device. They share scratch memory: one at a time."""

    def __init__(self, device: torch.device, capability: int, compile: Compile = compile_variant) -> None:
        self._device, self._capability, self._compile = device, capability, compile
        self._kernels: dict[Variant, Any] = {}
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

    @property
    def scratch_bytes(self) -> int:
        return self._partials.nbytes + self._counters.nbytes

    def reserve(self, weight: PackedMatrix, tokens: int = MAX_SPLIT_TOKENS) -> None:
        """Room for the parts of `weight`'s products of up to `tokens`. Before any graph is captured."""
        needed = weight.shape.chunks * tokens * weight.n
        if weight.shape.chunks > 1 and needed > len(self._partials):
            self._partials = torch.empty(needed, dtype=torch.float32, device=self._device)

    def kernel(self, variant: Variant) -> Any:
        """Compiled, and loaded onto the device."""
        found = self._kernels.get(variant)
        if found is None:
            found = self._kernels[variant] = self._compile(variant, self._capability)
        return found

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedMatrix,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        glu: bool = False,
        tile: Tile | None = None,
    ) -> torch.Tensor:
        """`out` (tokens, n) = x (tokens, k) @ weight.T, then + bias (n,), then + residual (tokens, n).

        x is of `weight.operand`, bias and residual float32. With `glu`, rows of gate and up alternate, eight
        and eight, and out (tokens, n / 2) is silu(gate) * up. All contiguous, on this device.
        """
        tokens, n = len(x), weight.n
        tile = tile or choose_tile(weight.shape, n, tokens, self._capability)
        if tile.split and weight.shape.chunks * tokens * n > len(self._partials):
            raise ValueError(f"a split product of {tokens} tokens needs more scratch memory: see reserve")
        epilogue = Epilogue(
            bias=bias is not None, residual=residual is not None, glu=glu, out=_OUT[out.dtype]
        )
        kernel = self.kernel(Variant(shape=weight.shape, tile=tile, epilogue=epilogue))
        grid = -(-n // tile.rows), -(-tokens // tile.tokens), weight.shape.chunks if tile.split else 1
        nothing = out.data_ptr()
        pointers = [
            weight.words.data_ptr(), weight.high.data_ptr(), weight.headers.data_ptr(),
            weight.shifts.data_ptr(), x.data_ptr(), out.data_ptr(),
            self._partials.data_ptr() if tile.split else nothing, self._counters.data_ptr(),
            bias.data_ptr() if bias is not None else nothing,
            residual.data_ptr() if residual is not None else nothing,
        ]  # fmt: skip
        kernel[grid](*pointers, n, tokens, *[None] * (len(kernel.src.signature) - len(pointers) - 2))
        return out
