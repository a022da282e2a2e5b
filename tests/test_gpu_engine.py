"""The script that checks and measures the engine on a GPU, on the CPU with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine_client import GREEDY, Model, OneAtATime, QueueWatch, RunningEngine, load, random_prompt
from gpu_engine import ENGINE, PARTS, ratios
from gpu_engine_same import (
    Compared,
    answers_alone,
    in_chunks,
    make_requests,
    one_at_a_time,
    preempted,
    small_pools,
)
from gpu_peers import PEERS, peers_of
from worker_orcd.sequence import FinishReason, SampledToken
from worker_orcd.synth import shape_named, write_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What a machine with a GPU may lack: the script needs the engine and what is below it.
ABSENT = ("structlog", "tokenizers", "jinja2", "fastapi", "starlette", "uvicorn", "typer", "rich", "httpx")
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(BENCHMARKS)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FEW = ("--sizes", "1", "3", "--output", "6", "--subjects", "6", "--watched", "12", "--requests", "40")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with windows and experts."""
    shape = shape_named("gpt-oss", "tiny")
    assert shape is not None
    file = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_model(file, shape, "tiny", "MXFP4")
    return file


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    loaded = load(path, "cpu", ENGINE, 1024)
    yield loaded
    loaded.backend.close()


def token(number: int, logprob: float) -> SampledToken:
    return SampledToken(number, logprob, ((number, logprob),))


# -- the script --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_parts_run_without_the_libraries_of_a_worker(path: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    line = ["gpu_engine.py", str(path), "--device", "cpu", *FEW, "--out", str(out), "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(BENCHMARKS / line[0]), *line[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    results = json.loads(out.read_text())
    assert results["stamp"]["commit"] == "abc"
    assert results["stamp"]["device"].startswith("CPU")
    same = {key: value for key, value in results.items() if key.startswith("same ")}
    assert len(same) == 3 + 1 + 2 + 2 + 2
    assert all(value["rows"] >= 6 * 12 and value["bits"] == 0 and value["real"] for value in same.values())
    assert results["crowd tiny.gguf 3"]["output_rate"] > 0
    assert (results["crowd tiny.gguf 3"]["ahead"], results["crowd tiny.gguf 3"]["queued"]) == (0, 0)
    assert results["first token tiny.gguf"]["tokens"] == 512
    assert len([key for key in results if key.startswith("memory ")]) == 4


def test_a_file_that_is_none_is_a_failure(tmp_path: Path):
    file = tmp_path / "none.gguf"
    file.write_bytes(b"GGUF")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_engine.py", file, "--device", "cpu", "--out", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "none.gguf: an exception   <-- FAILED" in done.stdout
    assert set(PARTS) == {"same", "memory", "crowd"}


# -- comparing ---------------------------------------------------------------------------------------------


def test_equal_rows_are_counted():
    compared = Compared()
    compared.add([token(1, -0.5), token(2, -1.0)], [token(1, -0.5), token(2, -1.0)])
    assert (compared.rows, compared.differing, compared.bits) == (2, 0, 0)


def test_bits_that_differ_are_counted():
    compared = Compared()
    compared.add([token(1, -0.5)], [token(1, -0.5000000000000001)])
    assert (compared.rows, compared.differing, compared.bits) == (1, 1, 2)  # twice: it is the likeliest too
    compared.add([SampledToken(1, -0.5)], [SampledToken(2, -0.5)])
    assert (compared.rows, compared.differing, compared.bits) == (2, 2, 4)


def test_a_row_that_is_missing_differs():
    compared = Compared()
    compared.add([token(1, -0.5), token(2, -0.5)], [token(1, -0.5)])
    assert (compared.rows, compared.differing, compared.bits) == (2, 1, 8 * 32)


def test_a_change_of_one_row_is_found(model: Model):
    requests = make_requests(model, 4, 30, 5, "change")
    alone = answers_alone(model, requests)
    found = [compared for compared, _what, _real in in_chunks(model, requests, alone)]
    assert [(one.rows, one.differing) for one in found] == [(20, 0), (20, 0)]
    last = alone[2].tokens[-1]
    alone[2].tokens[-1] = replace(last, token_id=last.token_id + 1)
    found = [compared for compared, _what, _real in in_chunks(model, requests, alone)]
    assert [(one.rows, one.differing) for one in found] == [(20, 1), (20, 1)]


def test_a_check_that_put_nothing_to_the_test_says_so(model: Model):
    requests = make_requests(model, 1, 1, 1, "short")  # over before anybody can preempt it
    alone = answers_alone(model, requests)
    assert [real for _compared, _what, real in preempted(model, requests, alone)] == [False, False]
    assert not any(real for _compared, _what, real in in_chunks(model, requests, alone))


# -- the engine --------------------------------------------------------------------------------------------


def test_answers_are_whole(model: Model):
    with RunningEngine(model) as engine:
        number = engine.send(random_prompt(model, 20, "whole"), GREEDY, max_tokens=7)
        answer = engine.answer(number)
        assert not engine.busy([number])
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(answer.tokens) == len(answer.times) == 7
    assert answer.sent < answer.times[0] <= answer.times[-1]
    assert sum(step.num_sampled for step in engine.steps) == 7


def test_what_is_running_is_left_over(model: Model):
    with RunningEngine(model) as engine:
        number = engine.send(random_prompt(model, 20, "left"), GREEDY, max_tokens=900)
        while not engine.steps:
            pass
        assert engine.leftovers()[0] == "1 sequences"
        engine.cancel(number)
        engine.answer(number)
    assert engine.leftovers() == []


def test_a_request_that_cannot_be_served_raises(model: Model):
    with RunningEngine(model, blocks=small_pools(model, 32)) as engine:
        number = engine.send(random_prompt(model, 200, "long"), GREEDY, max_tokens=9)
        with pytest.raises(RuntimeError, match="context length of 96"):
            engine.answer(number)


def test_an_engine_may_be_held_to_one_step(model: Model):
    watch = QueueWatch(OneAtATime(model.runner))
    with RunningEngine(model, runner=watch) as engine:
        engine.answer(engine.send(random_prompt(model, 9, "held"), GREEDY, max_tokens=5))
    assert (watch.max_steps, watch.num_steps, watch.num_queued) == (1, 5, 0)
    assert not any(step.ahead for step in engine.steps)
    assert list(one_at_a_time(model, [], [])) == []  # a CPU takes one at a time


def test_pools_are_no_larger_than_planned(model: Model):
    with RunningEngine(model, blocks=[1 << 20] * len(model.plan.kv_groups)) as engine:
        number = engine.send([5], GREEDY, max_tokens=1)
        engine.answer(number)
    totals = [group.total for group in engine.steps[-1].kv_groups]
    assert totals == [group.num_blocks - 1 for group in model.plan.kv_groups]


# -- others' figures ---------------------------------------------------------------------------------------


def test_peers_are_known_by_the_shape(model: Model):
    assert peers_of(model.config) is None
    for architecture, name in (("qwen2", "qwen2.5-0.5b"), ("phi3", "phi-3-mini"), ("gpt-oss", "gpt-oss-20b")):
        shape = shape_named(architecture, name)
        assert shape is not None
        assert (architecture, shape.num_layers, shape.dim) in PEERS


def test_ratios_are_to_the_same_number_of_requests():
    found = {"decode_rate": 13000.0, "output_rate": 12000.0}
    peers = PEERS["qwen2", 24, 896]
    assert ratios(found, 64, peers) == {
        "llama.cpp decode": 13000 / 9980,
        "vLLM decode": 0.5,
        "vLLM in all": 0.5,
    }
    assert ratios(found, 16, peers) == {}
    assert ratios(found, 64, None) == {}
