"""
Attention on a GPU: right, the same bits however rows are batched and cut, and how fast.

    python benchmarks/gpu_attention.py                      # checks and figures, about a minute
    python benchmarks/gpu_attention.py --only correct same
    python benchmarks/gpu_attention.py --kv fp8             # float8 keys and values alone
    python benchmarks/gpu_attention.py --only tune          # what planning should take units to cost
    python benchmarks/gpu_attention.py --only tiles         # which tile is fastest where
    python benchmarks/gpu_attention.py --only variants      # other ways with fp8 heads of 80 and 96

Needs a GPU, torch, triton and numpy, and no network. Each part is run twice: first without launching, to
know its kernels, which are then compiled by many processes. Checks are against float64: mixed rows, split
rows, windows, sinks, every kind of head, and that counters are zero again and that what is no query of a row
is left alone. Then rows alone against the same rows in batches and in chunks, on programs of every size, cut
as finely as can be and not at all, bit for bit. Then times: of single queries beside the bandwidth of a
device copy in the same run (bytes are of the keys and values that they see), of prompts in TFLOP/s. All of it
goes to a JSON file as it comes; the lines are printed again last. Ends with 1 if a check failed.
`gpu_model.py` compares the bits of whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from gpu_attention_pieces import check_variants
from gpu_attention_steps import Step, exact, head_params, random_step
from gpu_attention_times import KV, measure, tune, tune_tiles
from gpu_session import Session, parser_of, run_parts
from worker_orcd.kernels.backend import AttentionParams, Limits
from worker_orcd.kernels.cuda.attend import Attention, Tile, choose_tile

Rows = list[tuple[int, int]]  # tokens in the cache already, and queries

# -- right -------------------------------------------------------------------------------------------------

MIXED: Rows = [(0, 70), (200, 1), (5, 3), (0, 1), (300, 9)]
MANY: Rows = [(index * 7, 1) for index in range(200)]
CASES: dict[str, tuple[AttentionParams, Rows, bool, int]] = {  # with sinks or not, tokens of a block
    "mixed rows": (head_params(6, 2, 16), MIXED, False, 16),
    "blocks of 32": (head_params(6, 2, 64), MIXED, False, 32),
    "blocks of 64": (head_params(6, 2, 64), MIXED, False, 64),
    "blocks of 48": (head_params(6, 2, 64), MIXED, False, 48),
    "one long row": (head_params(2, 1, 32), [(5000, 1)], False, 16),
    "a very long row": (head_params(8, 2, 64), [(60000, 1)], False, 16),
    "long rows of some queries": (head_params(14, 2, 64), [(9000, 7), (3000, 1), (0, 0), (0, 20)], False, 16),
    "a long prompt": (head_params(14, 2, 64), [(0, 1500)], False, 16),
    "a chunk of a prompt": (head_params(32, 8, 128), [(700, 300), (20, 1)], False, 16),
    "two pieces of a head": (head_params(32, 32, 96), [(150, 2), (0, 400), (900, 1)], False, 16),
    "wide heads": (head_params(4, 1, 256), [(100, 1), (0, 300)], False, 16),
    "wide heads, few queries": (head_params(4, 1, 256, 512), [(1000, 1), (0, 30)], False, 16),
    "heads of 80": (head_params(4, 4, 80), [(100, 1), (0, 30)], False, 16),
    "heads of 80, many queries": (head_params(4, 4, 80), [(100, 1), (0, 300), (900, 1)], False, 16),
    "heads of 96, few queries": (head_params(32, 32, 96), [(100, 1), (900, 2), (0, 30)], False, 16),
    "parts of a head": (head_params(4, 2, 192), [(100, 1), (900, 2), (0, 30)], False, 16),
    "window and sinks": (head_params(64, 8, 64, 128), MIXED, True, 16),
    "window, sinks, many rows": (head_params(64, 8, 64, 128), MANY, True, 16),
    "sinks, long rows": (head_params(64, 8, 64), [(4000, 1), (2500, 2)], True, 16),
    "a long window": (head_params(2, 1, 16, 400), [(900, 1), (0, 600)], False, 16),
    "a chunk under a window": (head_params(2, 1, 64, 2047), [(5000, 200), (130, 1)], False, 16),
    "more units than programs": (head_params(64, 8, 64), [(0, 256)], False, 16),
    "many rows": (head_params(14, 2, 64), MANY, False, 16),
}


def check_correct(session: Session) -> None:
    found: dict[str, dict[str, float]] = {}
    for kv, (case, (params, rows, sinks, block_size)) in product(session.args.kv, CASES.items()):
        name = f"{case}, {kv}"
        step = random_step(params, rows, session.device, block_size=block_size, fp8=kv == "fp8")
        attention = Attention(session.kernels, step.limits, cache=step.cache.tensor.dtype)
        attention.reserve(params)
        out = step.run(attention, step.limits, sinks=sinks)
        if session.recording:
            continue
        wanted = exact(step, sinks=sinks)
        tokens = len(wanted)
        one = {
            "error": float((out[:tokens].double() - wanted).norm() / wanted.norm()),
            "counters": int(attention._counters.abs().sum()),
            "touched": int((~out[tokens:].isnan()).sum()),
        }
        ok = 0 < one["error"] < 1e-3 and not one["counters"] and not one["touched"]
        found[name] = one
        session.save("correct", found)
        (session.say if ok else session.fail)(f"{'' if ok else 'WRONG '}{name:34} {one}")


# -- the same ----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[AttentionParams, bool]] = {
    "14 / 2 heads of 64": (head_params(14, 2, 64), False),
    "64 / 8 of 64, sinks": (head_params(64, 8, 64), True),
    "64 / 8 of 64, window 128, sinks": (head_params(64, 8, 64, 128), True),
    "32 / 32 of 96": (head_params(32, 32, 96), False),
    "32 / 8 of 128": (head_params(32, 8, 128), False),
    "4 / 1 of 256, window 512": (head_params(4, 1, 256, 512), False),
}
LONG: Rows = [(0, 600), (2900, 90), (700, 65)]
SHORT: Rows = [(index * 97 % 5000, 1) for index in range(40)]
CHUNKS = (1, 7, 64, 333)
BATCHES = (1, 2, 5, 16, 40)
Alone = dict[int, tuple[int, torch.Tensor]]  # by a row's first block: position of the first query, results


def half(head_dim: int, tokens: int, capability: int, cache: torch.dtype) -> Tile:
    """Tiles of the other size."""
    tile = choose_tile(head_dim, tokens, capability, cache)
    if head_dim > 128 or capability < 90:
        return tile
    rows = 192 - tile.rows
    return Tile(rows=rows, warps=rows // 16, stages=tile.stages, programs=128 // rows)


def ways(
    session: Session, params: AttentionParams, limits: Limits, cache: torch.dtype
) -> dict[str, Attention]:
    """How a step may be cut up."""
    make = partial(Attention, session.kernels, limits, cache=cache)
    found = {
        "as shipped": make(),
        "rows whole": make(splitting=1e9),
        "rows in many parts": make(start=0.0, splitting=0.0),
        "other tiles": make(choose=half),
    }
    for attention in found.values():
        attention.reserve(params)
    return found


def trials(step: Step) -> dict[str, list[Step]]:
    """Steps that have every query, or some rows, of `step`. Of each: which rows, first query, how many."""
    rows = [(row, 0, count) for row, (_, count) in enumerate(step.rows)]
    found = {"all at once": [step.part(rows)], "backwards": [step.part(rows[::-1])]}
    for size in CHUNKS:
        chunks = [
            (row, first, min(size, count - first))
            for row, _, count in rows
            for first in range(0, count, size)
        ]
        if size == 1:  # every 40th of the prompts'
            chunks = chunks[::40] + rows[len(LONG) :]
        together = 8 if size < 64 else 3
        found[f"chunks of {size}"] = [
            step.part(chunks[first : first + together]) for first in range(0, len(chunks), 3 * together)
        ]
    for size in BATCHES:
        order = torch.randperm(len(SHORT), generator=torch.Generator().manual_seed(size))[:size].tolist()
        found[f"batch of {size}"] = [step.part([rows[len(LONG) + row] for row in order])]
        found[f"batch of {size} and a chunk"] = [
            step.part([*(rows[len(LONG) + row] for row in order), (0, 300, 300)])
        ]
    return found


def check_same(session: Session) -> None:
    found: dict[str, Any] = {}
    for kv, (kind, (params, sinks)) in product(session.args.kv, KINDS.items()):
        name = f"{kind}, {kv}"
        step = random_step(params, LONG + SHORT, session.device, fp8=kv == "fp8")
        limits = step.limits
        alone: Alone = {}
        cut = ways(session, params, limits, step.cache.tensor.dtype)
        for row, (before, count) in enumerate(step.rows):
            one = step.part([(row, 0, count)])
            alone[one.tables[0][0]] = before, one.run(cut["as shipped"], limits, sinks=sinks)
        compared, differing = 0, 0
        for trial, steps in trials(step).items():
            for way, attention in cut.items():
                bad = 0
                for one in steps:
                    out = one.run(attention, limits, sinks=sinks)
                    if not session.recording:
                        words, wrong = compare(alone, one, out)
                        compared, bad = compared + words, bad + wrong
                differing += bad
                if bad:
                    session.fail(f"DIFFERS {name}, {trial}, {way}: {bad} words")
        found[name] = {"compared": compared, "differing": differing}
        session.save("same", found)
        session.say(f"{name:40} {found[name]}")


def compare(alone: Alone, step: Step, out: torch.Tensor) -> tuple[int, int]:
    """Words of the step's queries, and how many are others than of the row alone, or not written."""
    starts, words, wrong = step.starts(), 0, torch.zeros((), dtype=torch.int64, device=out.device)
    for row, (before, count) in enumerate(step.rows):
        first, own = alone[step.tables[row][0]]
        wanted, got = own[before - first :][:count], out[starts[row] :][:count]
        wrong += ((wanted.view(torch.int32) != got.view(torch.int32)) | got.isnan()).sum()
        words += got.numel()
    return words, int(wrong)


PARTS: dict[str, Callable[[Session], None]] = {
    "correct": check_correct,
    "same": check_same,
    "fast": measure,
    "tune": tune,
    "tiles": tune_tiles,
    "variants": check_variants,
}


def main() -> None:
    parser = parser_of(__doc__, PARTS, "gpu_attention.json", default=("correct", "same", "fast"))
    parser.add_argument("--kv", nargs="+", choices=KV, default=list(KV), help="what keys and values are")
    run_parts(parser.parse_args(), PARTS)


if __name__ == "__main__":
    main()
