"""The search for scales: what a block's weights are divided by before they are rounded.

The simple formats take the scale from the largest weight. K-quants and IQ4_NL try some scales around it; for
the codes that each gives, the best scale (and minimum) follows by least squares, where large weights count
more; the try with the smallest error wins. That is the method of llama.cpp's quantiser without an importance
matrix. Rows are independent: (n, k) is n sub-blocks of k weights.

Inside, arrays are (k, m), m sub-blocks at a time: sums then run along vectors, and stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ToValues = Callable[[Floats], Floats]  # scaled weights to the nearest values that codes stand for

_SMALLEST = 1e-37  # scales below it have no reciprocal that is a float32
_ROWS = 1 << 10


def farthest(weights: Floats) -> Floats:
    """Of each row the value farthest from 0, the first of several. (n, k) -> (n, 1)."""
    return np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1)


def reciprocal(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is no float32: what so small a scale multiplies becomes 0."""
    usable = np.abs(scale) > _SMALLEST
    return np.where(usable, 1 / np.where(usable, scale, 1), 0).astype(np.float32)


def rounded(low: int, high: int) -> ToValues:
    """To the nearest integer from `low` to `high`. Overwrites what it is given."""

    def to_values(scaled: Floats) -> Floats:
        np.rint(scaled, out=scaled)
        return np.clip(scaled, low, high, out=scaled)

    return to_values


def fit_scale(weights: Floats, to_values: ToValues, targets: Sequence[float]) -> Floats:
    """The scale of each row, of either sign: (n, k) -> (n,). An error counts by the square of its weight.

    `targets`: the values that the farthest weight of a row is tried at.
    """
    best = np.zeros(len(weights), np.float32)
    for start in range(0, len(weights), _ROWS):
        x = np.ascontiguousarray(weights[start : start + _ROWS].T)  # (k, m)
        high: Floats = x.max(axis=0)
        low: Floats = x.min(axis=0)
        inverse = reciprocal(np.where(high >= -low, high, low))  # (m,)
        importance = x * x
        importance_x = importance * x
        found, gain = best[start : start + _ROWS], np.zeros(x.shape[1], np.float32)
        for target in targets:
            values = to_values(x * np.multiply(inverse, target, dtype=np.float32))
            product = _sum(importance_x * values)
            square = _sum(importance * np.multiply(values, values, out=values))
            # The least squares scale is product / square; it takes product^2 / square off the error.
            scale = product * reciprocal(square)
            gained = scale * product
            better = gained > gain
            found[better], gain[better] = scale[better], gained[better]
    return best


def fit_scale_and_minimum(
    weights: Floats, importance: Floats, top: int, targets: Sequence[float]
) -> tuple[Floats, Floats]:
    """Scale and what is subtracted, neither negative, for codes from 0 to `top`: (n, k) -> (n,) twice.

    `targets`: the codes that the largest weight of a row is tried at, where the smallest is 0.
    """
    scales, minimums = np.zeros(len(weights), np.float32), np.zeros(len(weights), np.float32)
    for start in range(0, len(weights), _ROWS):
        part = slice(start, start + _ROWS)
        x, counts = np.ascontiguousarray(weights[part].T), np.ascontiguousarray(importance[part].T)
        scales[part], minimums[part] = _fit_part(x, counts, top, targets)
    return scales, minimums


def _fit_part(x: Floats, importance: Floats, top: int, targets: Sequence[float]) -> tuple[Floats, Floats]:
    """(k, m) twice -> (m,) twice."""
    low = np.minimum(x.min(axis=0), 0)  # (m,)
    above = x - low  # the line is fitted to this: the numbers are small
    largest: Floats = above.max(axis=0)
    inverse = reciprocal(largest)
    importance_above = importance * above
    total, sum_a = _sum(importance), _sum(importance_above)
    codes, product = np.empty_like(x), np.empty_like(x)

    def sums(target: float) -> _Sums:
        np.multiply(above, np.multiply(inverse, target, dtype=np.float32), out=codes)
        np.clip(np.rint(codes, out=codes), 0, top, out=codes)
        sum_qa = _sum(np.multiply(importance_above, codes, out=product))
        sum_q = _sum(np.multiply(importance, codes, out=product))
        return _Sums(total, sum_a, sum_q, _sum(np.multiply(product, codes, out=product)), sum_qa)

    # The line through the extremes stays where weights of no importance leave nothing to fit.
    scales, minimums = largest / np.float32(top), -low
    error = sums(top).cost(scales, minimums + low)
    for target in targets:
        found = sums(target)
        scale, minimum = found.line(low)
        tried = found.cost(scale, minimum + low)
        better = tried < error
        for kept, new in ((scales, scale), (minimums, minimum), (error, tried)):
            kept[better] = new[better]
    return scales, minimums


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over a row's weights, each times its importance: of 1, a, q, q^2 and q a; all (m,)."""

    total: Floats
    sum_a: Floats
    sum_q: Floats
    sum_qq: Floats
    sum_qa: Floats

    def line(self, low: Floats) -> tuple[Floats, Floats]:
        """Least squares of a + low = scale * q - minimum, with no minimum below 0."""
        determinant: Floats = self.total * self.sum_qq - np.square(self.sum_q)
        inverse = reciprocal(determinant)
        scale = (self.total * self.sum_qa - self.sum_a * self.sum_q) * inverse
        minimum = (self.sum_q * self.sum_qa - self.sum_qq * self.sum_a) * inverse - low
        crosses = minimum < 0
        through_zero = (self.sum_qa + low * self.sum_q) * reciprocal(self.sum_qq)
        return np.where(crosses, through_zero, scale), np.where(crosses, 0, minimum)

    def cost(self, scale: Floats, shift: Floats) -> Floats:
        """The sum of (scale * q - shift - a)^2 but for that of a^2, which no choice changes."""
        mixed = shift * self.sum_q + self.sum_qa
        of_scale = scale * (scale * self.sum_qq - mixed - mixed)
        of_shift = shift * (shift * self.total + self.sum_a + self.sum_a)
        return (of_scale + of_shift).astype(np.float32, copy=False)


def _sum(products: Floats) -> Floats:
    """(k, m) -> (m,)."""
    return np.add.reduce(products, axis=0)
