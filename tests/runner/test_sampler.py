"""The sampler against transformers' logits processors, a plain softmax, and its own documentation."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker_orcd.errors import Internal, InvalidParameter
from worker_orcd.kernels.draw import Draw, Draws
from worker_orcd.kernels.entries import Entries
from worker_orcd.runner.philox import uniform
from worker_orcd.runner.sampler import Sampler, falling, invert
from worker_orcd.sequence import Row as SequenceRow
from worker_orcd.sequence import RowFailure, SampledToken, SamplingParams, Sequence

VOCAB = 1000
Row = NDArray[np.float32]


def random_row(seed: int, size: int = VOCAB, spread: float = 3.0) -> Row:
    return (spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def draw_of(token_ids: list[int] | None = None, prompt: int = 1, position: int = 9, **params: Any) -> Draw:
    made = SamplingParams(**params)
    entries = Entries(made, prompt, VOCAB)
    entries.take_in(token_ids or [])
    return Draw(params=made, position=position, excluded=frozenset(), entries=entries)


def draw_of_next(sequence: Sequence) -> Draw:
    return Draws(VOCAB).of(SequenceRow.of(sequence, sequence.num_uncomputed_tokens))


def sampled(row: Row, draw: Draw) -> SampledToken:
    token = Sampler(len(row)).sample(row, draw)
    assert isinstance(token, SampledToken), token
    return token


def failed(row: Row, draw: Draw) -> RowFailure:
    failure = Sampler(len(row)).sample(row, draw)
    assert isinstance(failure, RowFailure), failure
    return failure


def kept_ids(row: Row, **params: Any) -> list[int]:
    ids, weights = Sampler(len(row)).kept(row, float(row.max()), SamplingParams(**params))
    ids = np.arange(len(row)) if ids is None else ids
    assert len(ids) == len(weights)
    assert np.all(np.diff(ids) > 0)
    return ids.tolist()


# -- greedy ------------------------------------------------------------


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id():
    row = random_row(1)
    assert sampled(row, draw_of(temperature=0.0)) == SampledToken(int(row.argmax()))
    row[[400, 7, 900]] = 50.0
    assert sampled(row, draw_of(temperature=0.0)).token_id == 7


def test_limits_of_the_filters_are_the_argmax():
    row = random_row(2)
    row[[400, 7, 900]] = 50.0
    for params in ({"top_p": 0.0}, {"top_k": 1}, {"temperature": 1e-5, "top_k": 1}, {"top_p": 1e-12}):
        for seed in range(20):
            assert sampled(row, draw_of(seed=seed, **params)).token_id == 7, params
    distinct = random_row(3)
    for temperature in (1e-5, 1e-300, 5e-324):
        assert sampled(distinct, draw_of(temperature=temperature)).token_id == int(distinct.argmax())


# -- penalties, bias, exclusion ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    row = random_row(4)
    token_ids = np.random.default_rng(5).integers(0, VOCAB, 300).tolist()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([token_ids]), torch.from_numpy(row.copy())[None]
    )[0].numpy()
    found = Sampler(VOCAB).adjusted(row, draw_of(token_ids, 100, repetition_penalty=penalty))
    np.testing.assert_array_equal(found, expected)


def test_presence_and_frequency_count_the_output_only():
    row = random_row(6)
    draw = draw_of(
        [1, 2, 2, 3, 3, 3, 4], 2, presence_penalty=0.5, frequency_penalty=0.25
    )  # output: 2 3 3 3 4
    expected = row.copy()
    for token_id, count in ((2, 1), (3, 3), (4, 1)):
        expected[token_id] -= 0.5 + 0.25 * count
    before = row.copy()
    np.testing.assert_allclose(Sampler(VOCAB).adjusted(row, draw), expected, rtol=1e-6)
    np.testing.assert_array_equal(row, before)


def test_penalties_come_before_the_bias_and_exclusion_after_both():
    row = np.array([4.0, 3.9, -1.0, 0.0], dtype=np.float32)
    params = {"temperature": 0.0, "repetition_penalty": 2.0, "logit_bias": ((0, 1.0), (3, 100.0))}
    draw = replace(draw_of([0, 2], 2, **params), excluded=frozenset({3, 99}))
    np.testing.assert_allclose(Sampler(4).adjusted(row, draw), [3.0, 3.9, -2.0, -np.inf], rtol=1e-6)
    assert sampled(row, draw).token_id == 1


def test_logit_bias_forbids_and_forces():
    row = random_row(7)
    best = int(row.argmax())
    for seed in range(50):
        assert sampled(row, draw_of(seed=seed, logit_bias=((best, -100.0),))).token_id != best
        assert sampled(row, draw_of(seed=seed, logit_bias=((5, 100.0),))).token_id == 5


def test_stop_tokens_are_excluded_before_min_tokens():
    row = random_row(8)
    best = int(row.argmax())
    sequence = Sequence(
        id=1,
        token_ids=[1, 2],
        max_tokens=9,
        stop_token_ids=frozenset({best}),
        sampling=SamplingParams(temperature=0.0),
        min_tokens=1,
    )
    assert sampled(row, draw_of_next(sequence)).token_id != best
    sequence.token_ids.append(3)
    assert sampled(row, draw_of_next(sequence)).token_id == best


def penalised(**params: Any) -> Sequence:
    return Sequence(
        id=1,
        token_ids=[1, 2],
        max_tokens=9,
        stop_token_ids=frozenset({7}),
        sampling=SamplingParams(**params),
        min_tokens=2,
    )


def test_a_draw_does_not_change_with_its_sequence():
    sequence = penalised(presence_penalty=1.0)
    draw = draw_of_next(sequence)
    sequence.token_ids.append(5)
    assert draw.position == 2
    assert draw.entries is not None
    assert draw.entries.records["id"].tolist() == [1, 2]


def test_a_sequence_keeps_its_entries_and_leaves_none_behind():
    draws, row = Draws(VOCAB), random_row(9)
    sequence = penalised(frequency_penalty=0.5)
    for token_id in (5, 5, 2):
        draw = draws.of(SequenceRow.of(sequence, sequence.num_uncomputed_tokens))
        alone = draw_of(sequence.token_ids, 2, frequency_penalty=0.5)
        np.testing.assert_array_equal(
            Sampler(VOCAB).adjusted(row, replace(draw, excluded=frozenset())),
            Sampler(VOCAB).adjusted(row, alone),
        )
        assert draw.entries is not None
        entries = weakref.ref(draw.entries)
        sequence.token_ids.append(token_id)
    assert draws.of(SequenceRow.of(sequence, 5)).entries is entries()
    del sequence, draw
    assert entries() is None


def test_a_draw_may_be_made_before_the_token_in_front_of_it():
    """What depends on how many tokens there are is known; which they are is left to the device."""
    sequence = penalised()
    of = Draws(VOCAB).of
    ahead = [SequenceRow(sequence, 1, 2 + n, num_draws=1, previous_draw=0) for n in range(2)]
    sequence.token_ids.append(5)
    assert of(ahead[0]) == draw_of_next(sequence)
    assert [of(row).position for row in ahead] == [3, 4]
    assert [of(row).excluded for row in ahead] == [{7}, frozenset()]
    several = SequenceRow(sequence, 1, 2, num_draws=3)
    assert of(several).count == 3 and of(several).num_uncounted == 0


def test_a_draw_with_penalties_says_which_tokens_are_not_known():
    sequence = penalised(frequency_penalty=0.1)
    of = Draws(VOCAB).of
    ahead = SequenceRow(sequence, 1, 4, num_draws=2, previous_draw=6)  # behind a step that draws three
    draw = of(ahead)
    assert (draw.num_unknown, draw.previous, draw.count, draw.num_uncounted) == (3, 6, 2, 4)
    sequence.token_ids += [5, 6, 7]
    draw = of(SequenceRow(sequence, 1, 4, num_draws=1))
    assert (draw.num_unknown, draw.num_uncounted) == (0, 0)
    with pytest.raises(Internal, match="2 tokens that no step draws"):
        of(SequenceRow(sequence, 1, 6, num_draws=1))
    with pytest.raises(Internal, match="4 tokens that are not known"):
        Sampler(VOCAB).sample(random_row(1), replace(draw, num_unknown=3, count=2))


# -- what is kept ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": VOCAB},
        {"top_k": 5000},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 40, "min_p": 0.2},
        {"top_p": 0.7, "min_p": 0.1},
        {"top_k": 300, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_the_kept_set_is_that_of_transformers(params: dict[str, Any], temperature: float, spread: float):
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    row = random_row(11, spread=spread)
    scores = torch.from_numpy(row.astype(np.float64))[None] / temperature
    ids = torch.zeros(1, 1, dtype=torch.long)
    if "top_k" in params:
        scores = TopKLogitsWarper(params["top_k"])(ids, scores)
    if "top_p" in params:
        scores = TopPLogitsWarper(params["top_p"])(ids, scores)
    if "min_p" in params:
        scores = MinPLogitsWarper(params["min_p"])(ids, scores)
    expected = torch.nonzero(torch.isfinite(scores[0])).flatten().tolist()
    assert kept_ids(row, temperature=temperature, **params) == expected


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 3000),
    levels=st.integers(1, 40),
    top_k=st.integers(0, 60),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.01, 2),
)
@settings(max_examples=300, deadline=None)
def test_the_kept_set_is_that_of_sorting_everything(
    seed: int, size: int, levels: int, top_k: int, top_p: float, min_p: float, temperature: float
):
    # Few levels make many ties; zeros of both signs are equal.
    rng = np.random.default_rng(seed)
    row = rng.integers(0, levels, size).astype(np.float32) * rng.choice([-0.25, 0.25], size).astype(
        np.float32
    )
    order = np.array(sorted(range(size), key=lambda index: (-float(row[index]), index)))
    if 0 < top_k < size:
        order = order[:top_k]
    weights = np.exp((row[order].astype(np.float64) - float(row.max())) / temperature)
    if top_p < 1.0:
        cumulative = np.cumsum(weights)
        target = top_p * cumulative[-1]
        count = int(np.searchsorted(cumulative, target)) + 1
        if count < len(order) and abs(cumulative[count - 1] - target) < 1e-9 * cumulative[-1]:
            return  # on the edge, the order of additions decides
        if count > 1 and abs(cumulative[count - 2] - target) < 1e-9 * cumulative[-1]:
            return
        order, weights = order[:count], weights[:count]
    expected = sorted(order[weights >= min_p].tolist())
    found = kept_ids(row, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    assert found == expected


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_falling_order(values: list[float]):
    row = np.array(values, dtype=np.float32)
    expected = sorted(range(len(row)), key=lambda index: (-float(row[index]), index))
    assert falling(row).tolist() == expected


# -- the draw ------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"temperature": 1.8}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}],
)
def test_draws_follow_the_distribution(params: dict[str, Any]):
    row = random_row(12, size=24, spread=1.0)
    kept = kept_ids(row, **params)
    weights = np.zeros(24)
    weights[kept] = np.exp(row[kept].astype(np.float64) / params.get("temperature", 1.0))
    expected = 5000 * weights / weights.sum()
    sampler = Sampler(24)
    counts = np.zeros(24)
    for position in range(5000):
        token = sampler.sample(row, draw_of(position=position, seed=77, **params))
        assert isinstance(token, SampledToken)
        counts[token.token_id] += 1
    assert counts[expected == 0].sum() == 0
    chosen = expected > 0
    statistic = ((counts - expected)[chosen] ** 2 / expected[chosen]).sum()
    degrees = int(chosen.sum()) - 1
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 5  # about p = 0.001


def test_the_draw_inverts_the_cumulative_weights_in_order_of_ids():
    row = random_row(13)
    cumulative = np.cumsum(np.exp(row.astype(np.float64)))
    for position in range(200):
        expected = int(np.searchsorted(cumulative, uniform(3, position) * cumulative[-1], side="right"))
        assert sampled(row, draw_of(position=position, seed=3)).token_id == expected


def test_the_draw_depends_on_seed_and_position_only():
    row = random_row(14)
    assert len({sampled(row, draw_of(seed=seed)).token_id for seed in range(50)}) > 10
    assert len({sampled(row, draw_of(position=position)).token_id for position in range(50)}) > 10
    assert sampled(row, draw_of(seed=2**64 - 1)) == sampled(row.copy(), draw_of(seed=2**64 - 1))


def test_inversion_at_the_edges():
    weights = np.zeros(2000)
    weights[[3, 700, 1500]] = (1.0, 2.0, 1.0)
    for fraction, expected in ((0.0, 3), (0.2499, 3), (0.25, 700), (0.7499, 700), (0.75, 1500)):
        assert invert(weights, fraction) == expected
    assert invert(weights, 1 - 2.0**-53) == 1500
    assert invert(weights * 1e-308, 1 - 2.0**-53) == 1500
    assert invert(np.ones(1), 0.5) == 0


def test_inversion_where_two_ways_of_adding_differ():
    """The sum of a run may exceed its last cumulative weight: the draw stays within the run."""
    tried = 0
    for seed in range(200):
        weights = np.random.default_rng(seed).random(512)
        if np.add.reduceat(weights, [0])[0] > np.cumsum(weights)[-1]:
            tried += 1
            assert invert(weights, 1 - 2.0**-53) == 511
            assert invert(np.concatenate((weights, np.zeros(9))), 1 - 2.0**-53) == 511
    assert tried > 10


@given(st.integers(0, 10**6), st.integers(1, 3000), st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_inversion_is_that_of_one_cumulative_sum(seed: int, size: int, fraction: float):
    weights = np.random.default_rng(seed).random(size) ** 8
    weights[np.random.default_rng(seed + 1).random(size) < 0.3] = 0.0
    weights[seed % size] = 1.0
    index = invert(weights, fraction)
    cumulative = np.cumsum(weights)
    target = fraction * cumulative[-1]
    assert weights[index] > 0
    assert cumulative[index] >= target * (1 - 1e-12)
    assert index == 0 or cumulative[index - 1] <= target * (1 + 1e-12)


# -- log probabilities ------------------------------------------------------------


def test_logprobs_are_of_the_untouched_distribution():
    row = random_row(15)
    exact = [float(value) for value in row]
    normaliser = math.log(math.fsum(math.exp(value) for value in exact))
    plain = sampled(row, draw_of(logprobs=4))
    bent = sampled(row, draw_of([1, 2], 1, logprobs=4, logit_bias=((3, 100.0),), temperature=0.0))
    assert bent.token_id == 3
    order = sorted(range(VOCAB), key=lambda index: (-exact[index], index))[:4]
    for token in (plain, bent):
        assert token.logprob == pytest.approx(exact[token.token_id] - normaliser, abs=1e-12)
        assert [index for index, _ in token.top_logprobs] == order
        assert [value for _, value in token.top_logprobs] == pytest.approx(
            [exact[index] - normaliser for index in order], abs=1e-12
        )


def test_how_many_logprobs():
    row = np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)
    assert sampled(row, draw_of()).logprob is None
    assert sampled(row, draw_of(logprobs=0)).top_logprobs == ()
    assert sampled(row, draw_of(logprobs=0)).logprob is not None
    assert [index for index, _ in sampled(row, draw_of(logprobs=20)).top_logprobs] == [1, 2, 3, 0]


# -- failures ------------------------------------------------------------


def test_logits_that_are_no_numbers_fail_the_row():
    for value in (np.nan, np.inf):
        for params in ({}, {"temperature": 0.0}, {"top_p": 0.5, "logprobs": 2}):
            row = random_row(16)
            row[77] = value
            assert failed(row, draw_of(**params)).code == Internal.code
    assert failed(np.full(9, -np.inf, np.float32), draw_of()).code == Internal.code


def test_a_request_that_leaves_no_token_fails_the_row():
    everything = tuple((index, -math.inf) for index in range(9))
    for bias in (everything, ((0, math.inf),), ((0, math.nan),), ((0, 1e300),)):
        failure = failed(random_row(17, 9), draw_of(logit_bias=bias))
        assert failure.code == InvalidParameter.code
        assert "logit_bias" in failure.message
    for token_id in (-1, 9):
        assert "outside 0 … 8" in failed(random_row(17, 9), draw_of(logit_bias=((token_id, 1.0),))).message


def test_minus_infinity_beside_numbers_is_a_token_never_drawn():
    row = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    for seed in range(50):
        for params in ({}, {"top_p": 0.99}, {"top_k": 3}, {"min_p": 0.0, "temperature": 2.0}):
            assert sampled(row, draw_of(seed=seed, **params)).token_id in (1, 3)


# -- the batch ------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 5},
        {"top_k": 50, "top_p": 0.9, "logprobs": 3},
        {"top_p": 0.95, "min_p": 0.01},
        {"repetition_penalty": 1.2, "temperature": 0.0, "logprobs": 0},
    ],
)
def test_a_row_anywhere_in_a_batch_gives_the_same_bits(params: dict[str, Any]):
    size = 4099  # odd, so that rows begin at every alignment
    row = random_row(18, size)
    draw = (
        draw_of([1, 5, 5], 1, seed=4, **params)
        if "repetition_penalty" in params
        else draw_of(seed=4, **params)
    )
    alone = sampled(row, draw)
    sampler = Sampler(size)
    batch = np.stack([random_row(seed, size) for seed in range(9)])
    for place in range(9):
        rows = batch.copy()
        rows[place] = row
        results = [
            sampler.sample(line, draw if index == place else draw_of(seed=index, logprobs=1))
            for index, line in enumerate(rows)
        ]
        assert results[place] == alone
