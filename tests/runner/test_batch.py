"""What a step becomes in the input buffers, and the steps that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Counts, Limits
from worker_orcd.kernels.cpu.inputs import allocate_cpu_inputs
from worker_orcd.runner.batch import Batch
from worker_orcd.runner.cache_plan import GroupPlan
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step

VOCAB = 100
FULL = GroupPlan(window=None, num_blocks=40, block_bytes=1)
WINDOWED = GroupPlan(window=6, num_blocks=30, block_bytes=1)  # five tokens behind the one that looks


def sequence(token_ids: list[int], computed: int, *block_tables: list[int]) -> Sequence:
    made = Sequence(
        id=1, token_ids=token_ids, max_tokens=9, stop_token_ids=frozenset(), sampling=SamplingParams()
    )
    made.num_computed_tokens = computed
    made.block_tables = list(block_tables)
    return made


def batch_and_inputs(*groups: GroupPlan) -> tuple[Batch, BatchInputs]:
    groups = groups or (FULL,)
    limits = Limits(32, max_rows=6, max_blocks_per_row=5, block_size=4, num_groups=len(groups))
    inputs = allocate_cpu_inputs(limits)
    return Batch(inputs, limits, groups, vocab_size=VOCAB), inputs


def test_a_prompt_a_chunk_and_a_decode():
    batch, inputs = batch_and_inputs()
    prompt = Row.of(sequence([10, 11, 12, 13, 14], 0, [7, 3]), 5)
    chunk = Row.of(sequence(list(range(20, 32)), 3, [9, 1, 5]), 6)  # tokens 3 … 8 of 12
    decode = Row.of(sequence([40, 41, 42, 43], 3, [30]), 1)
    counts = batch.fill(Step((prompt, chunk, decode)))
    assert (counts.num_tokens, counts.num_rows, counts.num_logits) == (12, 3, 2)
    assert inputs.token_ids[:12].tolist() == [10, 11, 12, 13, 14, 23, 24, 25, 26, 27, 28, 43]
    assert inputs.positions[:12].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 3]
    assert inputs.slots[0, :12].tolist() == [28, 29, 30, 31, 12, 39, 4, 5, 6, 7, 20, 123]
    assert inputs.query_start[:4].tolist() == [0, 5, 11, 12]
    assert inputs.context_lens[:3].tolist() == [5, 9, 4]
    assert inputs.block_tables[0, 0, :2].tolist() == [7, 3]
    assert inputs.block_tables[0, 1, :3].tolist() == [9, 1, 5]
    assert inputs.logit_tokens[:2].tolist() == [4, 11]


def test_tokens_that_the_step_before_draws():
    batch, inputs = batch_and_inputs()
    first = Row.of(sequence([10, 11, 12], 0, [7]), 3)
    chunk = Row.of(sequence([1] * 9, 0, [8, 9, 10]), 4)
    second = Row.of(sequence([20, 21], 1, [6]), 1)
    assert batch.fill(Step((first, chunk, second))).num_logits == 2
    counts = batch.fill(
        Step(
            (
                Row(second.sequence, 1, 2, num_draws=1, previous_draw=1),
                Row(chunk.sequence, 5, 4, num_draws=1),
                Row(first.sequence, 1, 3, num_draws=0, previous_draw=0),
            )
        )
    )
    assert (counts.num_tokens, counts.num_logits) == (7, 2)
    assert inputs.token_ids[:7].tolist() == [-2, 1, 1, 1, 1, 1, -1]
    assert inputs.positions[:7].tolist() == [2, 4, 5, 6, 7, 8, 3]
    assert inputs.slots[0, :7].tolist() == [26, 36, 37, 38, 39, 40, 31]
    assert inputs.context_lens[:3].tolist() == [3, 9, 4]
    assert inputs.logit_tokens[:2].tolist() == [0, 5]


@pytest.mark.parametrize(("num_tokens", "draw"), [(1, 1), (1, -1), (1, -2), (2, 0)])
def test_draws_that_there_are_not_are_refused(num_tokens: int, draw: int):
    batch, _ = batch_and_inputs()
    before = Row.of(sequence([10, 11, 12], 0, [7]), 3)
    batch.fill(Step((before,)))
    with pytest.raises(Internal, match=r"none of the 1 draws|beyond the tokens"):
        batch.fill(Step((Row(before.sequence, num_tokens, 3, num_draws=1, previous_draw=draw),)))
    batch.fill(Step((before,)), every_logit=True)
    with pytest.raises(Internal, match="none of the 0 draws"):
        batch.fill(Step((Row(before.sequence, 1, 3, num_draws=1, previous_draw=0),)))


def test_rounds_have_the_blocks_that_they_write():
    """The first round is as ever; the tables reach further."""
    batch, inputs = batch_and_inputs(FULL, WINDOWED)
    rows = [sequence([1] * 9, 8, [4, 5, 6]), sequence([2] * 3, 2, [7])]
    for row, blocks in zip(rows, ([3, 8, 9], [10]), strict=True):
        row.block_tables.append(blocks)
    counts = batch.fill(Step((Row(rows[0], 1, 8, num_draws=4), Row(rows[1], 1, 2, num_draws=2))))
    assert counts == Counts(2, 2, 2, num_rounds=4)
    assert inputs.positions[:2].tolist() == [8, 2] and inputs.context_lens[:2].tolist() == [9, 3]
    assert inputs.block_tables[0, 0, :3].tolist() == [4, 5, 6]
    assert inputs.block_tables[1, 0, :3].tolist() == [3, 8, 9]
    assert inputs.block_tables[0, 1, 0] == 7


def test_rounds_are_of_rows_of_one_token_that_draw():
    batch, _ = batch_and_inputs()
    drawing = Row(sequence([1] * 5, 4, [4, 5]), 1, 4, num_draws=2)
    for other in (
        Row.of(sequence([1, 2, 3], 1, [6]), 2),
        Row(sequence([1, 2, 3], 1, [6]), 1, 1, num_draws=0),
    ):
        with pytest.raises(Internal, match="several rounds"):
            batch.fill(Step((drawing, other)))
    with pytest.raises(Internal, match="beyond its blocks"):
        batch.fill(Step((Row(drawing.sequence, 1, 4, num_draws=5),)))


def test_a_step_that_samples_nothing_and_one_that_wants_everything():
    batch, inputs = batch_and_inputs()
    step = Step((Row.of(sequence([1, 2, 3], 0, [4]), 2), Row.of(sequence([5, 6], 0, [5]), 1)))
    assert batch.fill(step).num_logits == 0
    assert batch.fill(step, every_logit=True).num_logits == 3
    assert inputs.logit_tokens[:3].tolist() == [0, 1, 2]


def test_a_window_s_blocks_are_its_own_and_what_is_behind_it_is_not_read():
    batch, inputs = batch_and_inputs(FULL, WINDOWED)
    inputs.block_tables.fill_(-7)
    chunk = Row.of(sequence([9] * 17, 10, [1, 2, 3, 4, 5], [0, 21, 22, 23, 24]), 5)  # the first sees 5 … 10
    decode = Row.of(sequence([9] * 17, 16, [6, 7, 8, 9, 10], [0, 0, 25, 26, 27]), 1)  # sees 11 … 16
    counts = batch.fill(Step((chunk, decode)))
    assert (counts.num_tokens, counts.num_logits) == (6, 1)
    assert inputs.slots[0, :6].tolist() == [14, 15, 16, 17, 18, 40]
    assert inputs.slots[1, :6].tolist() == [90, 91, 92, 93, 94, 108]
    assert inputs.block_tables[0, :2].tolist() == [[1, 2, 3, 4, -7], [6, 7, 8, 9, 10]]
    assert inputs.block_tables[1, :2].tolist() == [[-7, 21, 22, 23, -7], [-7, -7, 25, 26, 27]]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_is_where_its_sequence_says(data: st.DataObject):
    batch, inputs = batch_and_inputs(FULL, WINDOWED)
    rows: list[Row] = []
    free = [list(data.draw(st.permutations(range(1, group.num_blocks)))) for group in (FULL, WINDOWED)]
    for _ in range(data.draw(st.integers(1, 5))):
        length = data.draw(st.integers(1, 20))
        computed = data.draw(st.integers(0, length - 1))
        num_tokens = data.draw(st.integers(1, min(length - computed, 5)))
        tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
        tables = [[blocks.pop() for _ in range(5)] for blocks in free]
        first = max(0, computed - 5) // 4
        tables[1][:first] = [0] * first
        rows.append(Row.of(sequence(tokens, computed, *tables), num_tokens))
    counts = batch.fill(Step(tuple(rows)))
    token = 0
    logits: list[int] = []
    for index, row in enumerate(rows):
        assert inputs.query_start[index] == token
        first = row.sequence.num_computed_tokens
        for position in range(first, first + row.num_tokens):
            assert inputs.token_ids[token] == row.sequence.token_ids[position]
            assert inputs.positions[token] == position
            for group, table in enumerate(row.sequence.block_tables):
                assert inputs.slots[group, token] == table[position // 4] * 4 + position % 4
                for seen in range(0 if group == 0 else max(0, position - 5), position + 1):
                    assert inputs.block_tables[group, index, seen // 4] == table[seen // 4] > 0
            token += 1
        assert inputs.context_lens[index] == first + row.num_tokens
        if row.samples:
            logits.append(token - 1)
    assert inputs.query_start[len(rows)] == counts.num_tokens == token
    assert inputs.logit_tokens[: counts.num_logits].tolist() == logits


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[1, 2, 3]], "a block table for each of the 2 cache groups"),
        ([], "a block table for each of the 2 cache groups"),
        ([[1, 2, 3], [0, 0, 5]], "block id outside 1 … 29"),  # token 9 sees 4 … 9
        ([[1, 2, 3], [0, 4]], "reaches beyond its blocks"),
        ([[1, 2, 3], [0, 4, 30]], "block id outside 1 … 29"),
        ([[0, 2, 3], [0, 4, 5]], "block id outside 1 … 39"),
    ],
)
def test_block_tables_that_lack_what_a_row_sees_are_refused(tables: list[list[int]], message: str):
    batch, _ = batch_and_inputs(FULL, WINDOWED)
    batch.fill(Step((Row.of(sequence([1] * 10, 9, [1, 2, 3], [0, 4, 5]), 1),)))
    with pytest.raises(Internal, match=message):
        batch.fill(Step((Row.of(sequence([1] * 10, 9, *tables), 1),)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows; 1 to 6"),
        ([([1], 0, [1], 1)] * 7, "7 rows; 1 to 6"),
        ([([1], 0, [1], 0)], "no tokens"),
        ([([1, 2], -1, [1], 1)], "fewer than none"),
        ([([1] * 17, 0, [1, 2, 3, 4, 5], 17)] * 2, "34 tokens; at most 32"),
        ([([1, 2], 1, [1], 2)], "beyond the tokens"),
        ([([1, 100], 0, [1], 2)], "outside the vocabulary of 100"),
        ([([1, -1], 0, [1], 2)], "outside the vocabulary of 100"),
        ([([1] * 5, 0, [1], 5)], "reaches beyond its blocks"),
        ([([1] * 21, 20, [1, 2, 3, 4, 5, 6], 1)], "21 tokens is longer than a row may be"),
        ([([1], 0, [0], 1)], "block id outside 1 … 39"),
        ([([1], 0, [40], 1)], "block id outside 1 … 39"),
        ([([1], 0, [2**40], 1)], "block id outside 1 … 39"),
    ],
)
def test_steps_that_break_the_rules_are_refused(rows: list[Any], message: str):
    batch, _ = batch_and_inputs()
    step = Step(tuple(Row.of(sequence(tokens, computed, blocks), n) for tokens, computed, blocks, n in rows))
    with pytest.raises(Internal, match=message):
        batch.fill(step)


def test_more_logits_than_there_is_room_for_are_refused():
    batch, _ = batch_and_inputs()
    with pytest.raises(Internal, match="7 logits wanted; at most 6"):
        batch.fill(Step((Row.of(sequence([1] * 7, 0, [1, 2]), 7),)), every_logit=True)


def test_what_an_earlier_step_left_does_not_show():
    batch, inputs = batch_and_inputs()
    batch.fill(Step(tuple(Row.of(sequence([9] * 5, 0, [index + 1, 39]), 5) for index in range(6))))
    batch.fill(Step((Row.of(sequence([1, 2], 1, [8]), 1),)))
    assert inputs.query_start[:2].tolist() == [0, 1]
    assert (inputs.token_ids[0], inputs.positions[0], inputs.slots[0, 0]) == (2, 1, 33)
    assert inputs.block_tables[0, 0, 0].item() == 8
