"""Which kernel is fastest for GPT-OSS-20B's experts: the parts `variants` and `streams` of gpu_experts.py.

Each variant's bits are compared with those of the tile that is chosen, or, of another number of chunks, with
those of the first variant that has it; then it is timed. One that fails does not hide the others.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_expert_times import MODELS, Layer
from gpu_session import Session
from worker_orcd.kernels.cuda.expert_products import Order
from worker_orcd.kernels.cuda.expert_weights import PackedExperts
from worker_orcd.kernels.cuda.variants import Tile


@dataclass(frozen=True)
class Candidate:
    """One way to do a product; `chunks` 0: as the contract has it."""

    tile: Tile
    chunks: int = 0

    def __str__(self) -> str:
        tile = self.tile
        chunks = f" S{self.chunks}" if self.chunks else ""
        if tile.ahead:
            return f"stream {tile.rows}x{tile.tokens} w{tile.warps} a{tile.ahead}{chunks}"
        split = " split" if tile.split else ""
        return f"{tile.rows}x{tile.tokens} w{tile.warps} s{tile.stages} u{tile.unroll}{split}{chunks}"


# Through shared memory: rows, tokens, warps, stages, steps at a time.
_ONE = ((64, 16, 4, 4, 3), (64, 16, 4, 3, 5), (128, 16, 4, 4, 3))
_SEVERAL = ((64, 16, 4, 4, 3), (128, 16, 4, 3, 3), (128, 16, 4, 4, 3), (256, 16, 8, 3, 3))
_DOZENS = ((128, 32, 4, 3, 3), (128, 32, 8, 3, 3), (256, 32, 8, 3, 3))
_MORE = ((128, 64, 8, 3, 3), (128, 64, 4, 3, 3), (64, 64, 4, 3, 3))
_MANY = ((128, 128, 8, 2, 3), (64, 128, 4, 3, 3))
# To registers: rows, tokens, warps, steps ahead.
_STREAM = ((64, 8, 4, 5), (64, 8, 4, 9), (64, 8, 4, 15), (128, 8, 4, 5))
# tokens, entries of a sorted tile, tiles
TILES = (
    (1, 0, _ONE), (8, 16, _SEVERAL[:2]), (16, 16, _SEVERAL[:2]), (64, 16, _SEVERAL), (128, 32, _DOZENS),
    (256, 64, _MORE), (2048, 128, _MANY),
)  # fmt: skip
STREAMS = ((1, 0, _STREAM), (2, 0, _STREAM), (4, 0, _STREAM), (6, 0, _STREAM[:1]), (6, 16, ()))
_CHUNKS = {"gate_up": (3,), "down": (1,)}  # that are tried for one token, beside the contract's
Plan = tuple[tuple[int, int, tuple[tuple[int, ...], ...]], ...]


def candidates(what: str, tokens: int, tiles: tuple[tuple[int, ...], ...]) -> Iterator[Candidate]:
    """Tiles under the contract; of some, other numbers of chunks too."""
    for numbers in tiles:
        rows, columns, warps, stages, *rest = numbers
        if rest:
            tile = Tile(rows=rows, tokens=columns, warps=warps, stages=stages, unroll=rest[0])
            others = _CHUNKS[what] if tokens == 1 and numbers == _ONE[0] else ()
        else:
            tile = Tile(rows=rows, tokens=columns, warps=warps, stages=1, ahead=stages)
            others = _CHUNKS[what] if what == "down" and (tokens == 1 or stages == 9) else ()
        if tile.ahead != 9 or what == "gate_up":  # it divides the steps of a chunk
            yield Candidate(tile)
        for chunks in others:
            yield Candidate(tile, chunks)


class Trial:
    """One product of a layer at some number of tokens, done in several ways."""

    def __init__(self, layer: Layer, what: str, tokens: int, width: int) -> None:
        self.layer, self.what, self.width = layer, what, width
        self.weight: PackedExperts = getattr(layer, what)
        x, h, y = layer.inputs(tokens)
        self.x, self.out = (x, h) if what == "gate_up" else (h.clone(), y)
        self.glu = layer.model.glu if what == "gate_up" else None
        routings = layer.routings(tokens)
        sorters = layer.sorters[: len(routings)]
        self.steps: list[tuple[torch.Tensor, Order | None]] = [
            (experts, sorter.sort(experts, layer.model.num_experts, width) if width else None)
            for experts, sorter in zip(routings, sorters, strict=True)
        ]
        self.expected: dict[int, list[torch.Tensor]] = {}

    def run(self, candidate: Candidate | None, step: int) -> None:
        weight, tile = self.weight, None
        if candidate is not None:
            chunks = candidate.chunks or weight.shape.chunks
            shape = dataclasses.replace(weight.shape, chunks=chunks)
            weight = dataclasses.replace(weight, matrix=dataclasses.replace(weight.matrix, shape=shape))
            split = self.width == 0 and chunks > 1 and not candidate.tile.ahead
            tile = dataclasses.replace(candidate.tile, split=split)
        experts, order = self.steps[step]
        products = self.layer.products
        products.linear(self.x, weight, experts, self.out, order=order, glu=self.glu, tile=tile)

    def differing(self, candidate: Candidate | None) -> int:
        """Words of all routings that are not as the first variant with as many chunks has them."""
        chunks = 0 if candidate is None else candidate.chunks
        if chunks == self.weight.shape.chunks:
            chunks = 0
        found: list[torch.Tensor] = []
        for step in range(len(self.steps)):
            self.out.fill_(torch.nan)
            self.run(candidate, step)
            found.append(self.out.clone())
        if self.layer.session.recording:
            return 0
        kind = {4: torch.int32, 2: torch.int16}[self.out.element_size()]
        if chunks not in self.expected:
            self.expected[chunks] = found
            return sum(int(one.isnan().sum()) for one in found)
        return sum(
            int((one.view(kind) != other.view(kind)).sum())
            for one, other in zip(found, self.expected[chunks], strict=True)
        )

    def microseconds(self, candidate: Candidate | None) -> float:
        steps = list(range(len(self.steps))) * (1 if len(self.steps) > 2 else 2)
        return self.layer.session.microseconds([partial(self.run, candidate, step) for step in steps])


def variants(session: Session) -> None:
    """Tiles of the kernel that serves everything."""
    compare(session, TILES)


def streams(session: Session) -> None:
    """Tiles of the kernel for a few tokens an expert."""
    compare(session, STREAMS)


def compare(session: Session, plan: Plan) -> None:
    """By product and number of tokens: microseconds, fastest first, and the share of copy bandwidth."""
    copy = session.copy_bandwidth()
    layer = Layer(session, MODELS[0])
    found: dict[str, Any] = {}
    for tokens, width, tiles in plan:
        sizes = layer.bytes(tokens)
        for what in ("gate_up", "down"):
            trial = Trial(layer, what, tokens, width)
            times: list[tuple[float, str]] = []
            for candidate in (None, *candidates(what, tokens, tiles)):
                label = "chosen" if candidate is None else str(candidate)
                try:
                    bad = trial.differing(candidate)
                    if bad:
                        session.fail(f"DIFFERS {what} T={tokens} by {width} {label}: {bad} words")
                    times.append((trial.microseconds(candidate), label))
                except Exception as error:  # too much shared memory: Triton's own error type
                    if session.recording:
                        raise
                    session.fail(f"FAILED {what} T={tokens} by {width} {label}: {type(error).__name__}")
                    traceback.print_exc(limit=-3)
            times.sort()
            key = f"{what} T={tokens} by {width}"
            found[key] = {"us": times, "bytes": sizes[what]}
            session.save(f"tiles of {len(plan)}", found)
            session.say(f"{key}: {sizes[what] / 1e6:.1f} MB, at copy {sizes[what] / 1000 / copy:.1f} µs")
            for micro, label in times:
                share = sizes[what] / 1000 / micro / copy
                session.say(f"    {micro:7.1f} µs {share:4.0%} {label}")
