"""
A device with a real KV cache and a fake model.

In each cache group it stores, at (block, offset), a hash of the token and of every entry that the token sees
in all groups: like real K and V, an entry depends on the whole prefix, or on as much of it as windows let
through. The next token is a hash of every entry that the last token sees, read through the block tables. So a
wrong block table, a block reused or given back too early or a false prefix hit changes the output, and "the
same tokens whatever the batch" is the whole test.

Like a real device it computes between `launch` and the end of `wait`, as late as it can, steps in the order
of their launch and all rows of a step at once: what one row writes, no other row of the step may read. A
token that is not known at launch it takes from what the step before drew, and so those before it that
penalties ask for. A row that draws several tokens computes each but the last before the next is drawn, round
by round.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from worker_orcd.sequence import Row, RowFailure, RowResult, SampledToken, Step

VOCAB = 24
STOP = frozenset({0, 1})
Windows = Sequence[int | None]  # of the cache groups
Entries = list[dict[int, bytes]]  # for each group: position -> what is stored there


def first_visible(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def seen(entries: Entries, position: int, windows: Windows) -> bytes:
    """What a token sees before its own entry, or with it if that is there already."""
    parts: list[bytes] = []
    for stored, window in zip(entries, windows, strict=True):
        parts += [stored[p] for p in range(first_visible(position, window), position)]
        parts.append(stored.get(position, b""))
    return b"".join(parts)


def compute(entries: Entries, position: int, token_id: int, windows: Windows) -> None:
    """Store a token's entries."""
    behind = seen(entries, position, windows)
    for group, stored in enumerate(entries):
        stored[position] = zlib.crc32(behind, 31 * token_id + group).to_bytes(4, "little")


def next_token(
    entries: Entries, position: int, windows: Windows, seed: int, penalised: Sequence[int] = ()
) -> int:
    """`penalised`: the tokens that the draw depends on, beside what the last of them sees."""
    return zlib.crc32(bytes(penalised), zlib.crc32(seen(entries, position, windows), seed)) % VOCAB


def alone(
    prompt: list[int],
    max_tokens: int,
    *,
    seed: int = 0,
    min_tokens: int = 0,
    windows: Windows = (None,),
    penalises: bool = False,
) -> list[int]:
    """The answer (without the prompt) as a batch of one, never cached, never preempted, would give it."""
    tokens, answer = list(prompt), list[int]()
    entries: Entries = [{} for _ in windows]
    while len(answer) < max_tokens:
        for position in range(len(entries[0]), len(tokens)):
            compute(entries, position, tokens[position], windows)
        may_stop = len(answer) >= min_tokens
        answer.append(next_token(entries, len(tokens) - 1, windows, seed, tokens if penalises else ()))
        tokens.append(answer[-1])
        if may_stop and answer[-1] in STOP:
            break
    return answer


@dataclass
class _Copied:
    """A row as it was at launch."""

    row: Row
    tables: list[list[int]]
    token_ids: list[int]  # those that are known, then all up to the end of the row, then those drawn
    results: list[RowResult] = field(default_factory=list[RowResult])

    @property
    def places(self) -> range:
        return range(self.row.start, self.row.start + self.row.num_computed)

    def places_of(self, number: int) -> range:
        """Of a round."""
        start, end = self.row.start, self.row.end
        return range(start, end) if number == 0 else range(end + number - 1, end + number)


@dataclass
class Pending:
    """A step being computed: everything was copied at launch, as a device would have it."""

    device: FakeDevice
    number: int
    rows: list[_Copied]

    def wait(self) -> list[RowResult]:
        return self.device.compute(self)

    def block_ids(self, group: int) -> set[int]:
        """The blocks of what it computes, and of what that sees."""
        window, size = self.device.windows[group], self.device.block_size
        return {
            block_id
            for copied in self.rows
            for block_id in copied.tables[group][first_visible(copied.row.start, window) // size :]
        }


@dataclass
class FakeDevice:
    groups: Sequence[tuple[int | None, int]]  # (window, num_blocks)
    block_size: int
    cache: list[list[list[bytes | None]]] = field(init=False)  # group, block, offset
    salts: dict[tuple[int, int], bytes] = field(
        default_factory=dict
    )  # (group, block id) -> its writer's salt
    failing_rows: dict[int, RowFailure] = field(default_factory=dict)  # by sequence id, once
    # By the step that was computed last: tokens of each row that drew some.
    drawn: list[list[int]] = field(default_factory=list)
    num_launched: int = 0
    num_computed: int = 0

    def __post_init__(self) -> None:
        self.windows = [window for window, _num_blocks in self.groups]
        self.cache = [[[None] * self.block_size for _ in range(n)] for _window, n in self.groups]

    def launch(self, step: Step) -> Pending:
        rows = []
        for row in step.rows:
            s = row.sequence
            tables = [list(table) for table in s.block_tables]
            assert len(tables) == len(self.groups)
            token_ids = s.token_ids[: row.end]
            unknown = row.previous_draw is not None
            assert row.num_tokens >= 1 and (row.num_tokens == 1 if unknown else len(token_ids) == row.end)
            last = row.end + max(1, row.num_draws) - 1
            assert s.may_stop_at(row.end) == s.may_stop_at(last), "what is excluded changes meanwhile"
            rows.append(_Copied(row, tables, token_ids))
        behind = any(row.previous_draw is not None for row in step.rows)
        assert not behind or self.num_launched > self.num_computed, "no step is under way to draw a token"
        self.num_launched += 1
        return Pending(self, self.num_launched, rows)

    def compute(self, pending: Pending) -> list[RowResult]:
        self.num_computed += 1
        assert pending.number == self.num_computed, "a step was waited for before the one in front of it"
        for copied in pending.rows:
            if copied.row.previous_draw is not None:
                drawn = self.drawn[copied.row.previous_draw]
                missing = copied.row.end - len(copied.token_ids)
                assert missing == len(drawn), (
                    "some of what the step before drew is known, or not all is unknown"
                )
                copied.token_ids += drawn
        for number in range(max(1, *(copied.row.num_draws for copied in pending.rows), 1)):
            rows = [copied for copied in pending.rows if number < max(1, copied.row.num_draws)]
            computed = [self._compute_row(copied, number) for copied in rows]
            for copied, entries in zip(rows, computed, strict=True):
                self._write(copied, number, entries)
        self.drawn = [
            [result.token_id if isinstance(result, SampledToken) else 0 for result in copied.results]
            for copied in pending.rows
            if copied.row.samples
        ]
        return [result for copied in pending.rows for result in copied.results]

    def _compute_row(self, copied: _Copied, number: int) -> Entries:
        places = copied.places_of(number)
        entries = self._read(copied, places.start)
        for position in places:
            compute(entries, position, copied.token_ids[position], self.windows)
        self._draw(copied, number, entries)
        return entries

    def _write(self, copied: _Copied, number: int, entries: Entries) -> None:
        for group, stored in enumerate(entries):
            for position in copied.places_of(number):
                block_id, offset = self._place(copied, group, position)
                self.cache[group][block_id][offset] = stored[position]
                self.salts[group, block_id] = copied.row.sequence.cache_salt
        if isinstance(copied.results[-1], RowFailure):
            self._spoil(copied)

    def _draw(self, copied: _Copied, number: int, entries: Entries) -> None:
        s, places = copied.row.sequence, copied.places_of(number)
        if s.id in self.failing_rows and number + 1 >= copied.row.num_draws:
            copied.results.append(self.failing_rows.pop(s.id))
        elif not copied.row.samples:
            copied.results.append(None)
        else:
            penalised = copied.token_ids if s.sampling.penalises else ()
            drawn = next_token(entries, places.stop - 1, self.windows, s.sampling.seed, penalised)
            copied.token_ids.append(drawn)
            copied.results.append(SampledToken(drawn))

    def _read(self, copied: _Copied, start: int) -> Entries:
        """What was computed before and the token at `start` sees."""
        entries: Entries = []
        for group, window in enumerate(self.windows):
            entries.append({})
            for position in range(first_visible(start, window), start):
                block_id, offset = self._place(copied, group, position)
                found = self.cache[group][block_id][offset]
                assert found is not None, "read of a slot never written"
                assert self.salts[group, block_id] == copied.row.sequence.cache_salt, (
                    "a block crossed from one salt to another"
                )
                entries[group][position] = found
        return entries

    def _place(self, copied: _Copied, group: int, position: int) -> tuple[int, int]:
        block_id = copied.tables[group][position // self.block_size]
        assert block_id != 0, "the null block is nobody's"
        return block_id, position % self.block_size

    def spoil(self, pending: Pending) -> None:
        """The step went wrong: what it wrote is worthless."""
        for copied in pending.rows:
            self._spoil(copied)

    def _spoil(self, copied: _Copied) -> None:
        for group in range(len(self.groups)):
            for position in copied.places:
                block_id, offset = self._place(copied, group, position)
                self.cache[group][block_id][offset] = b"bad!"


class Gate:
    """A device that does what a test says: fails, or waits for a hand."""

    def __init__(
        self,
        device: FakeDevice,
        before_launch: Callable[[], None],
        before_wait: Callable[[], None],
        *,
        max_steps: int = 1,
        max_draws: int = 1,
    ):
        self.device, self.before_launch, self.before_wait = device, before_launch, before_wait
        self.max_steps, self.max_draws = max_steps, max_draws
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
        try:
            self.before_wait()
        except BaseException:
            self.pending.wait()  # the device did what it was told; what came of it is lost
            raise
        return self.pending.wait()
