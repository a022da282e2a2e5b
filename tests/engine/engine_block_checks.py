"""What a block pool promises, one example each. Each check takes the code under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_world import Code

Check = Callable[[Code], None]
BLOCK_CHECKS: list[Check] = []


def check(function: Check) -> Check:
    BLOCK_CHECKS.append(function)
    return function


def cached(pool: Any, *names: bytes) -> list[int]:
    """Blocks of one sequence, published under these names and held."""
    block_ids = pool.allocate(len(names))
    for block_id, name in zip(block_ids, names, strict=True):
        pool.publish(block_id, name)
    return block_ids


@check
def the_null_block_is_never_given_out(code: Code) -> None:
    pool = code.blocks.BlockPool(5)
    assert pool.num_usable == pool.num_free == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]


@check
def a_free_block_is_found_until_it_is_taken(code: Code) -> None:
    pool = code.blocks.BlockPool(3)
    held = cached(pool, b"a", b"b")
    assert pool.find([b"a", b"b", b"c"]) == held
    pool.release(held)
    assert pool.find([b"a", b"b"]) == held and pool.num_free == 2
    pool.take(held)
    assert pool.num_free == 0 and [pool.ref_count(b) for b in held] == [1, 1]
    pool.release(held)
    pool.allocate(2)
    assert pool.find([b"a"]) == []


@check
def a_prefix_ends_at_the_first_unknown_block(code: Code) -> None:
    pool = code.blocks.BlockPool(4)
    [a, _b] = cached(pool, b"a", b"b")
    assert pool.find([b"a", b"x", b"b"]) == [a]


@check
def the_least_recently_freed_is_reused_first(code: Code) -> None:
    pool = code.blocks.BlockPool(4)
    [a], [b], [c] = (cached(pool, name) for name in (b"a", b"b", b"c"))
    for block_id in (b, a, c):
        pool.release([block_id])
    pool.take([b])
    pool.release([b])  # b was used again
    assert pool.allocate(1) == [a]
    assert pool.allocate(2) == [c, b]


@check
def tails_are_reused_before_heads(code: Code) -> None:
    pool = code.blocks.BlockPool(4)
    held = cached(pool, b"a", b"b", b"c")
    pool.release(held)
    pool.allocate(1)
    assert pool.find([b"a", b"b", b"c"]) == held[:2]


@check
def blocks_that_cache_nothing_are_reused_first(code: Code) -> None:
    pool = code.blocks.BlockPool(3)
    [a] = cached(pool, b"a")
    [plain] = pool.allocate(1)
    pool.release([a])
    pool.release([plain])
    assert pool.allocate(1) == [plain]


@check
def a_shared_block_is_free_when_the_last_holder_lets_go(code: Code) -> None:
    pool = code.blocks.BlockPool(2)
    held = cached(pool, b"a")
    pool.take(held)
    pool.release(held)
    assert pool.num_free == 0
    pool.release(held)
    assert pool.num_free == 1
    with pytest.raises(AssertionError):
        pool.release(held)


@check
def the_first_of_equal_blocks_is_the_one_found(code: Code) -> None:
    pool = code.blocks.BlockPool(4)
    [first], [second] = cached(pool, b"a"), cached(pool, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([second])
    pool.allocate(1)  # forgets what `second` cached, which is nothing
    assert pool.find([b"a"]) == [first]


@check
def what_would_stay_free_counts_only_free_blocks(code: Code) -> None:
    pool = code.blocks.BlockPool(5)
    held, freed = cached(pool, b"a"), cached(pool, b"b")
    pool.release(freed)
    assert pool.num_free_after([*held, *freed]) == 2


@check
def a_hash_names_tokens_parents_and_salt(code: Code) -> None:
    hash_block, hash_salt = code.blocks.hash_block, code.blocks.hash_salt
    root = hash_salt(b"")
    hashes = {
        hash_block(root, [1, 2]),
        hash_block(root, [2, 1]),
        hash_block(root, [1, 2, 0]),
        hash_block(root, [513]),  # the bytes of 1 and 2 side by side
        hash_block(hash_block(root, [1, 2]), [1, 2]),
        hash_block(hash_salt(b"x"), [1, 2]),
        hash_salt(b"x"),
        root,
    }
    assert len(hashes) == 8
    assert hash_block(root, [1, 2]) == hash_block(root, (1, 2))
