"""
Draws under Triton's interpreter, beside those of the host's sampler. Run in a process of its own, which
`TRITON_INTERPRET=1` must be set for before Triton is imported; see test_sampling.py.

Prints a line of JSON: by case, for each row what both gave. Cases are named in `CASES`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_counted import Behind, on_host, rows_behind
from gpu_counted import on_device as on_device_behind
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.draw_slab import COUNTS, Int, Wanted
from worker_orcd.kernels.cuda.sampler import DeviceSampler
from worker_orcd.kernels.draw import Draw
from worker_orcd.kernels.entries import Entries
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import RowResult, SamplingParams

VOCAB = 5003  # two chunks, the second of them ragged
ROWS = 8
TYPES = {"*i64": torch.int64, "*fp64": torch.float64, "*fp32": torch.float32, "*i32": torch.int32}
Logits = NDArray[np.float32]


class InterpretedKernels(Kernels):
    """Gives the interpreter the tensors themselves, which it wants of the right type."""

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        module = importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
        values = [
            given.view(TYPES[kind]) if isinstance(given, torch.Tensor) else given
            for (_, kind), given in zip(kernel.arguments, arguments, strict=True)
        ]
        getattr(module, kernel.function)[grid](*values, **dict(kernel.constants))


SAMPLER = DeviceSampler(InterpretedKernels(torch.device("cpu"), 90), VOCAB, ROWS)
HOST = Sampler(VOCAB)


def draw_of(
    position: int = 7, excluded: Sequence[int] = (), token_ids: Sequence[int] | None = None, **params: Any
) -> Draw:
    made = SamplingParams(**params)
    entries = Entries(made, 3, VOCAB)
    entries.take_in(token_ids or [])
    return Draw(
        params=made,
        position=position,
        excluded=frozenset(excluded),
        entries=entries if made.penalises or made.logit_bias else None,
    )


def random_rows(seed: int, count: int = ROWS, spread: float = 3.0) -> Logits:
    return (spread * np.random.default_rng(seed).standard_normal((count, VOCAB))).astype(np.float32)


def on_device(logits: Logits, draws: Sequence[Draw | None], wanted: Wanted | None = None) -> list[RowResult]:
    """In a wider buffer with a row more than there are draws, which is skipped."""
    padded = torch.full((len(logits) + 1, VOCAB + 23), math.nan)[:ROWS]
    rows = padded[:, :VOCAB]
    rows[: len(logits)] = torch.from_numpy(logits)[: len(rows)]
    before = rows.clone()
    found = SAMPLER.prepare(draws)
    SAMPLER.upload()
    SAMPLER.launch(rows, found if wanted is None else wanted)
    SAMPLER.download()
    if not torch.equal(rows.view(torch.int32), before.view(torch.int32)):
        raise SystemExit("logits were not put back")
    return SAMPLER.results()


def both(logits: Logits, draws: Sequence[Draw | None], wanted: Wanted | None = None) -> list[Any]:
    """[[device, host], …], as JSON."""
    rows = iter(logits)
    host = [None if draw is None else HOST.sample(next(rows), draw) for draw in draws]
    found = on_device(logits, draws, wanted)
    return [[None if one is None else asdict(one) for one in pair] for pair in zip(found, host, strict=True)]


def plain() -> list[Any]:
    logits = random_rows(1)
    logits[1] *= 0.1
    logits[5, [4, 4500, 4999]] = 50.0
    logits[6] = np.round(logits[6])
    logits[7, 17:] = -np.inf
    temperatures = (1.0, 2.0, 0.7, 1e-5, 5e-324, 0.0, 0.0, 1.0)
    draws = [draw_of(seed=2**64 - 1 - i, temperature=one) for i, one in enumerate(temperatures)]
    again = [replace(draw, position=2**20 + i) for i, draw in enumerate(draws)]
    return both(logits, [*draws[:3], None, *draws[3:]]) + both(logits, again)


def filtered() -> list[Any]:
    logits = random_rows(2, spread=4.0)
    logits[4:6] = np.round(logits[4:6]) * np.array([[1.0], [-0.0]], np.float32)
    params: list[dict[str, Any]] = [
        {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"top_k": 1},
        {"top_p": 0.9, "temperature": 0.7},
        {"min_p": 0.05},
        {"top_k": 30, "top_p": 0.5},
        {"top_k": 30},
        {"top_p": 0.0},
        {"top_k": 5000, "min_p": 1.0},
    ]
    return both(logits, [draw_of(seed=i, **one) for i, one in enumerate(params)])


def small() -> list[Any]:
    """Few are kept, of about equal weight, so that one more or less would show."""
    logits = np.full((ROWS, VOCAB), -20.0, np.float32)
    logits[:4, 600:5000:1100] = (1.999, 2.0, 1.997, 1.998)
    logits[4:, 600:5000:1100] = np.log((0.3, 0.1, 0.4, 0.2))
    params: list[dict[str, Any]] = [{"top_k": 3}] * 4 + [{"top_p": 0.88}] * 4
    steps = [[draw_of(seed=seed + i, **one) for i, one in enumerate(params)] for seed in (0, 100)]
    return both(logits, steps[0]) + both(logits, steps[1])


def long() -> list[Any]:
    """More may be kept than a list has room for."""
    logits = random_rows(4)
    logits[1] = np.where(np.arange(VOCAB) < 503, -0.5, 0.0)  # what weighs less than `min_p` comes first
    logits[2] = np.where(np.arange(VOCAB) < 803, -0.05, 0.0)  # what is kept in part comes first
    logits[3] = 1.5
    logits[4] = np.where(np.arange(VOCAB) < 4900, 2.0, 1.0)
    params: list[dict[str, Any]] = [
        {"top_p": 0.97, "temperature": 2.0},
        {"min_p": 0.7},
        {"top_p": 0.9},
        {"top_p": 0.6},  # all are equal
        {"top_k": 4500},  # of 4900 equal ones
        {"top_k": 4800, "top_p": 0.99, "temperature": 2.0},
        {"top_k": 3000, "temperature": 2.0},
        {"top_p": 1 - 1e-12, "temperature": 2.0},
    ]
    return both(logits, [draw_of(seed=i, **one) for i, one in enumerate(params)])


def adjusted() -> list[Any]:
    """Penalties, bias and exclusion, with and without log probabilities."""
    logits = random_rows(5)
    seen = [5, 9, 9, 5, 7, 7, 7, 4800, 6]
    logits[0, [5, 7, 9]] = 20.0, 20.5, 18.8  # each penalty decides between them
    best = [int(row.argmax()) for row in logits]
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3,
    }  # fmt: skip
    draws = [
        draw_of(token_ids=[*seen, best[0]], temperature=0.0, logprobs=20, **penalties),
        draw_of(token_ids=[*seen, best[1]] * 200, temperature=0.5, **penalties),
        draw_of(token_ids=list(range(2000)), top_k=20, logprobs=3, repetition_penalty=0.8),
        draw_of(excluded=(best[3], -1, VOCAB), temperature=0.0, logprobs=0),
        draw_of(logit_bias=((best[4], -100.0), (11, 9.5), (12, 9.25)), logprobs=2),
        draw_of(token_ids=seen, logit_bias=((5, 3.0), (9, 100.0)), excluded=(9,), **penalties),
        draw_of(seed=3, logprobs=5),
        draw_of(seed=3),
    ]
    return both(logits, draws)


def counted() -> list[Any]:
    """A step of three rounds, behind one whose tokens the host does not know: by row and round, what the
    device gives and what the host does who knows all. Before them rows that count nothing.
    """
    count, rounds = 7, 3
    logits = random_rows(12, count) / 2
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3}
    bias = ((7, 1.0), (4801, 2.0))
    all_params: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "logit_bias": bias},
        {"temperature": 0.0, "logprobs": 3, **penalties},
        {"seed": 3, "logit_bias": bias, **penalties},
        {"seed": 4, "top_k": 20, "repetition_penalty": 0.9},
        {"temperature": 0.0, "frequency_penalty": 20.0},
        {"temperature": 0.0, "presence_penalty": 2.0},  # which knows all but its own
    ]
    logits[[1, 3], 7] += 12.0
    logits[2] /= 2
    logits[2, [5, 17, 4900]] = 9.0, 7.5, 8.5  # each count decides between them
    logits[5, [5, 4900]] = 90.0  # drawn in turns
    logits[6, [30, 31, 32]] = 41.0, 40.0, 38.5
    random = np.random.default_rng(11)
    known = [random.integers(100, VOCAB, 5 + 400 * i).tolist() for i in range(count)]
    unknown = [random.permutation([5, 5, 4801, 4900]).tolist() for _ in range(count)]
    unknown[4], unknown[6] = [known[4][20], 4999, known[4][20], 17], []
    rows = [
        Behind(
            params=SamplingParams(**params),
            num_prompt=3,
            known=known[i],
            unknown=unknown[i],
            count=rounds - (i == 3),  # which is idle in the last
            excluded=frozenset((7,) * (i == 3)),
        )
        for i, params in enumerate(all_params)
    ]
    on_the_device = torch.from_numpy(np.pad(logits, ((0, 0), (0, 5))))[:, :VOCAB]
    found = on_device_behind(SAMPLER, on_the_device, rows, rounds)
    if not np.array_equal(on_the_device.numpy(), logits):
        raise SystemExit("logits were not put back")
    check_entries(count)
    return [
        [None if one is None else asdict(one) for one in pair]
        for device, line, row in zip(found, logits, rows, strict=True)
        for pair in zip(device, on_host(line, row), strict=True)
    ]


def check_entries(rows: int) -> None:
    """Each token once: two threads of `adjust` would change one logit."""
    ints = SAMPLER.ints.view(torch.int64).view(len(Int), -1)
    ids = SAMPLER._slab.entries.view(torch.int32).view(-1, 4)[:, 0]
    for row in range(rows):
        start, count = ints[Int.ENTRY_START, row], ints[Int.ENTRY_COUNT, row]
        if ints[Int.FLAGS, row] & COUNTS and len(ids[start : start + count].unique()) != count:
            raise SystemExit("a token has two entries")


def counted_alone() -> list[Any]:
    """[among others, alone] by row and round."""
    kinds = ({"repetition_penalty": 1.2, "temperature": 0.7}, {"frequency_penalty": 0.5, "top_p": 0.9}, {})
    rows = rows_behind(kinds, ROWS, VOCAB, 5, 2)
    logits = torch.from_numpy(np.pad(random_rows(13), ((0, 0), (0, 5))))[:, :VOCAB]
    among = on_device_behind(SAMPLER, logits, rows, 2, seed=1)
    alone = [on_device_behind(SAMPLER, logits[i : i + 1], [row], 2, seed=i)[0] for i, row in enumerate(rows)]
    return [
        [None if one is None else asdict(one) for one in pair]
        for pair in zip(chain.from_iterable(among), chain.from_iterable(alone), strict=True)
    ]


def failures() -> list[Any]:
    logits = random_rows(6)
    logits[0, 4800] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[7, 40] = math.nan
    draws = [
        draw_of(top_p=0.5),
        draw_of(temperature=0.0),
        draw_of(logprobs=3),
        draw_of(logit_bias=tuple((i, -math.inf) for i in range(VOCAB)), min_p=0.1),
        draw_of(logit_bias=((0, math.inf),)),
        draw_of(logit_bias=((VOCAB, 1.0),)),
        draw_of(top_k=3),
        draw_of(excluded=(40,), logprobs=1),
    ]
    return both(logits, draws)


def equal_logits() -> list[Any]:
    """More are most likely than a list has room for."""
    logits = random_rows(7, 2)
    logits[0] = 0.25
    return both(logits, [draw_of(logprobs=20), draw_of(logprobs=20)])


def same() -> list[Any]:
    """[elsewhere among others, with every kernel there is, alone] by row."""
    logits = random_rows(8, 4)
    params: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5})
    draws = [draw_of(seed=i, **one) for i, one in enumerate(params)]
    every = Wanted(adjusts=True, counts=True, filters=True, logprobs=True)
    alone = [on_device(row[None], [draw])[0] for row, draw in zip(logits, draws, strict=True)]
    with_all = on_device(logits, draws, every)
    others = random_rows(9, 3)
    busy = [
        draw_of(logprobs=3, top_p=0.97, temperature=2.0), draw_of(token_ids=[1, 2, 3], presence_penalty=1.0),
        draw_of(min_p=0.1),
    ]  # fmt: skip
    rows = np.concatenate((others[:2], logits[::-1], others[2:]))
    among = on_device(rows, [*busy[:2], *draws[::-1], busy[2]])[2:6][::-1]
    return [
        [None if one is None else asdict(one) for one in trio]
        for trio in zip(among, with_all, alone, strict=True)
    ]


CASES = (plain, filtered, small, long, adjusted, counted, counted_alone, failures, equal_logits, same)

if __name__ == "__main__":
    with np.errstate(all="ignore"):  # the interpreter computes what masks leave out
        print(json.dumps({case.__name__: case() for case in CASES}))
