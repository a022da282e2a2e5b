"""
Scheduler and runner together on models with sliding windows: few blocks are held, and the bits stay the same.

The yardstick is `score` on a cache with a block for every 16 tokens in every group: it keeps everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, load_runner
from tiny_variants import VARIANTS, tiny_file

from driving import Drive, submit
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.scoring import score
from worker_orcd.sequence import RowResult, SampledToken, Sequence, Step

pytestmark = pytest.mark.slow

ENGINE = EngineConfig(max_num_seqs=64, max_num_batched_tokens=64)
SIZE = ENGINE.block_size
TEXT = np.random.default_rng(11).integers(0, 320, 400).tolist()
CASES = ["mistral native", "gpt-oss native", "gemma3 native", "gpt-oss reference"]
WINDOWS = {"mistral": (64,), "gpt-oss": (None, 32), "gemma3": (None, 40)}


@dataclass
class Done:
    results: list[RowResult]

    def wait(self) -> list[RowResult]:
        return self.results


@dataclass
class Watched:
    """Runs steps greedily and keeps the logits of every token; can spoil what no sequence of a step holds."""

    runner: ModelRunner
    backend: Backend
    spoils: bool = False
    max_steps: int = 1
    max_draws: int = 1
    sequences: dict[int, Sequence] = field(default_factory=dict)
    logits: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # (sequence, position)

    @property
    def windows(self) -> list[int | None]:
        return [group.window for group in self.runner.plan.kv_groups]

    def launch(self, step: Step) -> Done:
        if self.spoils:
            self._spoil(step)
        results: list[RowResult] = []
        found = iter(self.runner.logits(step))
        for row in step.rows:
            s = self.sequences[row.sequence.id] = row.sequence
            last = np.empty(0)
            for position in range(s.num_computed_tokens, s.num_computed_tokens + row.num_tokens):
                last = self.logits[s.id, position] = next(found)
            results.append(SampledToken(int(last.argmax())) if row.samples else None)
        return Done(results)

    def drive(self, *num_blocks: int, **engine: Any) -> Drive:
        """`num_blocks` of each group. Logits are kept from here on."""
        self.logits.clear()
        groups = [
            CacheGroup(BlockPool(count), window)
            for count, window in zip(num_blocks, self.windows, strict=True)
        ]
        return Drive(self, replace(ENGINE, **engine), groups)

    def check(self) -> None:
        """Every logit is that of a cache that keeps everything."""
        whole = {id: score(self.runner, sequence.token_ids) for id, sequence in self.sequences.items()}
        for (id, position), row in self.logits.items():
            assert np.array_equal(row, whole[id][position]), f"sequence {id}, position {position}"

    def _spoil(self, step: Step) -> None:
        """Make all blocks NaN that no row of the step holds, the null block first of all."""
        for layer, cache in zip(self.runner.config.layers, self.runner.caches, strict=True):
            held = {b for row in step.rows for b in row.sequence.block_tables[cache.group]} - {0}
            if isinstance(cache.tensor, torch.Tensor):
                spoilt = [b for b in range(cache.tensor.shape[1]) if b not in held]
                cache.tensor[:, spoilt] = torch.nan
            else:
                a = layer.attention
                size = self.backend.cache_block_bytes(SIZE, a.num_kv_heads, a.head_dim)
                blocks = cache.tensor.data.reshape(-1, size)
                blocks[[b for b in range(len(blocks)) if b not in held]] = 0xFF


@pytest.fixture(scope="module", params=CASES)
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    name, device = request.param.split()
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_file((MODELS | VARIANTS)[name]).write(path)
    backend: Backend = ReferenceBackend()
    if device == "native":
        try:
            library = load_library()
        except LibraryUnavailable as error:
            pytest.skip(str(error))
        backend = NativeBackend(library, DeviceConfig(cpu_threads=2))
    runner = load_runner(path, backend, ENGINE)
    assert tuple(group.window for group in runner.plan.kv_groups) == WINDOWS[name]
    assert all(group.num_blocks > 400 // SIZE for group in runner.plan.kv_groups), "score reuses no block"
    yield Watched(runner, backend)
    backend.close()


@pytest.fixture(autouse=True)
def fresh(watched: Watched) -> None:
    watched.sequences.clear()
    watched.spoils = False


def held_at_most(window: int) -> int:
    """Blocks that the tokens behind a new one and itself can touch."""
    return -(-(window - 1) // SIZE) + 1


@pytest.mark.parametrize("budget", [64, 23, 5])
def test_a_long_prompt_holds_a_window_and_computes_the_same_bits(watched: Watched, budget: int):
    watched.spoils = True
    drive = watched.drive(
        *(30 if window is None else 1 + held_at_most(window) + 4 for window in watched.windows),
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )
    drive.run([submit(0, TEXT[:250], 30)])
    assert len(watched.logits) == 279
    for index, window in enumerate(watched.windows):
        held = [stats.kv_groups[index].total - stats.kv_groups[index].free for stats in drive.steps[:-1]]
        if window is None:
            assert max(held) == 18
        else:
            assert max(held) == held_at_most(window)
    watched.check()


def test_a_prefix_is_found_by_what_its_window_sees(watched: Watched):
    drive = watched.drive(*(40 for _ in watched.windows))
    drive.run([submit(0, TEXT[:200], 10)])
    second = drive.run([submit(1, TEXT[:150] + TEXT[300:340], 5), submit(2, TEXT[:200], 5)])
    assert {id: result.num_cached_tokens for id, result in second.items()} == {1: 144, 2: 192}
    assert min(position for id, position in watched.logits if id == 1) == 144
    watched.check()


def test_a_prefix_whose_window_is_gone_is_computed_again(watched: Watched):
    least = max(held_at_most(window) for window in watched.windows if window is not None)
    drive = watched.drive(*(60 if window is None else 2 + least for window in watched.windows))
    drive.run([submit(0, TEXT[:200], 1)])
    drive.run([submit(1, TEXT[200:], 1)])
    again = drive.run([submit(2, TEXT[:200], 5)])
    assert again[2].num_cached_tokens == 0
    watched.check()


def test_a_crowd_that_lacks_blocks_behind_its_windows(watched: Watched):
    least = max(held_at_most(window) for window in watched.windows if window is not None)
    drive = watched.drive(
        *(90 if window is None else 3 + least for window in watched.windows),
        max_num_batched_tokens=48,
        max_num_seqs=6,
    )
    lengths = [5, 1, 3, 100, 17, 64]  # the first ones grow into their windows side by side
    results = drive.run([submit(i, TEXT[i : i + length], 40) for i, length in enumerate(lengths)])
    assert drive.num_preempted > 0
    assert all(len(result.ids) == 40 for result in results.values())
    assert all(group.free == group.total for group in drive.steps[-1].kv_groups)
    watched.check()


def test_scoring_reuses_blocks_where_the_text_is_longer_than_the_cache(watched: Watched):
    text = TEXT[:130]
    whole = score(watched.runner, text)
    plan = watched.runner.plan
    small = [
        group if group.window is None else replace(group, num_blocks=1 + held_at_most(group.window))
        for group in plan.kv_groups
    ]
    watched.runner.plan = replace(plan, kv_groups=tuple(small))
    try:
        assert np.array_equal(whole, score(watched.runner, text))
        assert np.array_equal(whole, score(watched.runner, text, 3))
    finally:
        watched.runner.plan = plan
