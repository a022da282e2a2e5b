"""
Draws with penalties behind tokens that the host does not know: of the step before, and of rounds before.

What gpu_sampling.py compares: rows as a step of the engine has them, and each of their draws with all known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worker_orcd.kernels.cuda.draw_slab import MAX_DRAWS, DrawSlab, Int, entries_needed
from worker_orcd.kernels.cuda.sampler import DeviceSampler
from worker_orcd.kernels.draw import Draw, Draws
from worker_orcd.kernels.entries import Entries
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import Row, RowResult, SampledToken, SamplingParams, Sequence


@dataclass(frozen=True)
class Behind:
    """A row of a step whose host knows only the first tokens."""

    params: SamplingParams
    num_prompt: int
    known: list[int]
    unknown: list[int]  # what the step before has drawn
    count: int  # to draw
    excluded: frozenset[int] = frozenset()

    def draw(self, vocab: int, previous: int) -> Draw:
        """As the device is told: in the step before it was the row `previous`."""
        made = self.after(vocab, self.known)
        unknown = len(self.unknown) if self.params.penalises else 0
        position = len(self.known) + len(self.unknown)
        return replace(made, count=self.count, num_unknown=unknown, previous=previous, position=position)

    def after(self, vocab: int, token_ids: SequenceABC[int]) -> Draw:
        """Of one token, behind these."""
        entries = Entries(self.params, self.num_prompt, vocab)
        entries.take_in(token_ids)
        there = self.params.penalises or self.params.logit_bias
        return Draw(
            params=self.params,
            position=len(token_ids),
            excluded=self.excluded,
            entries=entries if there else None,
        )


def rows_behind(
    kinds: SequenceABC[dict[str, Any]], count: int, vocab: int, seed: int, rounds: int
) -> list[Behind]:
    """Random ones. Of 200 tokens few are different, so that what is drawn often has been before."""
    random = np.random.default_rng(seed)
    behind: list[Behind] = []
    for number in range(count):
        params = kinds[number % len(kinds)] | {"seed": int(random.integers(2**63))}
        bias = tuple((token, value) for token, value in params.get("logit_bias", ()) if token < vocab)
        tokens = random.integers(0, min(vocab, int(random.choice((20, 3000)))), 208).tolist()
        known = int(random.integers(200, 209))
        behind.append(
            Behind(
                params=SamplingParams(**(params | {"logit_bias": bias})),
                num_prompt=int(random.integers(1, 200)),
                known=tokens[:known],
                unknown=tokens[known:],
                count=int(random.integers(1, rounds + 1)),
                excluded=frozenset(random.integers(0, vocab, 3).tolist() if number % 5 == 0 else ()),
            )
        )
    return behind


def on_device(
    sampler: DeviceSampler, logits: torch.Tensor, rows: SequenceABC[Behind], rounds: int, seed: int = 0
) -> list[list[RowResult]]:
    """A step of so many rounds, all from the same logits. Its rows were others in the step before."""
    places = np.random.default_rng(seed).permutation(sampler.max_rows)[: len(rows)].tolist()
    tokens = torch.zeros(MAX_DRAWS, sampler.max_rows, dtype=torch.int32)
    for row, place in zip(rows, places, strict=True):
        tokens[: len(row.unknown), place] = torch.tensor(row.unknown[::-1], dtype=torch.int32)
    sampler.token_ids[:, : sampler.max_rows].copy_(tokens)
    wanted = sampler.prepare(
        [row.draw(sampler.vocab_size, place) for row, place in zip(rows, places, strict=True)]
    )
    sampler.upload()
    ints = sampler.ints.view(torch.int64).view(len(Int), -1)
    for slot in range(rounds - 1, -1, -1):
        if slot < rounds - 1:  # as `kernels.cuda.advance` does
            ints[Int.POSITION] += (ints[Int.POSITION] < ints[Int.LAST]).long()
        sampler.launch(logits, wanted, slot=slot, behind=slot + 1 if slot < rounds - 1 else 0)
    sampler.download(rounds)
    found = iter(sampler.results())
    return [[next(found) for _ in range(row.count)] for row in rows]


def on_host(line: NDArray[np.float32], row: Behind) -> list[RowResult]:
    """The same draws one by one, each behind tokens that are known."""
    sampler, tokens = Sampler(len(line)), [*row.known, *row.unknown]
    results: list[RowResult] = []
    for _ in range(row.count):
        results.append(sampler.sample(line, row.after(len(line), tokens)))
        tokens.append(results[-1].token_id if isinstance(results[-1], SampledToken) else 0)
    return results


def host_milliseconds(rows: int, length: int, rounds: int, params: dict[str, Any]) -> tuple[float, float]:
    """Of a step ahead whose rows have so many tokens: to make its draws, and to write them down. Medians."""
    vocab = 201088
    random = np.random.default_rng(0)
    slab = DrawSlab(vocab, rows, torch.device("cpu"), entries_needed(vocab, rows, length))
    sequences = [
        Sequence(
            id=number,
            token_ids=random.integers(0, vocab, length).tolist(),
            max_tokens=1 << 20,
            stop_token_ids=frozenset(),
            sampling=SamplingParams(seed=number, **params),
        )
        for number in range(rows)
    ]
    made, times = Draws(vocab), list[tuple[float, float]]()
    for _ in range(50):
        step = [
            Row(one, 1, len(one.token_ids) + rounds - 1, rounds, previous_draw=one.id) for one in sequences
        ]
        start = time.perf_counter()
        draws = [made.of(row) for row in step]
        between = time.perf_counter()
        slab.fill(draws)
        times.append((between - start, time.perf_counter() - between))
        for one in sequences:
            one.token_ids += random.integers(0, vocab, rounds).tolist()
    first, second = np.median(times[1:], axis=0)
    return 1e3 * float(first), 1e3 * float(second)


def tell_host() -> None:
    """What rows with penalties cost the host, and rows without."""
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5}
    for length, rounds, params in (
        (1000, 1, {}), (1000, 1, penalties), (1000, MAX_DRAWS, penalties), (8000, MAX_DRAWS, penalties),
    ):  # fmt: skip
        draws, filled = host_milliseconds(256, length, rounds, params)
        what = f"256 rows of {length} tokens, {rounds} rounds, {'penalties' if params else 'plain'}"
        print(f"{what}: {draws:.2f} ms to make, {filled:.2f} to write")
