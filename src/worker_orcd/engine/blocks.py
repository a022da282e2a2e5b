"""
Which KV cache blocks are free, in use, or kept for reuse. Knows numbers, not tensors.

* A block is used (reference count above 0) or free; a free block may still be *cached*: its content can be
  found by hash until the block is taken for something else.
* Free blocks are taken in this order: those that cache nothing, then the least recently freed. A sequence's
  blocks are freed from its tail, so that the beginnings of prompts, which others are likeliest to share, live
  longest.
* Block 0 is the null block: never allocated; padding writes to it.
* A hash names a block's content together with everything before it and the salt of its owner, so two equal
  hashes mean equal K and V, and equal prompts under different salts never meet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceABC

NULL_BLOCK = 0

_DIGEST_BYTES = 16


def hash_salt(salt: bytes) -> bytes:
    """The parent of a sequence's first block."""
    return hashlib.blake2b(salt, digest_size=_DIGEST_BYTES, person=b"orcd-kv-salt").digest()


def hash_block(parent: bytes, token_ids: SequenceABC[int]) -> bytes:
    """The hash of a full block: of its tokens, each in 0 … 2^32 - 1, and of all that precede them."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """Owns reference counts, the LRU list of free blocks and the hash → block map.

    Invariants: a block is in the free list exactly if its reference count is 0; `_by_hash` and `_hashes` are
    inverse to each other.
    """

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` counts the null block."""
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = OrderedDict[int, None].fromkeys(range(NULL_BLOCK + 1, num_blocks))  # next taken first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def find(self, block_hashes: SequenceABC[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix. Takes no reference."""
        found: list[int] = []
        for block_hash in block_hashes:
            if (block_id := self._by_hash.get(block_hash)) is None:
                break
            found.append(block_id)
        return found

    def longest_prefix(self, block_hashes: SequenceABC[bytes], num_last: int) -> int:
        """How many of these blocks the longest prefix has whose last `num_last` blocks are cached."""
        length = index = len(block_hashes)
        while index > max(0, length - num_last):
            index -= 1
            if block_hashes[index] not in self._by_hash:
                length = index
        return length

    def num_free_after(self, block_ids: SequenceABC[int]) -> int:
        """How many blocks would stay free if these were taken."""
        return len(self._free) - sum(1 for block_id in block_ids if self._ref_counts[block_id] == 0)

    def take(self, block_ids: SequenceABC[int]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, at most `num_free`; what they cached is forgotten."""
        assert count <= len(self._free), "allocation beyond the pool: the scheduler must ask num_free first"
        taken: list[int] = []
        for _ in range(count):
            block_id, _none = self._free.popitem(last=False)
            self._ref_counts[block_id] = 1
            if (block_hash := self._hashes[block_id]) is not None:
                self._hashes[block_id] = None
                del self._by_hash[block_hash]
            taken.append(block_id)
        return taken

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find this used, full and computed block. The first of equal blocks wins."""
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def release(self, block_ids: SequenceABC[int]) -> None:
        """Drop a reference to each of a sequence's blocks, given in the sequence's order."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, "a block was released twice"
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)
