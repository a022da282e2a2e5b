"""What block tables promise of cache groups and sliding windows, one example each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine_block_checks import Check
from engine_fakes import alone
from engine_world import Arrival, Code, Scenario, World, play

WINDOW_CHECKS: list[Check] = []


def check(function: Check) -> Check:
    WINDOW_CHECKS.append(function)
    return function


def make(code: Code, **sizes: Any) -> World:
    return World(code, Scenario(arrivals=[], **sizes))


def finish(world: World) -> None:
    while world.step():
        world.tick += 1


def tables_of(code: Code, *sizes: tuple[int | None, int], block_size: int = 4) -> Any:
    return code.tables.BlockTables(code.groups(*sizes), block_size)


def cache(tables: Any, group: int, names: str) -> dict[str, int]:
    """Free blocks of one group that are known under these names, a letter each."""
    pool = tables.groups[group].pool
    block_ids = pool.allocate(len(names))
    for block_id, name in zip(block_ids, names, strict=True):
        pool.publish(block_id, name.encode())
    pool.release(block_ids)
    return dict(zip(names, block_ids, strict=True))


def hashes(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def held(tables: Sequence[Sequence[int]]) -> list[int]:
    return [sum(1 for block_id in table if block_id) for table in tables]


@check
def a_long_prompt_holds_no_more_than_its_window(code: Code) -> None:
    world = make(code, num_blocks=40, windowed=((10, 12),), block_size=4, budget=16)
    story = world.submit(Arrival(0, [5] * 100, 20, min_tokens=20))
    most = 0
    while world.step():
        world.tick += 1
        if story.final is None:
            full, windowed = held(story.sequence.block_tables)
            assert full >= 25
            most = max(most, windowed)
    assert most == 3  # touched by the nine tokens behind the next one
    assert story.tokens == alone([5] * 100, 20, min_tokens=20, windows=(None, 10))


@check
def a_model_of_windows_only_is_not_bounded_by_its_pool(code: Code) -> None:
    world = make(code, num_blocks=0, windowed=((10, 6),), block_size=4, budget=64)
    story = world.submit(Arrival(0, [5] * 100, 20, min_tokens=20))
    finish(world)
    assert story.tokens == alone([5] * 100, 20, min_tokens=20, windows=(10,))


@check
def a_pool_bounds_the_length_where_it_is_smaller_than_the_window(code: Code) -> None:
    assert tables_of(code, (None, 6)).max_len == 20
    assert tables_of(code, (None, 6), (100, 9)).max_len == 20
    assert tables_of(code, (None, 9), (100, 6)).max_len == 20
    assert tables_of(code, (10, 4)).max_len == 12  # four blocks are needed
    assert tables_of(code, (10, 5)).max_len == 2**31 - 1
    assert tables_of(code, (1, 2)).max_len == 2**31 - 1


@check
def a_prefix_needs_the_blocks_that_its_window_sees(code: Code) -> None:
    tables = tables_of(code, (None, 10), (6, 10))  # five tokens behind the next: two blocks
    full, windowed = cache(tables, 0, "abcdef"), cache(tables, 1, "bcef")
    for asked, length in [("abcdef", 6), ("abcdex", 3), ("abcd", 3), ("ab", 0), ("xbcdef", 0), ("", 0)]:
        prefix = tables.find(hashes(asked))
        assert prefix.num_blocks == length
        assert prefix.found[0] == [full[name] for name in asked[:length]]
        assert prefix.found[1] == [windowed[name] for name in asked[max(0, length - 2) : length]]


@check
def a_prefix_that_fits_in_the_window_needs_all_its_blocks(code: Code) -> None:
    tables = tables_of(code, (20, 10))
    cache(tables, 0, "ac")
    assert [tables.find(hashes(asked)).num_blocks for asked in ("a", "ab", "abc", "ac")] == [1, 1, 1, 2]


@check
def groups_agree_on_a_prefix(code: Code) -> None:
    tables = tables_of(code, (6, 10), (5, 10), (None, 10))
    cache(tables, 0, "abde")
    cache(tables, 1, "bde")
    cache(tables, 2, "abcd")
    # The third allows four blocks, the first then not four, nor three, but two; and so do the others.
    assert tables.find(hashes("abcde")).num_blocks == 2
    tables = tables_of(code, (6, 10), (5, 10))
    cache(tables, 0, "abcd")
    cache(tables, 1, "abd")
    assert tables.find(hashes("abcd")).num_blocks == 4
    assert tables.find(hashes("abce")).num_blocks == 2


@check
def a_later_group_may_overrule_the_first(code: Code) -> None:
    tables = tables_of(code, (6, 10), (9, 10))  # both see two blocks
    cache(tables, 0, "acd")
    cache(tables, 1, "abc")
    # Four: not the second. Three: not the first, though it allowed four. Two: neither the first. One.
    assert tables.find(hashes("abcd")).num_blocks == 1


@check
def a_hit_takes_the_window_s_blocks_only(code: Code) -> None:
    world = make(code, num_blocks=40, windowed=((6, 20),), budget=64)
    prompt = list(range(1, 30))
    for cached_tokens in (0, 28):
        story = world.submit(Arrival(world.tick, prompt, 3, min_tokens=3))
        world.step()
        world.tick += 1
        assert story.sequence.num_cached_tokens == cached_tokens
        assert held(story.sequence.block_tables) == [8, 2]
        finish(world)
        assert story.tokens == alone(prompt, 3, min_tokens=3, windows=(None, 6))


@check
def a_hit_is_as_long_as_the_window_s_blocks_allow(code: Code) -> None:
    world = make(code, num_blocks=60, windowed=((6, 13),), budget=64)
    prompt = list(range(1, 42))
    world.submit(Arrival(0, prompt, 1))
    finish(world)
    world.submit(
        Arrival(world.tick, [9] * 17, 1)
    )  # five of the window's twelve blocks: two unused ones, 8, 7, 6
    finish(world)
    story = world.submit(Arrival(world.tick, [*prompt[:40], 77], 1))
    finish(world)
    assert story.final is not None and story.final.num_cached_tokens == 24
    assert story.tokens == alone(story.arrival.prompt, 1, windows=(None, 6))


@check
def a_shortage_behind_a_window_preempts_the_latest(code: Code) -> None:
    world = make(code, num_blocks=60, windowed=((13, 8),), budget=64, caching=False)
    for _ in range(3):
        world.submit(Arrival(0, [1, 2, 3, 4], 20, min_tokens=20))
    finish(world)
    assert [story.sequence.num_preemptions for story in world.stories.values()] == [0, 1, 1]
    for story in world.stories.values():
        assert story.tokens == alone([1, 2, 3, 4], 20, min_tokens=20, windows=(None, 13))


@check
def a_prompt_without_a_block_gives_way(code: Code) -> None:
    shared = [Arrival(0, [7] * 9 + [0], 1)] * 2  # they begin with the same blocks and need them twice later
    world = play(
        code,
        Scenario(shared, num_blocks=47, windowed=((3, 6),), block_size=1, budget=2, max_seqs=2),
    )
    first, second = (story.sequence.num_preemptions for story in world.stories.values())
    assert first == 0 and second > 0


@check
def room_is_asked_of_every_group(code: Code) -> None:
    for sizes in [((None, 9), (5, 3)), ((None, 3), (5, 9)), ((5, 9), (None, 3))]:
        tables = tables_of(code, *sizes)
        prefix = tables.find([])
        assert tables.has_room(prefix, 8, 0) and tables.has_room(prefix, 4, 1)
        assert not tables.has_room(prefix, 8, 1)


@check
def room_counts_what_others_would_give_back(code: Code) -> None:
    world = make(code, num_blocks=9, windowed=((9, 9),), budget=64, max_seqs=8)
    tables = world.scheduler._tables
    for prompt in ([1] * 8 + [2], [1] * 8 + [3]):
        story = world.submit(Arrival(world.tick, prompt, 9, min_tokens=9))
        world.step()  # the second shares two blocks with the first
        world.tick += 1
    both, prefix = list(world.scheduler.running), tables.find([])
    assert [pool.num_free for pool in world.pools] == [4, 4]
    assert tables.has_room(prefix, 16, 0) and not tables.has_room(prefix, 16, 1)
    assert tables.has_room(prefix, 16, 1, [story.sequence])
    assert not tables.has_room(prefix, 16, 2, [story.sequence])  # what it shares is not its to give
    assert tables.has_room(prefix, 16, 2, both) and not tables.has_room(prefix, 16, 3, both)
    known = tables.find(story.sequence.block_hashes[:2])
    assert known.num_blocks == 2
    assert tables.has_room(known, 24, 0) and not tables.has_room(known, 24, 1)
    world.take(world.scheduler.cancel(0))
    alone_left = [story.sequence]
    assert tables.has_room(known, 24, 2, alone_left)
    assert not tables.has_room(known, 24, 3, alone_left)  # the two that are found would be taken, not freed
