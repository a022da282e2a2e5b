"""`bench`: its figures follow from one another, and its files can be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worker_orcd.cli import measure
from worker_orcd.engine.messages import Output, StepStats
from worker_orcd.sequence import FinishReason, SampledToken
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION

WORDS = ("--kv-cache-size-mb", "64", "--max-num-seqs", "4", "--cpu-threads", "1", "--repeats", "1")
SIZES = ("--batch-sizes", "1,3", "--prompt-tokens", "24", "--output-tokens", "8")


@pytest.mark.slow
def test_the_report_is_stamped_and_consistent(invoke: Any, demo_model: Path, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "report.json", "--plot": tmp_path / "plot.png"}
    outcome = invoke(
        "bench", "--model", str(demo_model), *WORDS, *SIZES, *(str(x) for pair in files.items() for x in pair)
    )
    assert outcome.status == 0, outcome.err
    assert "Q4_1" in outcome.out
    report = json.loads(files["--json"].read_text())
    assert report["versions"]["worker-orcd"] == VERSION
    assert report["versions"]["contract"] == str(REPRODUCIBILITY_CONTRACT)
    assert report["model"]["sha256"].startswith("b179c952")
    assert len(report["load_average"]["before"]) == 3
    assert report["machine"]["cores"] >= 1
    assert report["load_seconds"]["total"] == pytest.approx(
        sum(seconds for name, seconds in report["load_seconds"].items() if name != "total")
    )
    for result, size in zip(report["results"], (1, 3), strict=True):
        assert result["batch_size"] == size
        assert result["output_rate"] * result["seconds"] == pytest.approx(8 * size)
        assert result["total_rate"] * result["seconds"] == pytest.approx(32 * size)
        assert 0 < result["first_token_ms"] <= 1000 * result["seconds"]
        assert result["first_token_ms"] <= result["first_token_ms_p95"]
        assert 7 <= result["decode_steps"] <= 8 * size  # the most if each began after the others
        # The engine's own clock and ours, which also sees what lies between two steps.
        assert result["decode_step_ms"] <= 1.2 * result["between_tokens_ms"] + 1
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_written_are_named(invoke: Any, demo_model: Path, tmp_path: Path) -> None:
    words = ("bench", "--model", str(demo_model), *WORDS, "--batch-sizes", "1", "--prompt-tokens", "1")
    outcome = invoke(*words, "--output-tokens", "2", "--json", str(tmp_path / "no" / "file"))
    assert outcome.status == 2
    assert "--json" in outcome.err.splitlines()[-1]
    assert "No such file" in outcome.err


def test_lengths_that_do_not_fit_are_refused_before_measuring(invoke: Any, demo_model: Path) -> None:
    words = ("bench", "--model", str(demo_model), *WORDS, "--batch-sizes", "1", "--max-model-len", "64")
    outcome = invoke(*words, "--prompt-tokens", "60", "--output-tokens", "5")
    assert outcome.status == 2
    assert "found 60 and 5; expected at most 64 together" in outcome.err
    assert "measuring" not in outcome.err


def test_without_matplotlib_plot_says_what_to_install(
    invoke: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("worker_orcd.cli.bench.find_spec", lambda _name: None)
    outcome = invoke("bench", "--model", "demo", "--plot", str(tmp_path / "x.png"))
    assert outcome.status == 2
    assert "worker-orcd[plot]" in outcome.err


# -- arithmetic ------------------------------------------------------------------------------------------


def step(seconds: float, prompt: int, sampled: int) -> StepStats:
    return StepStats(
        seconds=seconds,
        num_rows=sampled,
        num_tokens=prompt + sampled,
        num_prompt_tokens=prompt,
        num_sampled=sampled,
        num_preempted=0,
        prefix_query_tokens=0,
        prefix_hit_tokens=0,
        num_running=sampled,
        num_waiting=0,
        kv_groups=(),
    )


class FakeTokenizer:
    vocab_size = 50
    control_ids = frozenset(range(40))


class FakeEngine:
    """Two requests whose tokens come at known times: a prompt step of 0.5 s, then three steps of 0.1 s."""

    class loaded:
        tokenizer = FakeTokenizer()

    def __init__(self, recorder: measure.StepRecorder) -> None:
        self.recorder = recorder
        self.prompts: list[tuple[int, ...]] = []
        self.started = math.nan

    def submit(self, prompt: tuple[int, ...], _sampling: object, *, max_tokens: int) -> int:
        self.prompts.append(prompt)
        if len(self.prompts) % 2 == 1:
            self.started = measure.time.perf_counter()
            self.recorder.on_step(step(0.5, prompt=8, sampled=2))
            for _ in range(max_tokens - 1):
                self.recorder.on_step(step(0.1, prompt=0, sampled=2))
        return len(self.prompts)

    def outputs(self, number: int) -> Any:
        for i in range(4):
            reason = FinishReason.LENGTH if i == 3 else None
            yield self.started + 0.5 + 0.1 * i, Output(number, (SampledToken(1),), finish_reason=reason)


def test_rates_and_latencies_are_what_the_times_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: 1000.0))
    recorder = measure.StepRecorder()
    engine: Any = FakeEngine(recorder)
    result = measure.measure_batch(engine, recorder, 2, measure.Workload(4, 4, repeats=1))
    assert result.seconds == pytest.approx(0.8)
    assert result.output_rate == pytest.approx(8 / 0.8)
    assert result.total_rate == pytest.approx(16 / 0.8)
    assert result.first_token_ms == pytest.approx(500)
    assert result.prompt_rate == pytest.approx(8 / 0.5)
    assert result.between_tokens_ms == pytest.approx(100)
    assert result.decode_rate == pytest.approx(2 / 0.1)
    assert (result.decode_step_ms, result.decode_steps) == (pytest.approx(100), 3)


def test_prompts_are_ordinary_tokens_and_never_the_same() -> None:
    recorder = measure.StepRecorder()
    engine: Any = FakeEngine(recorder)
    measure.measure_batch(engine, recorder, 2, measure.Workload(30, 4, repeats=3))
    assert len(engine.prompts) == len(set(engine.prompts)) == 6
    assert all(len(prompt) == 30 and set(prompt) <= set(range(40, 50)) for prompt in engine.prompts)
