"""The GPU's sampler: the host's tokens, under an interpreter; what a compiler makes of it; what it is told.

`benchmarks/gpu_sampling.py` compares many more draws, on a GPU.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import under_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_sampling import faults
from worker_orcd.errors import Internal, InvalidParameter
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.draw_slab import (
    COUNTS,
    EXTRA_ENTRIES,
    MAX_DRAWS,
    MAX_VOCAB,
    MOST_ENTRIES,
    MOST_UNCOUNTED,
    NONE_LEFT,
    OK,
    SMALLEST_ENTRIES,
    DrawSlab,
    Int,
    Real,
    Wanted,
    entries_needed,
    write_entries,
)
from worker_orcd.kernels.cuda.sampler import DeviceSampler, sampling_kernels
from worker_orcd.kernels.draw import Draw
from worker_orcd.kernels.entries import ENTRY, EXCLUDED, SEEN, Entries
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import MAX_LOGPROBS, RowFailure, SampledToken, SamplingParams

VOCAB = 300


def draw_of(
    excluded: tuple[int, ...] = (), token_ids: list[int] | None = None, prompt: int = 1, **params: Any
) -> Draw:
    made = SamplingParams(**params)
    entries = Entries(made, prompt, MAX_VOCAB)
    entries.take_in(token_ids or [])
    adjusts = made.penalises or made.logit_bias
    return Draw(
        params=made, position=9, excluded=frozenset(excluded), entries=entries if adjusts else None
    )  # fmt: skip


def behind(draw: Draw, num_unknown: int, previous: int = 0, count: int = 1) -> Draw:
    """A draw behind tokens that the host does not know."""
    return replace(draw, num_unknown=num_unknown, previous=previous, count=count)


# -- the kernels' logic, under Triton's interpreter --------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[list[dict[str, Any] | None]]]:
    """By case, what `interpreted_sampling.py` prints."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return under_interpreter.run("interpreted_sampling.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("plain", 17), ("filtered", 8), ("small", 16), ("long", 8), ("adjusted", 8), ("counted", 20),
        ("failures", 8), ("equal_logits", 2),
    ],
)  # fmt: skip
def test_a_row_gives_what_the_host_gives(
    interpreted: dict[str, list[list[dict[str, Any] | None]]], case: str, rows: int
) -> None:
    assert len(interpreted[case]) == rows
    for device, host in interpreted[case]:
        if device is None or host is None or "code" in device or host.get("logprob") is None:
            assert device == host
            continue
        assert device["token_id"] == host["token_id"]
        assert device["logprob"] == pytest.approx(host["logprob"], abs=1e-9)
        assert [token for token, _ in device["top_logprobs"]] == [token for token, _ in host["top_logprobs"]]
        assert [value for _, value in device["top_logprobs"]] == pytest.approx(
            [value for _, value in host["top_logprobs"]], abs=1e-9
        )


@pytest.mark.slow
def test_counts_of_unknown_tokens_decide(interpreted: dict[str, list[list[dict[str, Any] | None]]]) -> None:
    """So that a count that is wrong by one would show."""
    tokens = [None if device is None else device.get("token_id") for device, _ in interpreted["counted"]]
    assert tokens[6:9] == [17, 5, 4900] and tokens[14:] == [4900, 5, 4900, 30, 31, 30]


@pytest.mark.slow
def test_counts_do_not_depend_on_other_rows(
    interpreted: dict[str, list[list[dict[str, Any] | None]]],
) -> None:
    assert len(interpreted["counted_alone"]) > 8
    assert all(among == alone for among, alone in interpreted["counted_alone"])


@pytest.mark.slow
def test_steps_ahead_draw_what_the_host_draws_one_by_one() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    found = under_interpreter.run("interpreted_steps.py")
    assert found["ahead"] > found["steps"] // 2 and found["rounds"] == 4
    assert [len(set(alone)) > 4 for _, alone in found["tokens"]] == [True, True, True, True, False]
    for ahead, alone in found["tokens"]:
        assert ahead == alone


@pytest.mark.slow
def test_failures_are_whose_fault_they_are(
    interpreted: dict[str, list[list[dict[str, Any] | None]]],
) -> None:
    codes = [device.get("code") for device, _ in interpreted["failures"] if device is not None]
    assert codes == [*["INTERNAL"] * 3, *[InvalidParameter.code] * 3, None, "INTERNAL"]


@pytest.mark.slow
def test_a_draw_depends_neither_on_other_rows_nor_on_the_kernels_they_need(
    interpreted: dict[str, list[list[dict[str, Any] | None]]],
) -> None:
    assert len(interpreted["same"]) == 4
    for among, with_every_kernel, alone in interpreted["same"]:
        assert among == with_every_kernel == alone


# -- what the compiler makes of them -----------------------------------------------------------------------


MOST = (
    "stats by group", "draw what is kept", "adjust", "count drawn", "find floor", "collect", "choose",
    "raw list top", "tally", "cut", "cut long", "cut stats",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "vocab", "names"),
    [
        (90, 201088, MOST),
        (80, 50257, ("stats by group", "choose", "count drawn", "adjust")),
        (89, 262144, ("choose", "cut long", "count drawn")),
    ],
)
def test_no_kernel_spills(capability: int, vocab: int, names: tuple[str, ...]) -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    kernels = sampling_kernels(vocab, 256, aligned=vocab % 16 == 0)
    assert {name: found for name in names if (found := faults(kernels[name], capability))} == {}


def test_every_kernel_is_described_as_it_is() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    from worker_orcd.kernels.cuda import cutting, filtering, sampling

    modules = {"cutting": cutting, "filtering": filtering, "sampling": sampling}
    for kernel in sampling_kernels(1000, 3).values():
        function = getattr(modules[kernel.module], kernel.function)
        described = [name for name, _ in kernel.arguments + kernel.constants]
        wanted = list(inspect.signature(function.fn).parameters)
        arguments = len(kernel.arguments)
        assert described[:arguments] == wanted[:arguments]
        assert sorted(described[arguments:]) == sorted(wanted[arguments:])


# -- what the host tells the device ------------------------------------------------------------------------


def written(draw: Draw, vocab_size: int) -> np.ndarray:
    """The entries that the host writes down, as records."""
    words = np.full(400, 77, np.int32)
    count = write_entries(draw, memoryview(words), 3, vocab_size)
    assert (words[:12] == 77).all() and (words[12 + 4 * count :] == 77).all()
    return words.view(ENTRY)[3 : 3 + count]


def adjusted(row: np.ndarray, draw: Draw) -> np.ndarray:
    """By the entries, as `sampling.adjust` does it."""
    params = draw.params
    row = row.copy()
    for entry in written(draw, len(row)):
        value = row[entry["id"]]
        if entry["flags"] & SEEN:
            penalty = np.float32(params.repetition_penalty)
            value = value / penalty if value > 0 else value * penalty
        if entry["count"] > 0:
            often = np.float32(params.frequency_penalty) * np.float32(entry["count"])
            value = (value - np.float32(params.presence_penalty)) - often
        row[entry["id"]] = -np.inf if entry["flags"] & EXCLUDED else value + entry["bias"]
    return row


ids = st.integers(0, VOCAB - 1)


@given(
    seed=st.integers(0, 1000),
    tokens=st.none() | st.lists(ids, min_size=1, max_size=40),
    prompt=st.integers(0, 20),
    bias=st.dictionaries(ids, st.floats(-100, 100), max_size=5),
    excluded=st.sets(st.integers(-2, VOCAB + 2), max_size=4),
    penalties=st.tuples(st.floats(0.1, 2), st.floats(-2, 2), st.floats(-2, 2)),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_entries_change_logits_as_the_host_does(
    seed: int,
    tokens: list[int] | None,
    prompt: int,
    bias: dict[int, float],
    excluded: set[int],
    penalties: tuple[float, float, float],
) -> None:
    row = (5 * np.random.default_rng(seed).standard_normal(VOCAB)).astype(np.float32)
    draw = draw_of(
        tuple(excluded), tokens, prompt, logit_bias=tuple(bias.items()), repetition_penalty=penalties[0],
        presence_penalty=penalties[1], frequency_penalty=penalties[2],
    )  # fmt: skip
    np.testing.assert_array_equal(adjusted(row, draw), Sampler(VOCAB).adjusted(row, draw))
    found = written(draw, VOCAB)["id"].tolist()
    assert len(set(found)) == len(found)


def slab() -> DrawSlab:
    return DrawSlab(VOCAB, 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [
        (draw_of(), Wanted()),
        (draw_of(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5), Wanted()),  # filters drop no argmax
        (draw_of(top_k=VOCAB), Wanted()),
        (draw_of(top_k=VOCAB - 1), Wanted(filters=True)),
        (draw_of(top_p=0.99), Wanted(filters=True)),
        (draw_of(min_p=0.01), Wanted(filters=True)),
        (draw_of(logprobs=0), Wanted(logprobs=True)),
        (draw_of(token_ids=[1], presence_penalty=1.0), Wanted(adjusts=True)),
        (draw_of(excluded=(4,)), Wanted(adjusts=True)),
        (draw_of(logit_bias=((4, 1.0),)), Wanted(adjusts=True)),
    ],
)
def test_a_step_needs_what_its_rows_ask_for(draw: Draw, wanted: Wanted) -> None:
    filled = slab()
    assert filled.fill([draw_of(), draw]) == (wanted, {})
    assert filled.fill([draw_of(), draw_of(temperature=0.3)]) == (Wanted(), {})


def test_rows_that_fail_at_once_are_not_drawn() -> None:
    filled = slab()
    draws = [draw_of(), draw_of(logit_bias=((VOCAB, 1.0),)), draw_of(logprobs=MAX_LOGPROBS + 1)]
    wanted, failures = filled.fill(draws)
    assert not wanted.adjusts
    assert {row: failure.code for row, failure in failures.items()} == {
        1: InvalidParameter.code,
        2: InvalidParameter.code,
    }
    assert "outside 0 … 299" in failures[1].message
    assert "at most 20" in failures[2].message
    with pytest.raises(ValueError, match="9 draws"):
        filled.fill([draw_of()] * 9)


def test_there_is_room_for_tokens_that_nobody_knows() -> None:
    """Behind the entries of each row, and counted as what the device may add."""
    filled = slab()
    penalised = draw_of(token_ids=[5, 6, 6], presence_penalty=1.0, frequency_penalty=0.5)
    draws = [
        draw_of(), behind(penalised, 2, previous=3, count=4), draw_of(logit_bias=((4, 1.0),)),
        behind(draw_of(excluded=(6, 9), token_ids=[5, 6], repetition_penalty=1.2), 0, count=2), penalised,
    ]  # fmt: skip
    wanted, failures = filled.fill(draws)
    assert (wanted, failures) == (Wanted(adjusts=True, counts=True), {})
    filled.upload()
    ints = filled.ints.view(torch.int64).view(len(Int), -1)
    assert ints[Int.ENTRY_COUNT, :5].tolist() == [0, 2, 1, 3, 2]
    assert ints[Int.ENTRY_START, 1:5].tolist() == [0, 7, 8, 13]
    assert (ints[Int.FLAGS, :5] & COUNTS > 0).tolist() == [False, True, False, True, False]
    assert ints[Int.UNKNOWN, [1, 3]].tolist() == [2, 0] and ints[Int.PREVIOUS, 1] == 3
    reals = filled.reals.view(torch.float64).view(len(Real), -1)
    assert reals[Real.FREQUENCY, 1] == 0.5 and reals[Real.REPETITION, 3] == np.float32(1.2)
    words = filled.entries.numpy().view("<i4").reshape(-1, 4)
    assert words[:2, :3].tolist() == [[5, SEEN, 0], [6, SEEN, 2]]
    assert words[8:11, :3].tolist() == [[5, SEEN, 0], [6, SEEN | EXCLUDED, 1], [9, EXCLUDED, 0]]


def test_more_unknown_tokens_than_can_be_are_refused() -> None:
    penalised = draw_of(token_ids=[5], presence_penalty=1.0)
    assert slab().fill([behind(penalised, MAX_DRAWS, count=MAX_DRAWS)])[0].counts
    for num_unknown, count in ((MAX_DRAWS + 1, 1), (-1, 1), (MAX_DRAWS, MAX_DRAWS + 1)):
        with pytest.raises(Internal, match="not known"):
            slab().fill([behind(penalised, num_unknown, count=count)])


def test_nothing_is_taken_for_aligned_that_is_not() -> None:
    for name, kernel in sampling_kernels(50257, 8, aligned=False).items():
        promised = {kernel.arguments[index][0] for index in kernel.aligned_arguments}
        assert not promised & {"logits", "stride"}, name


# -- launches: the arguments, without a GPU ----------------------------------------------------------------


class Launches(Kernels):
    """Keeps what would be launched."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), 90)
        self.made: list[tuple[str, tuple[int, int, int]]] = []
        self.given: list[tuple[Kernel, tuple[torch.Tensor | float, ...]]] = []

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], *arguments: torch.Tensor | float) -> None:
        assert len(arguments) == len(kernel.arguments)
        for (name, kind), value in zip(kernel.arguments, arguments, strict=True):
            assert kind.startswith("*") == isinstance(value, torch.Tensor), name
            if isinstance(value, torch.Tensor) and name != "logits":
                assert value.data_ptr() % 16 == 0, name
        self.made.append((kernel.function, grid))
        self.given.append((kernel, arguments))


def test_a_plain_step_is_two_launches() -> None:
    kernels = Launches()
    sampler = DeviceSampler(kernels, 9000, 50)
    wanted = sampler.prepare([draw_of(), None, draw_of(temperature=0.0)])
    sampler.upload()
    sampler.launch(torch.zeros(48, 9000), wanted)
    assert kernels.made == [("chunk_stats", (3, 48, 1)), ("draw", (48, 1, 1))]
    with pytest.raises(ValueError, match="51 rows"):
        sampler.launch(torch.zeros(51, 9000), wanted)


def test_what_rows_ask_for_is_launched_in_order() -> None:
    kernels = Launches()
    sampler = DeviceSampler(kernels, 9000, 5)
    sampler.launch(torch.zeros(5, 9000), Wanted(adjusts=True, logprobs=True))
    assert [name for name, _ in kernels.made] == [
        "chunk_stats", "find_floor", "collect", "list_top", "adjust", "chunk_stats", "draw", "finish",
    ]  # fmt: skip
    kernels.made.clear()
    sampler.launch(torch.zeros(5, 9000), Wanted(adjusts=True, counts=True), slot=1, behind=2)
    assert [name for name, _ in kernels.made] == ["count_drawn", "adjust", "chunk_stats", "draw", "finish"]
    drawn = kernels.given[-5][1][0]
    assert isinstance(drawn, torch.Tensor) and drawn.data_ptr() == sampler.token_ids[2].data_ptr()
    kernels.made.clear()
    sampler.launch(torch.zeros(5, 9000), Wanted(filters=True))
    assert [name for name, _ in kernels.made] == [
        "chunk_stats", "find_floor", "collect", "choose", "tally", "tally", "collect_between", "cut",
        "cut_long", "cut_stats", "draw",
    ]  # fmt: skip


def test_results_are_told_apart_by_row() -> None:
    sampler = DeviceSampler(Launches(), VOCAB, 5)
    sampler.prepare([draw_of(), None, draw_of(logit_bias=((-1, 1.0),)), draw_of()])
    sampler.token_ids[0, :3] = torch.tensor([7, 8, 9], dtype=torch.int32)
    sampler.download()
    first, second, third, fourth = sampler.results()
    assert (first, second, fourth) == (SampledToken(7), None, SampledToken(9))
    assert isinstance(third, RowFailure)


def test_results_of_two_steps_are_told_in_order() -> None:
    sampler = DeviceSampler(Launches(), VOCAB, 5)
    for first_token, draws in ((3, [draw_of(), draw_of()]), (40, [None, draw_of(), draw_of(logprobs=50)])):
        sampler.prepare(draws)
        sampler.upload()
        sampler.token_ids[0, :2] = torch.tensor([first_token, first_token + 1], dtype=torch.int32)
        sampler.download()
    assert sampler.results() == [SampledToken(3), SampledToken(4)]
    nothing, token, failure = sampler.results()
    assert (nothing, token) == (None, SampledToken(40)) and isinstance(failure, RowFailure)
    with pytest.raises(IndexError):
        sampler.results()


def test_results_of_rounds_are_told_by_row() -> None:
    """The last round's are in the first slot; a row that drew fewer tokens has those of the first rounds."""
    sampler = DeviceSampler(Launches(), VOCAB, 5)
    draws = [draw_of(), draw_of(logit_bias=((-1, 1.0),)), draw_of(logprobs=1)]
    sampler.prepare([replace(draw, count=count) for draw, count in zip(draws, (3, 2, 1), strict=True)])
    for number in range(3):
        sampler.token_ids[2 - number, :3] = torch.tensor([7, 8, 9], dtype=torch.int32) + 10 * number
        views = sampler._views
        views["masses"][2 - number, 2] = float(number + 1)
        views["statuses"][2 - number, 0] = NONE_LEFT if number == 2 else OK
    sampler.download(3)
    found = sampler.results()
    assert found[:2] == [SampledToken(7), SampledToken(17)]
    assert isinstance(found[2], RowFailure) and "no token" in found[2].message
    assert len(found) == 6 and all(isinstance(one, RowFailure) for one in found[3:5])
    last = found[5]
    assert isinstance(last, SampledToken) and last.token_id == 9
    assert last.logprob == pytest.approx(44 * math.log(2.0))


def test_a_launch_writes_to_its_slot() -> None:
    kernels = Launches()
    sampler = DeviceSampler(kernels, 9000, 5)
    for slot in (0, 3):
        kernels.given.clear()
        sampler.launch(torch.zeros(5, 9000), Wanted(logprobs=True), slot=slot)
        names = {
            name: value
            for kernel, values in kernels.given
            for (name, _), value in zip(kernel.arguments, values, strict=True)
            if isinstance(value, torch.Tensor)
        }
        for name in ("tokens", "statuses", "token_logits", "top_ids", "top_logits"):
            assert names[name].data_ptr() == sampler._views[name][slot].data_ptr(), name


def test_draws_of_the_next_step_leave_those_that_are_being_copied_alone() -> None:
    """On the host, where the copies are only queued; on the device they are in the stream's order."""
    filled = slab()
    first, second = draw_of(seed=7, excluded=(1,)), draw_of(seed=8, excluded=(1, 2, 3, 4))
    filled.fill([first])
    being_copied = [side.clone() for side in host_bytes(filled)]
    filled.fill([second])
    assert all(map(torch.equal, host_bytes(filled)[2:], being_copied[:2]))
    filled.upload()
    ints = filled.ints.view(torch.int64).view(len(Int), -1)
    assert (ints[Int.SEED, 0], ints[Int.ENTRY_COUNT, 0]) == (8, 4)
    filled.fill([draw_of(seed=9)])  # where the first was
    assert not torch.equal(host_bytes(filled)[0], being_copied[0])


def host_bytes(filled: DrawSlab) -> list[torch.Tensor]:
    """Parameters and entries of the step that was filled last, and of the one before."""
    sides = reversed(filled._sides)
    return [side.buffer for one in sides for side in (one.parameters, one.entries)]


def test_vocabularies_have_a_limit() -> None:
    for size in (0, MAX_VOCAB + 1):
        with pytest.raises(ValueError, match=f"{size}"):
            DeviceSampler(Launches(), size, 1)


def test_what_it_takes_is_known_before() -> None:
    sampler = DeviceSampler(Launches(), 201088, 64, longest=1000)
    assert DeviceSampler.device_bytes(201088, 64, 1000) == sampler.allocated_bytes
    assert 4 << 20 < sampler.allocated_bytes < 10 << 20


@pytest.mark.parametrize(
    ("rows", "longest", "needed"),
    [(256, 1024, 256 * (1024 + EXTRA_ENTRIES)), (1, 1, SMALLEST_ENTRIES), (256, 1 << 17, MOST_ENTRIES)],
)
def test_rows_that_need_the_most_entries_have_room(rows: int, longest: int, needed: int) -> None:
    assert entries_needed(150_000, rows, longest) == needed
    assert entries_needed(500, rows, longest) == max(SMALLEST_ENTRIES, rows * (500 + MOST_UNCOUNTED))
    if needed == MOST_ENTRIES:
        return
    filled = DrawSlab(150_000, rows, torch.device("cpu"), needed)
    tokens = list(range(longest))
    bias = tuple((100_000 + index, 1.0) for index in range(1024))
    _, failures = filled.fill([draw_of(token_ids=tokens, presence_penalty=1.0, logit_bias=bias)] * rows)
    assert not failures


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, worker_orcd.kernels.cuda.sampler; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
