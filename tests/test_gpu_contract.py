"""Which ways of a product the price of the contract is measured against."""

from __future__ import annotations

import pytest

import gpu_contract
from worker_orcd.kernels.cuda.variants import choose_tile, shape_of


@pytest.mark.parametrize("model", gpu_contract.MODELS)
def test_there_are_ways_beside_the_contract_s(model: str):
    """Every number of chunks can be summed, and the contract's is among them."""
    for name, n, k, _count in gpu_contract.MODELS[model]:
        shape = shape_of(name, n, k)
        for tokens in gpu_contract.TOKENS:
            ways = list(gpu_contract.free_ways(shape, n, tokens))
            assert len(set(ways)) == len(ways)
            assert {free.chunks for free, _ in ways} > {shape.chunks}
            assert all(k // shape.step % free.chunks == 0 for free, _ in ways)
            assert all(free.chunks > 1 for free, tile in ways if tile.split)
            chosen = choose_tile(shape, n, tokens)
            alike = [tile for free, tile in ways if free == shape and tile.split == chosen.split]
            assert (chosen.rows, chosen.tokens) in {(tile.rows, tile.tokens) for tile in alike}
