"""The runner with a tiny model: steps in, tokens out, and what happens when a step goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, TinyFile, load_runner

from driving import Drive, submit
from worker_orcd.config import EngineConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.errors import ContextLengthExceeded, DeviceError, Internal, OutOfMemory, WorkerError
from worker_orcd.kernels.backend import BatchInputs, CompiledForward, Counts, Forward
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.draw import Draw
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.sampler import Sampler
from worker_orcd.runner.scoring import score, score_chunks
from worker_orcd.sequence import Row, RowFailure, RowResult, SampledToken, SamplingParams, Sequence, Step

ENGINE = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64)
PROMPT = np.random.default_rng(3).integers(0, 320, 20).tolist()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyFile(MODELS["llama"]).write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def runner(model_path: Path) -> ModelRunner:
    return load_runner(model_path, ReferenceBackend(), ENGINE)


def sequence(number: int, token_ids: list[int], **params: Any) -> Sequence:
    made = Sequence(
        id=number,
        token_ids=list(token_ids),
        max_tokens=30,
        stop_token_ids=frozenset(),
        sampling=SamplingParams(**params),
    )
    made.block_tables = [list(range(1 + 4 * number, 5 + 4 * number))]  # room for 64 tokens
    return made


def advance(runner: ModelRunner, rows: list[Row]) -> list[Any]:
    """Run a step and write its results into the sequences, as the scheduler does."""
    results = runner.launch(Step(tuple(rows))).wait()
    for row, result in zip(rows, results, strict=True):
        row.sequence.num_computed_tokens += row.num_tokens
        if isinstance(result, SampledToken):
            row.sequence.token_ids.append(result.token_id)
    return list(results)


def generate(runner: ModelRunner, made: Sequence, count: int) -> list[SampledToken]:
    return [advance(runner, [Row.of(made, made.num_uncomputed_tokens)])[0] for _ in range(count)]


def test_greedy_tokens_are_the_argmax_of_the_logits(runner: ModelRunner):
    made = sequence(0, PROMPT, temperature=0.0, logprobs=2)
    tokens = generate(runner, made, 8)
    logits = score(runner, made.token_ids).astype(np.float64)  # (28, vocab)
    for index, token in enumerate(tokens, start=len(PROMPT) - 1):
        row = logits[index]
        assert token.token_id == row.argmax() == made.token_ids[index + 1]
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert token.logprob == pytest.approx(expected.max(), abs=1e-9)
        assert token.top_logprobs[0] == (token.token_id, token.logprob)


def test_alone_chunked_and_in_a_crowd_the_tokens_are_the_same(runner: ModelRunner):
    settings = [
        {"temperature": 0.0, "logprobs": 3},
        {"seed": 5, "top_p": 0.9, "logprobs": 0},
        {"seed": 6, "temperature": 1.4, "top_k": 30, "repetition_penalty": 1.2},
        {"seed": 7, "min_p": 0.05, "presence_penalty": 0.5, "logprobs": 1},
    ]
    prompts = [PROMPT, PROMPT[3:5], PROMPT[::-1], PROMPT[:1]]
    alone = [
        generate(runner, sequence(0, prompt, **params), 10)
        for prompt, params in zip(prompts, settings, strict=True)
    ]
    crowd = [
        sequence(number, prompt, **params)
        for number, (prompt, params) in enumerate(zip(prompts, settings, strict=True))
    ]
    found: list[list[SampledToken]] = [[] for _ in crowd]
    chunk = 0
    while any(len(tokens) < 10 for tokens in found):
        chunk = chunk % 7 + 1
        rows = [
            Row.of(made, min(chunk, made.num_uncomputed_tokens))
            for made in crowd[:: 1 if chunk % 2 else -1]
            if len(found[made.id]) < 10
        ]
        for row, result in zip(rows, advance(runner, rows), strict=True):
            if result is not None:
                found[row.sequence.id].append(result)
    assert found == alone


def test_rows_that_do_not_reach_the_end_sample_nothing(runner: ModelRunner):
    made = sequence(0, PROMPT)
    assert runner.launch(Step((Row.of(made, 5),))).wait() == [None]
    both = runner.launch(Step((Row.of(made, 5), Row.of(sequence(1, PROMPT), 20)))).wait()
    assert both[0] is None
    assert isinstance(both[1], SampledToken)


def test_a_row_that_fails_does_not_disturb_its_neighbours(runner: ModelRunner):
    good = Row.of(sequence(0, PROMPT, temperature=0.0), 20)
    bad = Row.of(sequence(1, PROMPT, logit_bias=((320, 1.0),)), 20)
    alone = runner.launch(Step((good,))).wait()
    first, second = runner.launch(Step((bad, good))).wait()
    assert isinstance(first, RowFailure)
    assert "logit_bias" in first.message
    assert [second] == alone


def test_the_sequence_may_change_after_launch(runner: ModelRunner):
    made = sequence(0, PROMPT, temperature=0.0, presence_penalty=1.0)
    expected = runner.launch(Step((Row.of(made, 20),))).wait()
    pending = runner.launch(Step((Row.of(made, 20),)))
    made.token_ids.clear()
    made.block_tables.clear()
    assert pending.wait() == expected


def test_one_step_at_a_time(runner: ModelRunner):
    step = Step((Row.of(sequence(0, PROMPT), 20),))
    pending = runner.launch(step)
    with pytest.raises(Internal, match="while 1 were"):
        runner.launch(step)
    pending.wait()
    with pytest.raises(Internal, match="twice"):
        pending.wait()
    with pytest.raises(Internal, match="vocabulary"):
        runner.launch(Step((Row.of(sequence(0, [320]), 1),)))
    runner.launch(step).wait()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (RuntimeError("0x7f00 /home/me"), Internal),
        (DeviceError("the device is gone"), DeviceError),
    ],
)
def test_a_backend_that_fails_is_reported_in_the_engine_s_terms(
    raised: Exception, expected: type[WorkerError], model_path: Path
):
    class Failing(ReferenceBackend):
        broken = True

        def compile(self, forward: Forward, inputs: Any, limits: Any) -> CompiledForward:
            compiled = super().compile(forward, inputs, limits)

            def step(counts: Counts) -> torch.Tensor:
                if self.broken:
                    raise raised
                return compiled(counts)

            return step

    backend = Failing()
    runner = load_runner(model_path, backend, ENGINE)
    made = Step((Row.of(sequence(0, PROMPT), 20),))
    with pytest.raises(expected) as info:
        runner.launch(made).wait()
    assert "/home" not in str(info.value)
    backend.broken = False
    assert isinstance(runner.launch(made).wait()[0], SampledToken)


def knowing(draw: Draw, token_ids: list[int]) -> Draw:
    """The draw behind those tokens, of which its entries have none."""
    entries = copy.deepcopy(draw.entries)
    if entries is not None and draw.params.penalises:
        for token_id in token_ids:
            entries.count(token_id)
    position = draw.position + len(token_ids) - draw.num_unknown
    return replace(draw, entries=entries, position=position, count=1, num_unknown=0)


class Drawing:
    """A forward pass on a device that draws: computed at `launch`, told when waited for.

    It keeps what it drew, for steps that are launched before anybody was told.
    """

    def __init__(self, compiled: CompiledForward, inputs: BatchInputs, vocab_size: int) -> None:
        self._compiled, self._inputs, self._sampler = compiled, inputs, Sampler(vocab_size)
        self._drawn = torch.zeros(0, dtype=torch.int32)
        self._tokens: list[list[int]] = []  # of the step before, by draw
        self.fails_at = ""
        self.waited = 0
        self.max_draws = 4

    def __call__(self, counts: Counts) -> torch.Tensor:
        return self._compiled(counts)

    def launch(self, counts: Counts, draws: SequenceABC[Draw | None]) -> Callable[[], list[RowResult]]:
        if self.fails_at == "launch":
            raise RuntimeError("0x7f00 /home/me")
        ids = self._inputs.token_ids[: counts.num_tokens]
        ids[ids < 0] = self._drawn[-1 - ids[ids < 0]]
        draws = list(draws)
        found: list[list[RowResult]] = [[] for _ in draws]
        before = self._tokens
        self._tokens = [[] for draw in draws if draw is not None]
        for number in range(counts.num_rounds):
            if number:
                self._go_on([draw for draw in draws if draw is not None], number)
            logits = iter(self._compiled(counts).numpy())
            tokens = iter(self._tokens)
            for draw, results in zip(draws, found, strict=True):
                if draw is None:
                    results.append(None)
                    continue
                drawn = next(tokens)
                unknown = before[draw.previous][-draw.num_unknown :] if draw.num_unknown else []
                assert len(unknown) == draw.num_unknown
                result = self._sampler.sample(next(logits), knowing(draw, unknown + drawn))
                drawn.append(getattr(result, "token_id", 0))
                if number < draw.count:
                    results.append(result)
            self._drawn = torch.tensor([drawn[-1] for drawn in self._tokens], dtype=torch.int32)

        def results() -> list[RowResult]:
            self.waited += 1
            if self.fails_at == "wait":
                raise DeviceError("the device is gone")
            return [result for results in found for result in results]

        return results

    def _go_on(self, draws: list[Draw], number: int) -> None:
        """As `kernels.cuda.advance`."""
        inputs, size = self._inputs, ENGINE.block_size
        for row, draw in enumerate(draws):
            position = draw.position + number - 1
            inputs.token_ids[row] = self._drawn[row]
            inputs.slots[:, row] = 0
            if number < draw.count:
                inputs.positions[row] = position
                inputs.context_lens[row] = position + 1
                blocks = inputs.block_tables[:, row, position // size]
                inputs.slots[:, row] = blocks * size + position % size


@pytest.fixture
def drawing(model_path: Path) -> tuple[ModelRunner, Drawing]:
    made: list[Drawing] = []

    class DrawingBackend(ReferenceBackend):
        def compile(self, forward: Forward, inputs: Any, limits: Any) -> CompiledForward:
            made.append(Drawing(super().compile(forward, inputs, limits), inputs, 320))
            return made[-1]

    return load_runner(model_path, DrawingBackend(), ENGINE), made[0]


def test_a_device_that_draws_is_left_to_it(drawing: tuple[ModelRunner, Drawing], runner: ModelRunner):
    drawer, device = drawing
    step = Step((Row.of(sequence(0, PROMPT), 20), Row.of(sequence(1, PROMPT[::-1]), 7)))
    pending, behind = drawer.launch(step), drawer.launch(step)
    assert device.waited == 0
    with pytest.raises(Internal, match="before the one"):
        behind.wait()
    with pytest.raises(Internal, match="while 2 were"):
        drawer.launch(step)
    assert pending.wait() == runner.launch(step).wait()
    assert device.waited == 1
    with pytest.raises(Internal, match="while 1 were"):
        drawer.logits(step)
    with pytest.raises(Internal, match="twice"):
        pending.wait()
    assert behind.wait() == runner.launch(step).wait()
    assert np.array_equal(score(drawer, PROMPT), score(runner, PROMPT))


@pytest.mark.parametrize("max_draws", [1, 4])
def test_two_steps_under_way_give_the_tokens_of_one(
    max_draws: int, drawing: tuple[ModelRunner, Drawing], runner: ModelRunner
):
    """Whatever depends on the tokens before, and sequences that end before anybody knew."""
    drawing[0].max_draws = max_draws
    random = np.random.default_rng(5)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5, "logprobs": 3},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.5, "presence_penalty": 0.7, "frequency_penalty": 1.5, "repetition_penalty": 1.5},
        {"temperature": 1.5, "logit_bias": ((7, 2.0), (9, -1.0)), "frequency_penalty": 3.0},
        {"logit_bias": ((320, 1.0),)},  # fails
    ]
    submits = [
        replace(
            submit(
                number, random.integers(0, 320, int(random.integers(1, 14))).tolist(), 40, seed=number, **kind
            ),
            stop_token_ids=frozenset(range(0, 320, 29)),
            min_tokens=number % 4,
        )
        for number, kind in enumerate(kinds * 6)
    ]
    found = []
    for one in (runner, drawing[0]):
        drive = Drive(one, ENGINE, [CacheGroup(BlockPool(10))])
        found.append({number: result.tokens for number, result in drive.run(submits, failing=True).items()})
        assert drive.num_preempted > 0
        assert any(stats.ahead for stats in drive.steps) == (one is not runner)
        assert max(stats.num_rounds for stats in drive.steps) == (1 if one is runner else max_draws)
    assert found[0] == found[1]
    assert len({len(tokens) for tokens in found[0].values()}) > 3


def test_more_draws_than_the_device_takes_are_refused(runner: ModelRunner):
    made = sequence(0, PROMPT)
    made.num_computed_tokens = len(PROMPT) - 1
    with pytest.raises(Internal, match="draws 2 tokens; at most 1"):
        runner.launch(Step((Row(made, 1, len(PROMPT) - 1, num_draws=2),)))
    runner.launch(Step((Row(made, 1, len(PROMPT) - 1, num_draws=1),))).wait()


@pytest.mark.parametrize(("fails_at", "expected"), [("launch", Internal), ("wait", DeviceError)])
def test_a_step_that_failed_on_the_device_is_over(
    fails_at: str, expected: type[WorkerError], drawing: tuple[ModelRunner, Drawing]
):
    drawer, device = drawing
    step = Step((Row.of(sequence(0, PROMPT), 20),))
    device.fails_at = fails_at
    with pytest.raises(expected) as info:
        drawer.launch(step).wait()
    assert "/home" not in str(info.value)
    device.fails_at = ""
    assert isinstance(drawer.launch(step).wait()[0], SampledToken)


def test_scoring_in_any_chunks(runner: ModelRunner):
    text = (PROMPT * 3)[:50]
    whole = score(runner, text)
    assert whole.shape == (50, 320)
    assert [part.shape for part in score_chunks(runner, text)] == [(16, 320)] * 3 + [(2, 320)]
    assert np.array_equal(whole, score(runner, text, 3))
    assert score(runner, []).shape == (0, 320)
    with pytest.raises(ContextLengthExceeded, match="513 tokens; at most 512 fit"):
        score(runner, [1] * 513)
