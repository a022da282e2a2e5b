"""
The block tables of running sequences, one for each cache group, and the pools their blocks come from.

A model's layers form cache groups: the layers that see everything, and those of each sliding window. A group
has its own pool and so its own block numbers; a block's place in a table is its first position over
`block_size`, in every group.

* A full group's table holds every token known at admission. A windowed group's is extended as tokens are
  computed and shortened after each step: blocks that no later token sees go back to the pool, and the null
  block stands in their place. Between steps it holds what the next token sees, and a block for that token.
* A released block keeps its hash, so a later prompt may find it. A cached prefix can be used when each group
  has the blocks of it that the token after it sees; the others need not exist any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from worker_orcd.engine.blocks import NULL_BLOCK, BlockPool
from worker_orcd.engine.messages import GroupBlocks
from worker_orcd.sequence import Sequence

_UNBOUNDED = 2**31 - 1  # tokens: positions are int32


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that need the same blocks, and where those come from."""

    pool: BlockPool
    window: int | None = None  # a token at p sees p - window + 1 … p; None: all


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cached beginning of a prompt."""

    num_blocks: int
    found: tuple[list[int], ...]  # for each group its last blocks: those that the next token sees


class BlockTables:
    """Owns the cache groups; on the engine's thread.

    "Next" is the first token that is in no step yet, made or under way. Invariant: of the blocks that a table
    holds, those visible to the first token that is not computed yet are not null, and a pool counts one
    reference for each table that a block is in.
    """

    def __init__(self, groups: SequenceABC[CacheGroup], block_size: int) -> None:
        self.groups = tuple(groups)
        self._block_size = block_size
        # Whole blocks that a token sees behind it, at most; None: all there are.
        self._behind = [None if g.window is None else self._num_blocks(g.window - 1) for g in self.groups]
        self._windowed = [(i, g.pool, g.window) for i, g in enumerate(self.groups) if g.window is not None]

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that always fits alone."""
        bounds = [
            group.pool.num_usable * self._block_size
            for group, behind in zip(self.groups, self._behind, strict=True)
            if behind is None or group.pool.num_usable < behind + 1
        ]
        return min(bounds, default=_UNBOUNDED)

    def counts(self) -> tuple[GroupBlocks, ...]:
        return tuple(
            GroupBlocks(window=group.window, free=group.pool.num_free, total=group.pool.num_usable)
            for group in self.groups
        )

    # -- admission -----------------------------------------------------------------------------------------

    def find(self, block_hashes: SequenceABC[bytes]) -> Prefix:
        """The longest prefix of these blocks that can be used. Takes no reference."""
        num_blocks, num_agreeing, turn = len(block_hashes), 0, 0
        while num_agreeing < len(self.groups):  # a group may shorten what those before it agreed on
            pool, behind = self.groups[turn].pool, self._behind[turn]
            known = block_hashes[:num_blocks]
            longest = len(pool.find(known)) if behind is None else pool.longest_prefix(known, behind)
            num_agreeing = num_agreeing + 1 if longest == num_blocks else 1
            num_blocks, turn = longest, (turn + 1) % len(self.groups)
        return Prefix(
            num_blocks,
            tuple(
                group.pool.find(block_hashes[self._first_seen(behind, num_blocks) : num_blocks])
                for group, behind in zip(self.groups, self._behind, strict=True)
            ),
        )

    def has_room(
        self, prefix: Prefix, num_tokens: int, spare: int, without: SequenceABC[Sequence] = ()
    ) -> bool:
        """Whether `admit` would leave `spare` blocks in each pool, if the sequences `without` gave up theirs.

        A block shared by two of those is not counted as theirs to give.
        """
        for index, (group, found) in enumerate(zip(self.groups, prefix.found, strict=True)):
            held = {b for s in without for b in s.block_tables[index] if b != NULL_BLOCK}.difference(found)
            freed = sum(1 for block_id in held if group.pool.ref_count(block_id) == 1)
            missing = self._missing(index, prefix, num_tokens)
            if missing + spare > group.pool.num_free_after(found) + freed:
                return False
        return True

    def admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a sequence its tables: the prefix, which is then computed, and blocks for what follows."""
        for index, (group, found) in enumerate(zip(self.groups, prefix.found, strict=True)):
            group.pool.take(found)
            fresh = group.pool.allocate(self._missing(index, prefix, len(sequence.token_ids)))
            sequence.block_tables.append([NULL_BLOCK] * (prefix.num_blocks - len(found)) + found + fresh)
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = prefix.num_blocks * self._block_size

    def _missing(self, index: int, prefix: Prefix, num_tokens: int) -> int:
        """Blocks to allocate at admission: for all tokens, but no more than one token can ask for."""
        end, behind = self._num_blocks(num_tokens), self._behind[index]
        if behind is not None:
            end = min(end, self._first_seen(behind, prefix.num_blocks) + behind + 1)
        return end - prefix.num_blocks

    # -- running -------------------------------------------------------------------------------------------

    def reach(self, sequence: Sequence) -> int:
        """How many tokens can be computed next with the blocks held and those that are free."""
        num_blocks = min(
            len(table) + group.pool.num_free
            for group, table in zip(self.groups, sequence.block_tables, strict=True)
        )
        return num_blocks * self._block_size - sequence.num_scheduled_tokens

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold blocks for the next `num_tokens` tokens. False, and nothing done, where a pool has too few."""
        num_blocks = self._num_blocks(sequence.num_scheduled_tokens + num_tokens)
        if self._shortest(sequence) >= num_blocks:  # as most that decode have it: of each block all but once
            return True
        lacking = [
            (self.groups[index].pool, table)
            for index, table in enumerate(sequence.block_tables)
            if len(table) < num_blocks
        ]
        if any(num_blocks - len(table) > pool.num_free for pool, table in lacking):
            return False
        for pool, table in lacking:
            table += pool.allocate(num_blocks - len(table))
        return True

    def extend_all(self, num_tokens: Mapping[Sequence, int], spare: int = 0) -> bool:
        """Hold blocks for so many next tokens of each. False, and nothing done, where not all can have them
        and, if there are any to be had, leave `spare` blocks in each pool.
        """
        size = self._block_size
        lacking = {
            s: s.num_scheduled_tokens + n
            for s, n in num_tokens.items()
            if self._shortest(s) * size < s.num_scheduled_tokens + n
        }
        for index, group in enumerate(self.groups):
            missing = sum(
                max(0, self._num_blocks(end) - len(s.block_tables[index])) for s, end in lacking.items()
            )
            if missing and missing + spare > group.pool.num_free:
                return False
        for s in lacking:
            self.extend(s, num_tokens[s])
        return True

    @staticmethod
    def _shortest(sequence: Sequence) -> int:
        """Blocks, null ones too, of the table that has the fewest."""
        tables = sequence.block_tables
        return len(tables[0]) if len(tables) == 1 else min(map(len, tables))

    def publish(self, sequence: Sequence, first: int, end: int) -> None:
        """Let others find these computed blocks, which are hashed and held in every group."""
        for group, table in zip(self.groups, sequence.block_tables, strict=True):
            for index in range(first, end):
                group.pool.publish(table[index], sequence.block_hashes[index])

    def release_behind(self, sequence: Sequence) -> None:
        """Give back the blocks that no later token sees."""
        for index, pool, window in self._windowed:
            table = sequence.block_tables[index]
            first = end = max(0, sequence.num_computed_tokens - window + 1) // self._block_size
            while first > 0 and table[first - 1] != NULL_BLOCK:
                first -= 1
            if first < end:
                pool.release(table[first:end])
                table[first:end] = [NULL_BLOCK] * (end - first)

    def release(self, sequence: Sequence) -> None:
        """Give back everything."""
        for index, table in enumerate(sequence.block_tables):
            self.groups[index].pool.release([block_id for block_id in table if block_id != NULL_BLOCK])
        sequence.block_tables = []

    # -- arithmetic ----------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    @staticmethod
    def _first_seen(behind: int | None, num_blocks: int) -> int:
        """The first block that the token after `num_blocks` whole blocks sees."""
        return 0 if behind is None else max(0, num_blocks - behind)
