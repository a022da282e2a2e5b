"""
RMSNorm and LayerNorm, with the residual sum before them if it is not part of a product.

Device code (Triton). Programs: (runs of a row, tokens). A program has one run in its registers, in PIECES
vectors of PIECE columns: four columns a thread, so that the compiler deals them out in one way whatever the
types beside. A sum first adds the pieces, in order, then the columns of what is left. So the order follows
from the two numbers, which `operations.row_shape` chooses by the width alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker_orcd.kernels.cuda.elementwise import rounded
from worker_orcd.kernels.cuda.overlap import wait


@triton.jit
def mean(pieces, N: tl.constexpr):
    """Of N numbers in vectors padded with zeros."""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i]
    return tl.div_rn(tl.sum(total, 0), N * 1.0)


@triton.jit
def norm(x, y, gain, bias, total, out, eps, x_stride, y_stride, total_stride, out_stride, N: tl.constexpr,
         ADD: tl.constexpr, CENTRED: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
         OVERLAP: tl.constexpr = 0):  # fmt: skip
    """`out` = x / sqrt(mean(x²) + eps) * gain of each run of N columns.

    CENTRED: x less its mean, and + bias. ADD: of x + y, which is written to `total`.
    """
    token = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * N
    x += token * x_stride + start
    y += token * y_stride + start
    total += token * total_stride + start
    out += token * out_stride + start
    values = ()
    gains = ()  # and biases: all are asked for before anything is waited for
    biases = ()
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        gains = gains + (tl.load(gain + column, mask=column < N, other=0.0),)
        if CENTRED:
            biases = biases + (tl.load(bias + column, mask=column < N, other=0.0),)
    wait(OVERLAP)
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        value = tl.load(x + column, mask=column < N, other=0.0)
        if ADD:
            value += tl.load(y + column, mask=column < N, other=0.0)
            tl.store(total + column, value, mask=column < N)
        values = values + (value,)
    if CENTRED:
        middle = mean(values, N)
        centred = ()
        for i in tl.static_range(PIECES):
            column = i * PIECE + tl.arange(0, PIECE)
            centred = centred + (tl.where(column < N, values[i] - middle, 0.0),)
        values = centred
    squares = ()
    for i in tl.static_range(PIECES):
        squares = squares + (values[i] * values[i],)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean(squares, N) + eps))
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        value = values[i] * factor * gains[i]
        if CENTRED:
            value += biases[i]
        tl.store(out + column, rounded(value, out), mask=column < N)
