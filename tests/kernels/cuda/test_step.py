"""In which order a step's parts are queued, and when eight rounds are one graph. The parts only note it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker_orcd.kernels.backend import Counts
from worker_orcd.kernels.cuda import step as step_module
from worker_orcd.kernels.cuda.draw_slab import MAX_DRAWS, Wanted
from worker_orcd.kernels.cuda.inputs import Bucket
from worker_orcd.kernels.cuda.step import DrawingStep

CPU = torch.device("cpu")
PLAIN, FILTERED, ADJUSTED = Wanted(), Wanted(filters=True), Wanted(adjusts=True)


class Graph:
    def __init__(self, queue: list[str], name: str) -> None:
        self._queue, self._name = queue, name

    def replay(self) -> None:
        self._queue.append(self._name)


class Parts:
    """Executor, sampler and rounds of a step whose draws want `wanted`."""

    def __init__(self, wanted: Wanted, *, graphs: bool = True) -> None:
        self.queue: list[str] = []
        self.captured_of: list[list[str]] = []
        self.buckets = [Bucket(1, 1), Bucket(2, 2), Bucket(4, 4), Bucket(16, 16), Bucket(64, 16)]
        self._wanted, self._graphs = wanted, graphs
        self.forgot_after = -1  # captures

    # executor
    def start(self, counts: Counts) -> torch.Tensor:
        self.stage(counts)
        return self.again(counts)

    def stage(self, counts: Counts) -> None:
        self.queue.append("inputs")

    def again(self, counts: Counts) -> torch.Tensor:
        self.queue.append("graph")
        return torch.zeros(counts.num_logits, 3)

    def launched(self, counts: Counts) -> torch.Tensor:
        self.queue.append("kernels")
        return torch.zeros(counts.num_logits, 3)

    def captured(self, work: Callable[[], object]) -> Graph | None:
        if not self._graphs:
            return None
        begin = len(self.queue)
        work()
        self.captured_of.append(self.queue[begin:])
        del self.queue[begin:]
        return Graph(self.queue, f"burst {len(self.captured_of) - 1}")

    def warm(self, on_progress: object, launch_more: object) -> None:
        self.queue.clear()

    def forget_launches(self) -> None:
        self.forgot_after = len(self.captured_of)

    # sampler
    def prepare(self, draws: list[Any]) -> Wanted:
        self.queue.append("prepare")
        return self._wanted

    def upload(self) -> None:
        self.queue.append("draws")

    def download(self, rounds: int) -> None:
        self.queue.append("results")


class Sampler:
    def __init__(self, parts: Parts) -> None:
        self.prepare, self.upload, self.download = parts.prepare, parts.upload, parts.download
        self._queue = parts.queue

    def launch(self, logits: torch.Tensor, wanted: Wanted, slot: int, behind: int = 0) -> None:
        if slot < MAX_DRAWS - 1 and behind:
            assert behind == slot + 1
        self._queue.append(f"draw {len(logits)} to {slot}{' filtered' if wanted.filters else ''}")


class Rounds:
    def __init__(self, parts: Parts) -> None:
        self._queue = parts.queue

    def launch(self, rows: int, slot: int) -> None:
        self._queue.append(f"on from {slot}")


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "on_device", lambda _: torch.inference_mode())


def made(wanted: Wanted, *, graphs: bool = True) -> tuple[DrawingStep, Parts]:
    parts = Parts(wanted, graphs=graphs)
    step = DrawingStep(parts, CPU, Sampler(parts), Rounds(parts))  # pyright: ignore[reportArgumentType]
    step.warm(lambda done, of: None)
    return step, parts


def counts(rows: int, rounds: int, tokens: int = 0) -> Counts:
    return Counts(num_tokens=tokens or rows, num_rows=rows, num_logits=rows, num_rounds=rounds)


def rounds(compute: str, rows: int, number: int, end: str = "") -> list[str]:
    queue = [compute, f"draw {rows} to {number - 1}{end}"]
    for slot in range(number - 2, -1, -1):
        queue += [f"on from {slot + 1}", compute, f"draw {rows} to {slot}{end}"]
    return queue


def test_eight_rounds_of_few_rows_are_captured_plain_and_filtered() -> None:
    _, parts = made(PLAIN)
    assert parts.captured_of == [
        rounds("kernels", rows, MAX_DRAWS, end) for rows in (1, 2, 4) for end in ("", " filtered")
    ]
    assert parts.forgot_after == len(parts.captured_of)


@pytest.mark.parametrize(("rows", "wanted", "burst"), [(1, PLAIN, 0), (1, FILTERED, 1), (4, PLAIN, 4)])
def test_a_burst_is_one_graph_behind_its_inputs_and_draws(rows: int, wanted: Wanted, burst: int) -> None:
    step, parts = made(wanted)
    step.launch(counts(rows, MAX_DRAWS), [None] * rows)
    assert parts.queue == ["inputs", "prepare", "draws", f"burst {burst}", "results"]


@pytest.mark.parametrize(
    ("rows", "number", "tokens"),
    [
        (1, MAX_DRAWS - 1, 0),
        (1, 1, 0),
        (3, MAX_DRAWS, 0),  # a row that is not there would draw with what another had
        (16, MAX_DRAWS, 0),
        (2, MAX_DRAWS, 33),  # the first round computes prompts
    ],
)
def test_other_steps_compute_while_draws_are_made(rows: int, number: int, tokens: int) -> None:
    step, parts = made(PLAIN)
    step.launch(counts(rows, number, tokens), [None] * rows)
    first, *more = rounds("graph", rows, number)
    assert parts.queue == ["inputs", first, "prepare", "draws", *more, "results"]


def test_rows_with_penalties_have_a_graph_a_round() -> None:
    step, parts = made(ADJUSTED)
    step.launch(counts(2, MAX_DRAWS), [None] * 2)
    assert parts.queue == ["inputs", "prepare", "draws", *rounds("graph", 2, MAX_DRAWS), "results"]


def test_without_graphs_nothing_is_captured() -> None:
    step, parts = made(PLAIN, graphs=False)
    step.launch(counts(1, MAX_DRAWS), [None])
    assert parts.captured_of == []
    assert "burst 0" not in parts.queue and parts.queue.count("graph") == MAX_DRAWS
