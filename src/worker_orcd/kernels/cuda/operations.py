"""
Everything between matrix products and attention, on a GPU: a launch each, into memory the caller gives.

Tensors are (tokens, columns) with a row stride and adjacent columns; `out` decides what a result is rounded
to, and float16 saturates at ±65504 instead of becoming infinite (NaN stays). An operation of single elements
may be done in place.

Sums over a row have one shape, which follows from the row's width alone: `row_shape` gives block and warps,
and rows whose width is a multiple of 16 must be aligned to 16 elements, others are never taken to be. So a
row's bits do not depend on what else a kernel does, nor on where its operands lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worker_orcd.kernels.backend import AttentionParams, Glu, RopeParams
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.weights import PackedMatrix

MAX_WIDTH = 16384  # of a row that is summed: more has no room in a program's registers
MAX_EXPERTS, MAX_TOP_K = 256, 16
_MODULES = {
    "combine": "elementwise", "elementwise": "elementwise", "embed": "embedding", "norm": "norms",
    "rope_store": "rope", "linear_f32": "routing", "route": "routing",
}  # fmt: skip
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.uint16: "*u16", torch.uint32: "*u32", FP8: "*u8",
}  # fmt: skip
_BLOCK = 1024  # columns that a program of single elements has
_EMBEDDED = 512  # columns that a program of `embed` has
_HEAD_COLUMNS = 1024  # that a program of `rope_store` has
_PIECE = 128  # columns of a row that a warp has in a vector: four a lane, as wide as loads are
_ROUTER_OUTPUTS = 4  # that a program of `linear_f32` has
_ROUTER_PROGRAMS = 1056  # that keep a GPU busy; beyond, a program takes several tokens
_ANGLES = 1 << 20  # computed at a time

Argument = torch.Tensor | int | float


def power_of_two(n: int) -> int:
    """The lowest that is not below n."""
    return 1 << (n - 1).bit_length()


def row_shape(width: int) -> tuple[int, int]:
    """A power of two from `width` on, and warps, of a program that sums a row. Raises ValueError.

    Change it and answers change: raise `version.REPRODUCIBILITY_CONTRACT`.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"rows of {width} columns; the kernels sum rows of 1 to {MAX_WIDTH}")
    block = power_of_two(width)
    return block, min(16, max(1, block // 256))


def rope_table(params: RopeParams, max_positions: int, device: torch.device) -> torch.Tensor:
    """(max_positions, 2, rotary_dim / 2) float32: cos and sin of each position, times the attention factor.

    In float64 and rounded once, so they are as the reference backend's at any position. A device would need
    float64, or several float32 words for an angle, each time; memory is some hundred bytes a position, far
    below what the KV cache takes for it.
    """
    half = params.rotary_dim // 2
    inv_freq = np.array(params.inv_freq)
    table = torch.empty(max_positions, 2, half, dtype=torch.float32, device=device)
    step = max(1, _ANGLES // max(1, half))
    for first in range(0, max_positions, step):
        last = min(first + step, max_positions)
        angles = np.arange(first, last)[:, None] * inv_freq  # (positions, half)
        both = np.stack((np.cos(angles), np.sin(angles)), axis=1) * params.attention_factor
        table[first:last] = torch.as_tensor(both.astype(np.float32))
    return table


class Operations:
    """Of one device, on its current stream. They keep nothing: what they read and write is given."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    # -- rows ----------------------------------------------------------------------------------------------

    def embed(
        self,
        indices: torch.Tensor,
        weight: PackedMatrix,
        out: torch.Tensor,
        scale: float = 1.0,
        *,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows `indices` (tokens,) int32 of a packed table, as `quant` reads them, times `scale`.

        An index may be negative where `drawn`, int32, is given: -1 - i stands for drawn[i].
        """
        shape, layout = weight.shape, weight.shape.layout
        constants = {
            "K": shape.k, "FORMAT": shape.format, "BLOCK": len(layout.codes), "STEP": shape.step,
            "PLANES": layout.planes, "HIGH": layout.high_bits, "SHARE": layout.share,
            "HEADER": layout.header_bytes(shape.step), "GROUP": layout.group(shape.step),
            "COLUMNS": _EMBEDDED,
        }  # fmt: skip
        arguments = {
            "indices": indices, "drawn": indices if drawn is None else drawn, "w": weight.words,
            "h": weight.high, "s": weight.headers, "out": out, "factor": float(scale),
            "out_stride": out.stride(0),
        }  # fmt: skip
        self._launch("embed", (-(-shape.k // _EMBEDDED), len(out), 1), arguments, constants, tokens=len(out))
        return out

    def take(self, x: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Rows `indices` (len(out),) int32 of x."""
        return self._elementwise("cast", x, None, out, indices=indices)

    # -- norms ---------------------------------------------------------------------------------------------

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each run of len(gain) columns: x / sqrt(mean(x²) + eps) * gain. x is float32."""
        return self._norm(x, None, gain, None, x, out, eps)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        sum_out: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """`rms_norm` of x + y, which is written to `sum_out` (x itself, if wished): the same bits."""
        return self._norm(x, y, gain, None, sum_out, out, eps)

    def layer_norm(
        self, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor
    ) -> torch.Tensor:
        """LayerNorm of each run of len(gain) columns: (x - mean) / sqrt(variance + eps) * gain + bias."""
        return self._norm(x, None, gain, bias, x, out, eps)

    def _norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gain: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        out: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        n = len(gain)
        block, warps = row_shape(n)
        runs = x.shape[1] // n
        if runs * n != x.shape[1]:
            raise ValueError(f"{x.shape[1]} columns are no whole runs of {n}")
        second = x if y is None else y
        arguments = {
            "x": x, "y": second, "gain": gain, "bias": gain if bias is None else bias, "total": total,
            "out": out, "eps": float(eps), "x_stride": x.stride(0), "y_stride": second.stride(0),
            "total_stride": total.stride(0), "out_stride": out.stride(0),
        }  # fmt: skip
        piece = min(block, _PIECE * warps)
        constants = {
            "N": n, "ADD": y is not None, "CENTRED": bias is not None, "PIECE": piece,
            "PIECES": block // piece,
        }  # fmt: skip
        self._launch(
            "norm", (runs, len(x), 1), arguments, constants, tokens=len(x), warps=warps, aligned=n % 16 == 0
        )
        return out

    # -- attention's inputs --------------------------------------------------------------------------------

    def rope_store(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        params: AttentionParams,
        cache: torch.Tensor,
        q_out: torch.Tensor,
        *,
        gains: tuple[torch.Tensor | None, torch.Tensor | None, float] = (None, None, 0.0),
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries to `q_out` (tokens, num_heads * head_dim), keys and values to their slots of `cache`.

        qkv is (tokens, (num_heads + 2 * num_kv_heads) * head_dim) float32, positions and slots (tokens,)
        int32, cache (2, num_blocks, num_kv_heads, block_size, head_dim), contiguous. `gains`: RMSNorm's of
        a head of queries and of keys, (head_dim,) float32 or None, and its eps. `rope`: from `rope_table`.
        Rounded once, at the end; for a float8 cache scaled before, see `cache_type`.
        """
        dim, q_gain, k_gain, eps = params.head_dim, *gains
        rotary = 0 if rope is None else 2 * rope.shape[2]
        if cache.shape[2] != params.num_kv_heads or cache.shape[4] != dim or not cache.is_contiguous():
            raise ValueError(f"a cache of shape {tuple(cache.shape)} is not one of {params}")
        if rotary > dim:
            raise ValueError(f"{rotary} columns to rotate in heads of {dim}")
        wide = power_of_two(dim)
        most = power_of_two(max(params.num_heads, params.num_kv_heads))
        heads = min(most, max(1, _HEAD_COLUMNS // wide))
        blocks = -(-params.num_heads // heads) + 2 * -(-params.num_kv_heads // heads)
        arguments = {
            "qkv": qkv, "positions": positions, "slots": slots, "q_gain": qkv if q_gain is None else q_gain,
            "k_gain": qkv if k_gain is None else k_gain, "table": qkv if rope is None else rope,
            "cache": cache, "q_out": q_out, "eps": float(eps), "qkv_stride": qkv.stride(0),
            "q_stride": q_out.stride(0), "values": cache.stride(0),
        }  # fmt: skip
        constants = {
            "Q_HEADS": params.num_heads, "KV_HEADS": params.num_kv_heads, "DIM": dim, "ROTARY": rotary,
            "CACHE_BLOCK": cache.shape[3], "Q_NORM": q_gain is not None, "K_NORM": k_gain is not None,
            "HEADS": heads, "HALF": power_of_two(rotary // 2) if rotary else 0,
            "REST": power_of_two(dim - rotary) if dim > rotary else 0, "WIDE": wide,
        }  # fmt: skip
        self._launch(
            "rope_store", (blocks, len(q_out), 1), arguments, constants, tokens=len(q_out),
            aligned=dim % 16 == 0,
        )  # fmt: skip
        return q_out

    # -- single elements -----------------------------------------------------------------------------------

    def glu(self, kind: Glu, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._elementwise(kind.value, gate, up, out)

    def gelu(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._elementwise("gelu", x, None, out)

    def add(self, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._elementwise("add", x, y, out)

    def scale(self, x: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
        return self._elementwise("scale", x, None, out, factor=factor)

    def cast(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._elementwise("cast", x, None, out)

    def _elementwise(
        self,
        op: str,
        x: torch.Tensor,
        y: torch.Tensor | None,
        out: torch.Tensor,
        *,
        indices: torch.Tensor | None = None,
        factor: float = 1.0,
    ) -> torch.Tensor:
        tokens, n = out.shape
        second = x if y is None else y
        block = min(_BLOCK, power_of_two(n))
        arguments = {
            "x": x, "y": second, "indices": out if indices is None else indices, "out": out,
            "factor": float(factor), "x_stride": x.stride(0), "y_stride": second.stride(0),
            "out_stride": out.stride(0),
        }  # fmt: skip
        constants = {
            "N": n, "OP": op, "BINARY": y is not None, "GATHER": indices is not None, "BLOCK": block,
        }  # fmt: skip
        self._launch(
            "elementwise", (-(-n // block), tokens, 1), arguments, constants, tokens=tokens,
            warps=max(1, block // 256),
        )  # fmt: skip
        return out

    # -- experts -------------------------------------------------------------------------------------------

    def linear_f32(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """`out` (tokens, n) = x (tokens, k) @ w (n, k).T + bias (n,), products and sums in float32."""
        (n, k), tokens = w.shape, len(x)
        block, warps = row_shape(k)
        blocks = -(-n // _ROUTER_OUTPUTS)
        each = max(1, tokens * blocks // _ROUTER_PROGRAMS)
        arguments = {
            "x": x, "w": w, "bias": w if bias is None else bias, "out": out, "tokens": tokens,
            "per_program": each, "x_stride": x.stride(0), "w_stride": w.stride(0),
            "out_stride": out.stride(0), "n": n,
        }  # fmt: skip
        constants = {"K": k, "BIAS": bias is not None, "OUTPUTS": _ROUTER_OUTPUTS, "BLOCK": block}
        self._launch(
            "linear_f32", (blocks, -(-tokens // each), 1), arguments, constants, tokens=tokens, warps=warps,
            aligned=k % 16 == 0, few=("bias", "out", "out_stride"),
        )  # fmt: skip
        return out

    def route(self, logits: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """The experts of highest logit, highest first, of equal ones the lower index, and their softmax.

        logits (tokens, num_experts), experts (tokens, top_k) int32, weights (tokens, top_k) float32.
        """
        num_experts, top_k = logits.shape[1], experts.shape[1]
        if not 1 <= top_k <= min(num_experts, MAX_TOP_K) or num_experts > MAX_EXPERTS:
            raise ValueError(
                f"{top_k} of {num_experts} experts; the kernel chooses up to {MAX_TOP_K} of {MAX_EXPERTS}"
            )
        arguments = {
            "logits": logits, "experts": experts, "weights": weights, "logits_stride": logits.stride(0),
            "experts_stride": experts.stride(0), "weights_stride": weights.stride(0),
        }  # fmt: skip
        constants = {
            "N": num_experts, "TOP_K": top_k, "BLOCK": power_of_two(num_experts),
            "SLOTS": power_of_two(top_k),
        }  # fmt: skip
        self._launch(
            "route", (len(logits), 1, 1), arguments, constants, tokens=len(logits), warps=1, aligned=False
        )

    def combine(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Slots x (tokens, top_k * n), times weights (tokens, top_k), added up in order; then + residual."""
        tokens, n = out.shape
        block = min(_BLOCK, power_of_two(n))
        added = out if residual is None else residual
        arguments = {
            "x": x, "weights": weights, "residual": added, "out": out, "x_stride": x.stride(0),
            "weights_stride": weights.stride(0), "residual_stride": added.stride(0),
            "out_stride": out.stride(0),
        }  # fmt: skip
        constants = {
            "N": n, "SLOTS": weights.shape[1], "RESIDUAL": residual is not None, "BLOCK": block,
        }  # fmt: skip
        self._launch(
            "combine", (-(-n // block), tokens, 1), arguments, constants, tokens=tokens,
            warps=max(1, block // 256),
        )  # fmt: skip
        return out

    # -- launches ------------------------------------------------------------------------------------------

    def _launch(
        self,
        function: str,
        grid: Grid,
        arguments: Mapping[str, Argument],
        constants: Mapping[str, Any],
        *,
        tokens: int,
        warps: int = 4,
        aligned: bool | None = None,
        few: tuple[str, ...] = (),
    ) -> None:
        """`aligned`: tensors start, and strides are, at multiples of 16 bytes and elements; False: they are
        not taken to be; None: as they are found. `few`: names for which it does not matter, nor for integers.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        strides = {name for name in arguments if name.endswith("stride") or name == "values"}
        numbers = {name for name, tensor in tensors.items() if tensor.dtype is torch.int32} | {*few}
        odd = {name for name, tensor in tensors.items() if tensor.data_ptr() % 16}
        odd |= {name for name in strides if arguments[name] % 16}
        if aligned and odd - numbers:
            raise ValueError(f"{function} needs rows aligned to 16 elements: {sorted(odd - numbers)}")
        odd = odd | numbers if aligned is not False else tensors.keys() | strides
        kernel = Kernel(
            module=_MODULES[function],
            function=function,
            arguments=tuple((name, _type_of(name, value)) for name, value in arguments.items()),
            constants=(*constants.items(), ("OVERLAP", self._kernels.overlap_mode(tokens))),
            aligned=tuple(sorted(strides - odd)),
            loose=tuple(sorted(odd & tensors.keys())),
            warps=warps,
            fused=False,
        )
        self._kernels.launch(kernel, grid, *arguments.values())


def _type_of(name: str, value: Argument) -> str:
    """Triton's type of an argument."""
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if name == "values" else "i32"
