"""
How many KV blocks each cache group gets, given how many the first has.

* The first group's layers see most: everything, or the largest window. Its number of blocks is what memory
  and settings decide.
* A windowed group behind it gets no more than it can use: for each sequence that may run at a time the blocks
  that its window touches and one to spare, the blocks of one step's tokens, and an eighth of the first
  group's number. That eighth is for the prefix cache: a prefix can be used only while the blocks before its
  end still exist in every group, and those that a window leaves behind are free for reuse. So of what the
  first group remembers, the eighth computed or found last can be continued anywhere, at an eighth of the
  memory.
* One sequence alone fits in all groups if it fits in the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.config import EngineConfig

# The scheduler keeps 150 bytes for each, and slots are int32. 16 million tokens at 16 a block.
MAX_BLOCKS = 1 << 20

_REMEMBERED = 8  # one in so many


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """The KV cache of the layers that see everything (`window` None), or of those with one sliding window."""

    window: int | None  # tokens
    num_blocks: int  # the null block included
    block_bytes: int  # of one block, over all layers of the group

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizing:
    """The arithmetic for sequences of up to `model_len` tokens. Groups are in the order of `cache_groups`."""

    windows: tuple[int | None, ...]
    block_bytes: tuple[int, ...]  # of each group
    engine: EngineConfig
    model_len: int

    def groups(self, num_blocks: int) -> tuple[GroupPlan, ...]:
        """All groups when the first has that many blocks, the null block included."""
        return tuple(
            GroupPlan(
                window=window,
                num_blocks=self.useful(window, num_blocks) if index else num_blocks,
                block_bytes=block_bytes,
            )
            for index, (window, block_bytes) in enumerate(zip(self.windows, self.block_bytes, strict=True))
        )

    def num_bytes(self, num_blocks: int) -> int:
        return sum(group.num_bytes for group in self.groups(num_blocks))

    def fitting(self, num_bytes: int) -> int:
        """The most blocks of the first group with which all groups fit; 0 if not even one does."""
        low, high = 0, MAX_BLOCKS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.num_bytes(middle) <= num_bytes else (low, middle - 1)
        return low

    def least(self, num_tokens: int) -> int:
        """Blocks of the first group that one sequence of that many tokens needs, beside the null block."""
        return 1 + self._touched(self.windows[0], num_tokens)

    def longest(self, num_blocks: int) -> int:
        """Tokens of the longest sequence, at most `model_len`, with that many blocks in the first group."""
        if self.least(self.model_len) <= num_blocks:
            return self.model_len
        return (num_blocks - 1) * self.engine.block_size

    def useful(self, window: int | None, num_blocks: int) -> int:
        """How many of `num_blocks` blocks layers of this window can use."""
        if window is None:
            return num_blocks
        running = self.engine.max_num_seqs * (self._touched(window, self.model_len) + 1)
        step = self._blocks(self.engine.max_num_batched_tokens)
        return min(num_blocks, 1 + running + step + num_blocks // _REMEMBERED)

    def _touched(self, window: int | None, num_tokens: int) -> int:
        """Blocks that a sequence of that many tokens needs at least: those that one token sees."""
        if window is None:
            return self._blocks(num_tokens)
        return min(self._blocks(num_tokens), self._blocks(window - 1) + 1)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.engine.block_size)
