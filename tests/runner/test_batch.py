"""What a step becomes in the input buffers, and the steps that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import BatchInputs, Limits
from worker_orcd.runner.batch import Batch
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step

LIMITS = Limits(max_tokens=32, max_rows=6, max_blocks_per_row=5, block_size=4)
VOCAB = 100
NUM_BLOCKS = 40


def inputs_of(limits: Limits) -> BatchInputs:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return BatchInputs(
        token_ids=zeros(limits.max_tokens),
        positions=zeros(limits.max_tokens),
        slots=zeros(limits.max_tokens),
        query_start=zeros(limits.max_rows + 1),
        context_lens=zeros(limits.max_rows),
        block_tables=zeros(limits.max_rows, limits.max_blocks_per_row),
        logit_tokens=zeros(limits.max_rows),
    )


def sequence(token_ids: list[int], computed: int, block_ids: list[int]) -> Sequence:
    made = Sequence(
        id=1, token_ids=token_ids, max_tokens=9, stop_token_ids=frozenset(), sampling=SamplingParams()
    )
    made.num_computed_tokens = computed
    made.block_ids = block_ids
    return made


def batch_and_inputs() -> tuple[Batch, BatchInputs]:
    inputs = inputs_of(LIMITS)
    return Batch(inputs, LIMITS, num_blocks=NUM_BLOCKS, vocab_size=VOCAB), inputs


def test_a_prompt_a_chunk_and_a_decode():
    batch, inputs = batch_and_inputs()
    prompt = Row(sequence([10, 11, 12, 13, 14], 0, [7, 3]), 5)
    chunk = Row(sequence(list(range(20, 32)), 3, [9, 1, 5]), 6)  # tokens 3 … 8 of 12
    decode = Row(sequence([40, 41, 42, 43], 3, [30]), 1)
    counts = batch.fill(Step((prompt, chunk, decode)))
    assert (counts.num_tokens, counts.num_rows, counts.num_logits) == (12, 3, 2)
    assert inputs.token_ids[:12].tolist() == [10, 11, 12, 13, 14, 23, 24, 25, 26, 27, 28, 43]
    assert inputs.positions[:12].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 3]
    assert inputs.slots[:12].tolist() == [28, 29, 30, 31, 12, 39, 4, 5, 6, 7, 20, 123]
    assert inputs.query_start[:4].tolist() == [0, 5, 11, 12]
    assert inputs.context_lens[:3].tolist() == [5, 9, 4]
    assert inputs.block_tables[0, :2].tolist() == [7, 3]
    assert inputs.block_tables[1, :3].tolist() == [9, 1, 5]
    assert inputs.logit_tokens[:2].tolist() == [4, 11]


def test_a_step_that_samples_nothing_and_one_that_wants_everything():
    batch, inputs = batch_and_inputs()
    step = Step((Row(sequence([1, 2, 3], 0, [4]), 2), Row(sequence([5, 6], 0, [5]), 1)))
    assert batch.fill(step).num_logits == 0
    assert batch.fill(step, every_logit=True).num_logits == 3
    assert inputs.logit_tokens[:3].tolist() == [0, 1, 2]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_is_where_its_sequence_says(data: st.DataObject):
    batch, inputs = batch_and_inputs()
    rows: list[Row] = []
    free = data.draw(st.permutations(range(1, NUM_BLOCKS)))
    for _ in range(data.draw(st.integers(1, LIMITS.max_rows))):
        length = data.draw(st.integers(1, 20))
        computed = data.draw(st.integers(0, length - 1))
        num_tokens = data.draw(st.integers(1, min(length - computed, 5)))
        tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
        rows.append(Row(sequence(tokens, computed, list(free[:5])), num_tokens))
        free = free[5:]
    counts = batch.fill(Step(tuple(rows)))
    token = 0
    logits: list[int] = []
    for index, row in enumerate(rows):
        assert inputs.query_start[index] == token
        first = row.sequence.num_computed_tokens
        for position in range(first, first + row.num_tokens):
            assert inputs.token_ids[token] == row.sequence.token_ids[position]
            assert inputs.positions[token] == position
            assert inputs.slots[token] == row.sequence.block_ids[position // 4] * 4 + position % 4
            token += 1
        assert inputs.context_lens[index] == first + row.num_tokens
        if row.samples:
            logits.append(token - 1)
    assert inputs.query_start[len(rows)] == counts.num_tokens == token
    assert inputs.logit_tokens[: counts.num_logits].tolist() == logits


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
    step = Step(tuple(Row(sequence(tokens, computed, blocks), n) for tokens, computed, blocks, n in rows))
    with pytest.raises(Internal, match=message):
        batch.fill(step)


def test_more_logits_than_there_is_room_for_are_refused():
    batch, _ = batch_and_inputs()
    with pytest.raises(Internal, match="7 logits wanted; at most 6"):
        batch.fill(Step((Row(sequence([1] * 7, 0, [1, 2]), 7),)), every_logit=True)


def test_what_an_earlier_step_left_does_not_show():
    batch, inputs = batch_and_inputs()
    batch.fill(Step(tuple(Row(sequence([9] * 5, 0, [index + 1, 39]), 5) for index in range(6))))
    batch.fill(Step((Row(sequence([1, 2], 1, [8]), 1),)))
    assert inputs.query_start[:2].tolist() == [0, 1]
    assert (inputs.token_ids[0], inputs.positions[0], inputs.slots[0]) == (2, 1, 33)
    assert inputs.block_tables[0, 0].item() == 8
