"""
Functions of single elements: gated units, GELU, sums, scaling, casts, rows gathered, experts' slots combined.

Device code (Triton). Programs: (blocks of columns, tokens). How the columns are cut changes no bits. Products
are not fused with sums here (`Kernel.fused`), so what stands here is what is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.backend import CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT
from worker_orcd.kernels.cuda.overlap import wait

_ALPHA, _LIMIT = tl.constexpr(CLAMPED_SWIGLU_ALPHA), tl.constexpr(CLAMPED_SWIGLU_LIMIT)
_LARGEST_HALF = tl.constexpr(65504.0)
_GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def rounded(value, pointer):
    """float32 to what `pointer` points to. Beyond float16's range its largest; NaN stays."""
    if pointer.dtype.element_ty == tl.float16:
        value = tl.clamp(value, -_LARGEST_HALF, _LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def gelu(x):
    """By the tanh approximation: 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u)), which loses nothing at -1."""
    return x / (1.0 + tl.exp(-_GELU_SLOPE * (x + _GELU_CUBIC * x * x * x)))


@triton.jit
def applied(x, y, factor, OP: tl.constexpr):
    """Operation OP. `y` is read by those that have two operands, `factor` by `scale`."""
    if OP == "add":
        return x + y
    elif OP == "scale":
        return x * factor
    elif OP == "gelu":
        return gelu(x)
    elif OP == "swiglu":
        return x / (1.0 + tl.exp(-x)) * y
    elif OP == "geglu":
        return gelu(x) * y
    elif OP == "clamped_swiglu":
        gate = tl.minimum(x, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(y, -_LIMIT, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return gate / (1.0 + tl.exp(-_ALPHA * gate)) * (up + 1.0)
    else:
        tl.static_assert(OP == "cast")
        return x


@triton.jit
def elementwise(x, y, indices, out, factor, x_stride, y_stride, out_stride, N: tl.constexpr,
                OP: tl.constexpr, BINARY: tl.constexpr, GATHER: tl.constexpr,
                BLOCK: tl.constexpr, OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`out` (tokens, N) = OP of x and y (tokens, N); with GATHER, of rows `indices` of x."""
    wait(OVERLAP)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    row = token
    if GATHER:
        row = tl.load(indices + token).to(tl.int64)
    mask = column < N
    a = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    b = a
    if BINARY:
        b = tl.load(y + token * y_stride + column, mask=mask).to(tl.float32)
    value = applied(a, b, factor, OP)
    tl.store(out + token * out_stride + column, rounded(value, out), mask=mask)


@triton.jit
def combine(x, weights, residual, out, x_stride, weights_stride, residual_stride, out_stride,
            N: tl.constexpr, SLOTS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
            OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`out` (tokens, N): x (tokens, SLOTS * N), slots weighted and added up in order; then the residual."""
    wait(OVERLAP)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    mask = column < N
    at = x + token * x_stride + column
    weight = weights + token * weights_stride
    total = tl.load(at, mask=mask).to(tl.float32) * tl.load(weight)
    for slot in tl.static_range(1, SLOTS):
        total += tl.load(at + slot * N, mask=mask).to(tl.float32) * tl.load(weight + slot)
    if RESIDUAL:
        total = tl.load(residual + token * residual_stride + column, mask=mask) + total
    tl.store(out + token * out_stride + column, rounded(total, out), mask=mask)
