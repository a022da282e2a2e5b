"""
Routing tokens to experts: the router's product, in float32 throughout, and the choice.

Device code (Triton). All sums have one order, which follows from the width alone (see `norms`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.overlap import wait


@triton.jit
def linear_f32(x, w, bias, out, tokens, per_program, x_stride, w_stride, out_stride, n, K: tl.constexpr,
               BIAS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
               OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`out` (tokens, n) = x (tokens, K) @ w (n, K).T + bias, all float32.

    Programs: (blocks of OUTPUTS outputs, runs of `per_program` tokens). A program keeps its rows of w.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, BLOCK)
    inside = column < K
    valid = output < n
    rows = tl.load(
        w + output[:, None] * w_stride + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0
    )
    wait(OVERLAP)
    token = tl.program_id(1) * per_program
    end = tl.minimum(token + per_program, tokens)
    while token < end:
        at = token.to(tl.int64)
        row = tl.load(x + at * x_stride + column, mask=inside, other=0.0)
        total = tl.sum(rows * row[None, :], 1)
        if BIAS:
            total += tl.load(bias + output, mask=valid, other=0.0)
        tl.store(out + at * out_stride + output, total, mask=valid)
        token += 1


@triton.jit
def sortable(logit, index):
    """A number for each expert that is larger the higher its logit, then the lower its index; never equal.

    Zeros of both signs are equal.
    """
    bits = logit.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 8) | (255 - index)


@triton.jit
def logit_of(key):
    ordered = (key >> 8).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def route(logits, experts, weights, logits_stride, experts_stride, weights_stride, N: tl.constexpr,
          TOP_K: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
          OVERLAP: tl.constexpr = 0):  # fmt: skip
    """The TOP_K of N logits a token, highest first, and the softmax over them. Programs: tokens.

    BLOCK and SLOTS: powers of two from N and from TOP_K.
    """
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    LOWEST: tl.constexpr = -(1 << 62)
    logit = tl.load(logits + token * logits_stride + index, mask=index < N, other=0.0)
    keys = tl.where(index < N, sortable(logit, index), LOWEST)
    chosen = tl.full((SLOTS,), LOWEST, tl.int64)
    for i in tl.static_range(TOP_K):
        best = tl.max(keys, 0)
        chosen = tl.where(slot == i, best, chosen)
        keys = tl.where(keys == best, LOWEST, keys)
    mask = slot < TOP_K
    highest = logit_of(tl.max(chosen, 0))
    numerator = tl.where(mask, tl.exp(logit_of(chosen) - highest), 0.0)
    weight = tl.div_rn(numerator, tl.sum(numerator, 0) + tl.zeros((SLOTS,), tl.float32))
    tl.store(weights + token * weights_stride + slot, weight, mask=mask)
    tl.store(experts + token * experts_stride + slot, 255 - (chosen & 255).to(tl.int32), mask=mask)
