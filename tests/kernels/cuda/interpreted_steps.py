"""
Steps that are launched before the tokens of the one before are known, their draws under Triton's interpreter.
Run in a process of its own, which `TRITON_INTERPRET=1` must be set for before Triton is imported; see
test_sampling.py.

A scheduler makes them. Only the forward pass is none: a sequence has the same logits wherever it is, and what
it draws depends on what it has drawn. Prints a line of JSON: tokens by sequence, with steps ahead and rounds,
and drawn by the host one by one; how many steps went ahead, and the most rounds of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from interpreted_sampling import HOST, ROWS, SAMPLER, VOCAB, random_rows

from driving import Drive, submit
from worker_orcd.config import EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.kernels.backend import Counts, Limits
from worker_orcd.kernels.cuda.inputs import Staging
from worker_orcd.kernels.cuda.rounds import Rounds
from worker_orcd.kernels.cuda.step import DrawingStep
from worker_orcd.kernels.draw import Draw, Draws
from worker_orcd.kernels.entries import Entries
from worker_orcd.sequence import RowResult, SampledToken, SamplingParams, Step

CPU = torch.device("cpu")
KINDS: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 2.0, "repetition_penalty": 1.4},
    {"temperature": 1.0},
    {"presence_penalty": 1.0, "logit_bias": ((9, 1.0), (10, -2.0))},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "temperature": 0.4, "top_k": 6},
    {"logit_bias": ((9, 3.0),)},
)
LOGITS = random_rows(21, len(KINDS)) / 2
LOGITS[:, 40:60] += 8.0  # of which penalties choose


class GivenLogits:
    """In place of an executor."""

    logits = torch.zeros(0)

    def start(self, _counts: Counts) -> torch.Tensor:
        return self.logits

    again = start


class Pending:
    def __init__(self, results: Callable[[], Sequence[RowResult]]) -> None:
        self.wait = results


class Device:
    """Implements `sequence.Runner`."""

    max_steps, max_draws = 2, 4

    def __init__(self) -> None:
        limits = Limits(max_tokens=ROWS, max_rows=ROWS, max_blocks_per_row=4, block_size=16)
        rounds = Rounds(
            SAMPLER._kernels, Staging(limits, CPU).device, limits, SAMPLER.token_ids, SAMPLER.ints
        )
        self.executor, self.draws = GivenLogits(), Draws(VOCAB)
        self.step = DrawingStep(self.executor, CPU, SAMPLER, rounds)  # type: ignore[arg-type]

    def launch(self, step: Step) -> Pending:
        draws = [self.draws.of(row) if row.samples else None for row in step.rows]
        of = [row.sequence.id for row in step.rows if row.samples]
        self.executor.logits = torch.from_numpy(np.pad(LOGITS[of], ((0, 0), (0, 5))))[:, :VOCAB]
        self.step._start(Counts(step.num_tokens, len(step.rows), len(of), step.num_rounds), draws)
        return Pending(SAMPLER.results)


def alone(number: int, prompt: Sequence[int], max_tokens: int, params: SamplingParams) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        entries = Entries(params, len(prompt), VOCAB)
        entries.take_in(tokens)
        draw = Draw(params=params, position=len(tokens), excluded=frozenset(), entries=entries)
        result = HOST.sample(LOGITS[number], draw)
        if not isinstance(result, SampledToken):
            raise SystemExit(f"{number}: {result}")
        tokens.append(result.token_id)
    return tokens[len(prompt) :]


def main() -> None:
    submits = [
        submit(i, [50 + i, 44, 45] * (1 + 2 * i), 30 - 3 * i, seed=i, **params)
        for i, params in enumerate(KINDS)
    ]
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=ROWS, block_size=16)
    drive = Drive(Device(), config, [CacheGroup(BlockPool(40))])
    found = drive.run(submits)
    told = [
        [found[one.id].ids, alone(one.id, one.prompt_token_ids, one.max_tokens, one.sampling)]
        for one in submits
    ]
    ahead, rounds = sum(step.ahead for step in drive.steps), max(step.num_rounds for step in drive.steps)
    print(json.dumps({"tokens": told, "ahead": ahead, "steps": len(drive.steps), "rounds": rounds}))


if __name__ == "__main__":
    with np.errstate(all="ignore"):  # the interpreter computes what masks leave out
        main()
