"""Routing: which experts are chosen, how they are weighted, and the lists that `expert_linear` goes by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels.products import highest, run, same_bits
from worker_orcd.kernels.cpu.library import Kind, Library, Op
from worker_orcd.kernels.cpu.program import ROUTING_LISTS
from worker_orcd.kernels.cpu.reference import ReferenceBackend

pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


@dataclass(frozen=True)
class Routing:
    """What routing.h says, as arrays."""

    experts: np.ndarray  # (tokens, top_k)
    weights: np.ndarray  # (tokens, top_k)
    pairs: np.ndarray  # (tokens * top_k,)
    groups: np.ndarray  # (tokens * top_k,)
    starts: np.ndarray  # (tokens * top_k,)


def route(library: Library, logits: np.ndarray, top_k: int) -> Routing:
    tokens = len(logits)
    out = np.zeros((tokens, ROUTING_LISTS, top_k), np.int32)
    operation = Op(
        kind=Kind.ROUTE, x=logits.ctypes.data, ldx=logits.shape[1], out=out.ctypes.data,
        ldout=ROUTING_LISTS * top_k, n=logits.shape[1], top_k=top_k,
    )  # fmt: skip
    assert run(library, [operation], tokens) == 0
    experts, weights, pairs, groups, starts = (out[:, i].copy() for i in range(ROUTING_LISTS))
    return Routing(experts, weights.view(np.float32), pairs.ravel(), groups.ravel(), starts.ravel())


CASES = [(1, 32, 4), (1, 128, 8), (7, 5, 5), (64, 40, 20), (300, 128, 8), (3, 1, 1)]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), CASES)
def test_experts_weights_and_lists(
    library: Library, isas: list[str], tokens: int, num_experts: int, top_k: int
) -> None:
    logits = 3 * np.random.default_rng(tokens).standard_normal((tokens, num_experts)).astype(np.float32)
    logits = np.round(logits, 1)  # so that there are ties
    want = highest(logits, top_k)
    chosen = np.take_along_axis(logits, want, 1).astype(np.float64)
    exponentials = np.exp(chosen - chosen[:, :1])
    library.force_isa(isas[0])
    first = route(library, logits, top_k)
    np.testing.assert_array_equal(first.experts, want)
    np.testing.assert_allclose(
        first.weights, exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-6
    )
    np.testing.assert_array_equal(first.pairs, np.argsort(want.ravel(), kind="stable"))
    groups, starts = np.unique(np.sort(want.ravel()), return_index=True)
    np.testing.assert_array_equal(first.groups[: len(groups)], groups)
    np.testing.assert_array_equal(first.starts[: len(starts)], starts)
    assert (first.starts[len(starts) :] == tokens * top_k).all()
    for isa in isas:
        library.force_isa(isa)
        for threads in (1, 2):
            library.set_threads(threads)
            found = route(library, logits, top_k)
            assert same_bits(found.weights, first.weights)
            for name in ("experts", "pairs"):
                np.testing.assert_array_equal(getattr(found, name), getattr(first, name))


def test_of_equal_logits_the_lower_index_comes_first(library: Library) -> None:
    logits = np.array([[1, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [-1, -2, -1, 5, 5, -1]], np.float32)
    found = route(library, logits, 4)
    np.testing.assert_array_equal(found.experts, [[1, 2, 4, 0], [0, 1, 2, 3], [3, 4, 0, 2]])
    np.testing.assert_array_equal(found.weights[1], np.float32(0.25))


HOSTILE = np.array(
    [
        [np.nan, 1, 2, 3, 4],
        [1, np.nan, 5, np.nan, 0],
        [np.nan] * 5,
        [np.inf, 1, np.inf, 0, 2],
        [-np.inf] * 5,
        [-np.inf, 1, -np.inf, -np.inf, -np.inf],
        [3e38, -3e38, 3e38, 0, 0],
        [1e-45, 0, -0.0, -1e-45, 0],
    ],
    np.float32,
)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_hostile_logits_choose_as_the_reference_does(library: Library, isas: list[str], top_k: int) -> None:
    """NaN counts as the highest: torch's order. Whatever comes, the experts exist and are distinct."""
    want = ReferenceBackend().route(torch.tensor(HOSTILE), top_k)
    for isa in isas:
        library.force_isa(isa)
        found = route(library, HOSTILE, top_k)
        np.testing.assert_array_equal(found.experts, want.experts)
        np.testing.assert_allclose(found.weights, want.weights, rtol=1e-6)
