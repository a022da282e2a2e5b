"""What the host keeps of a sequence's tokens and biases, beside a count of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.kernels.entries import SEEN, Entries
from worker_orcd.sequence import SamplingParams

VOCAB = 30
ids = st.integers(-3, VOCAB + 3)


def entries_of(prompt: int, **params: Any) -> Entries:
    return Entries(SamplingParams(**params), prompt, VOCAB)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    prompt=st.lists(ids, min_size=1, max_size=100),
    turns=st.lists(st.lists(ids, max_size=8), max_size=30),
    bias=st.lists(st.tuples(ids, st.sampled_from([1.5, -2.0, 0.25])), max_size=6),
    resumed=st.booleans(),
)
def test_each_token_has_an_entry_whenever_it_came(
    prompt: list[int], turns: list[list[int]], bias: list[tuple[int, float]], resumed: bool
):
    made = entries_of(len(prompt), presence_penalty=1.0, logit_bias=tuple(bias))
    tokens = list(prompt)
    for turn in turns:
        if not resumed:  # else all are taken in at once
            made.take_in(tokens)
        tokens += turn
    made.take_in(tokens)
    made.take_in(tokens)
    inside = {token_id for token_id in tokens if 0 <= token_id < VOCAB}
    biased = {token_id for token_id, _ in bias if 0 <= token_id < VOCAB}
    found = {int(one["id"]): one for one in made.records}
    assert len(found) == len(made.records) == len(made) and set(found) == inside | biased
    output = Counter(tokens[len(prompt) :])
    for place, (token_id, one) in enumerate(found.items()):
        assert made.place_of(token_id) == place
        assert (one["flags"] == SEEN) == (token_id in inside) and one["count"] == output[token_id]
        assert one["bias"] == sum(value for biased_id, value in bias if biased_id == token_id)
    assert made.place_of(VOCAB) is None


def test_tokens_are_of_no_account_without_penalties():
    made = entries_of(2, logit_bias=((4, 1.0), (VOCAB, 2.0), (4, 0.5)))
    made.take_in([4, 5, 6])
    assert made.records.tolist() == [(4, 0, 0, 1.5)]
    assert made.words.tolist()[:3] == [4, 0, 0]


class Watched(list[int]):
    """Tokens that count how many of them are looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[int]:
        self.looked_at += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.looked_at += len(found) if isinstance(index, slice) else 1
        return found


@pytest.mark.parametrize("length", [100, 20_000])
def test_a_token_more_costs_the_same_however_many_there_are(length: int):
    made = Entries(SamplingParams(repetition_penalty=1.1), 1, 1 << 20)
    tokens = Watched(range(length))
    made.take_in(tokens)
    assert tokens.looked_at >= length
    tokens.looked_at = 0
    tokens.append(5)
    made.take_in(tokens)
    assert 1 <= tokens.looked_at <= 2
