"""What changes single logits of a sequence's draws: tokens that penalties count, and biases."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from worker_orcd.sequence import SamplingParams

# Flags of an entry: a token of prompt or output; one that is never drawn.
SEEN, EXCLUDED = 1, 2
# `count`: how often it is in the output. Words of 4 bytes each.
ENTRY = np.dtype([("id", "<i4"), ("flags", "<i4"), ("count", "<i4"), ("bias", "<f4")])
WORDS = 4
ID, FLAGS, COUNT, BIAS = range(WORDS)


class Entries:
    """An entry for each token, once, in no order. Tokens and biases outside the vocabulary have none.

    They are kept from draw to draw: a token more costs the same, however many there are. A draw must be told
    to the device before the next one is made. Biases of a token that is named twice are added to each other.
    """

    def __init__(self, params: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> None:
        """Of the biases; of tokens once they are taken in."""
        self.counts_tokens = params.penalises
        self._num_prompt, self._vocab_size = num_prompt_tokens, vocab_size
        self._num_tokens = 0  # taken in
        self._places: dict[int, int] = {}
        self._words = array("i")  # a single one costs a tenth of what it costs in an array of numpy's
        inside = [pair for pair in params.logit_bias if 0 <= pair[0] < vocab_size]
        self._add(dict.fromkeys(token_id for token_id, _ in inside), 0)
        biases = np.frombuffer(self._words, np.float32)[BIAS::WORDS]
        with np.errstate(all="ignore"):
            for token_id, bias in inside:
                biases[self._places[token_id]] += np.float32(bias)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def words(self) -> memoryview:
        """All entries, as they lie in memory. To be released before a token is taken in."""
        return memoryview(self._words)

    @property
    def records(self) -> NDArray[np.void]:
        """(entries,) of `ENTRY`: a copy."""
        return np.array(self._words, np.int32).view(ENTRY)

    def place_of(self, token_id: int) -> int | None:
        return self._places.get(token_id)

    def take_in(self, token_ids: Sequence[int]) -> None:
        """`token_ids`: all that are known of the sequence, those that were taken in before among them."""
        start, end = self._num_tokens, len(token_ids)
        if not self.counts_tokens or start == end:
            return
        if start == 0:
            start = self._num_prompt
            self._see(token_ids[:start])
        for token_id in token_ids[start:end]:
            self.count(token_id)
        self._num_tokens = end

    def count(self, token_id: int) -> None:
        """One more token of the output."""
        place = self._places.get(token_id)
        if place is not None:
            self._words[WORDS * place + FLAGS] = SEEN
            self._words[WORDS * place + COUNT] += 1
        elif 0 <= token_id < self._vocab_size:
            self._places[token_id] = len(self._places)
            self._words.extend((token_id, SEEN, 1, 0))

    def _see(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        for token_id in self._places.keys() & distinct.keys():
            self._words[WORDS * self._places[token_id] + FLAGS] = SEEN
            del distinct[token_id]
        self._add([token_id for token_id in distinct if 0 <= token_id < self._vocab_size], SEEN)

    def _add(self, token_ids: Collection[int], flags: int) -> None:
        """Entries of tokens that have none."""
        start = len(self._places)
        self._places.update(zip(token_ids, range(start, start + len(token_ids)), strict=True))
        for token_id in token_ids:
            self._words.extend((token_id, flags, 0, 0))
