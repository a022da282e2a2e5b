"""
A device with a real KV cache and a fake model.

At (block, offset) it stores a hash of the token and of what is stored one position before: like real K and
V, an entry depends on the whole prefix. The next token is a hash of every entry read back through the block
table. So a wrong block table, a block reused too early or a false prefix hit changes the output, and "the
same tokens whatever the batch" is the whole test.

Like a real device it computes between `launch` and the end of `wait`, and all rows of a step at once: what
one row writes, no other row of the step may read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from worker_orcd.sequence import Row, RowFailure, RowResult, SampledToken, Step

VOCAB = 24
STOP = frozenset({0, 1})


def entry(previous: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), previous)


def next_token(entries: list[int], seed: int) -> int:
    return zlib.crc32(b"".join(e.to_bytes(4, "little") for e in entries), seed) % VOCAB


def alone(prompt: list[int], max_tokens: int, *, seed: int = 0, min_tokens: int = 0) -> list[int]:
    """The answer (without the prompt) as a batch of one, never cached, never preempted, would give it."""
    tokens, entries, answer = list(prompt), [0], []
    while len(answer) < max_tokens:
        for token in tokens[len(entries) - 1 :]:
            entries.append(entry(entries[-1], token))
        may_stop = len(answer) >= min_tokens
        answer.append(next_token(entries[1:], seed))
        tokens.append(answer[-1])
        if may_stop and answer[-1] in STOP:
            break
    return answer


@dataclass
class Pending:
    """A step being computed: everything was copied at launch, as a device would have it."""

    device: FakeDevice
    rows: list[tuple[Row, bool, list[int], list[int], int]]  # row, samples, block ids, token ids, start

    def wait(self) -> list[RowResult]:
        return self.device.compute(self)

    @property
    def block_ids(self) -> set[int]:
        return {block_id for _row, _samples, blocks, _tokens, _start in self.rows for block_id in blocks}


@dataclass
class FakeDevice:
    num_blocks: int
    block_size: int
    cache: list[list[int]] = field(init=False)
    salts: dict[int, bytes] = field(default_factory=dict)  # block id -> salt of the sequence that wrote it
    failing_rows: dict[int, RowFailure] = field(default_factory=dict)  # by sequence id, once

    def __post_init__(self) -> None:
        self.cache = [[-1] * self.block_size for _ in range(self.num_blocks)]

    def launch(self, step: Step) -> Pending:
        rows = []
        for row in step.rows:
            s = row.sequence
            start, end = s.num_computed_tokens, s.num_computed_tokens + row.num_tokens
            rows.append((row, row.samples, list(s.block_ids), s.token_ids[:end], start))
        return Pending(self, rows)

    def compute(self, pending: Pending) -> list[RowResult]:
        before = [list(block) for block in pending.device.cache]
        return [self._compute_row(before, *row) for row in pending.rows]

    def _compute_row(
        self,
        before: list[list[int]],
        row: Row,
        samples: bool,
        blocks: list[int],
        tokens: list[int],
        start: int,
    ) -> RowResult:
        s, size, entries = row.sequence, self.block_size, []
        for position, token in enumerate(tokens):
            block_id, offset = blocks[position // size], position % size
            assert block_id != 0, "the null block is nobody's"
            if position < start:
                assert before[block_id][offset] >= 0, "read of a slot never written"
                assert self.salts[block_id] == s.cache_salt, "a block crossed from one salt to another"
                entries.append(before[block_id][offset])
            else:
                entries.append(entry(entries[-1] if entries else 0, token))
                self.cache[block_id][offset] = entries[-1]
                self.salts[block_id] = s.cache_salt
        if s.id in self.failing_rows:
            self._spoil(blocks, start, len(tokens))
            return self.failing_rows.pop(s.id)
        return SampledToken(next_token(entries, s.sampling.seed)) if samples else None

    def spoil(self, pending: Pending) -> None:
        """The step went wrong: what it wrote is worthless."""
        for _row, _samples, blocks, tokens, start in pending.rows:
            self._spoil(blocks, start, len(tokens))

    def _spoil(self, blocks: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            self.cache[blocks[position // self.block_size]][position % self.block_size] ^= 0x5A5A5A


class Gate:
    """A device that does what a test says: fails, or waits for a hand."""

    def __init__(
        self, device: FakeDevice, before_launch: Callable[[], None], before_wait: Callable[[], None]
    ):
        self.device, self.before_launch, self.before_wait = device, before_launch, before_wait
        self.num_steps = 0

    def launch(self, step: Step) -> _GatedStep:
        self.num_steps += 1
        self.before_launch()
        return _GatedStep(self.device.launch(step), self.before_wait)


@dataclass
class _GatedStep:
    pending: Pending
    before_wait: Callable[[], None]

    def wait(self) -> list[RowResult]:
        self.before_wait()
        return self.pending.wait()
