"""
The real small model on the real CPU backends: equal to the recorded reference, and the same bits whatever
happens.

`data/golden/smollm2-q4_1.json` holds what transformers computes in float32 on the dequantised weights
(`benchmarks/reference.py` makes it).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving import Drive, Result, submit
from worker_orcd.config import DeviceConfig, EngineConfig, WorkerConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.messages import Submit
from worker_orcd.runner.scoring import score
from worker_orcd.worker import LoadedModel, load
from worker_orcd.worker.loading import cache_groups

pytestmark = [pytest.mark.model, pytest.mark.slow]

FLOAT_GAP = 0.05  # two tokens closer than this may change places in another float32 order of summation
TOP_LOGIT_TOLERANCE = 0.01
ENGINE = EngineConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=1024)


def load_demo(path: Path, activations: Any) -> LoadedModel:
    device = DeviceConfig(device="cpu", cpu_activations=activations, cpu_threads=2)
    return load(WorkerConfig(model=str(path), device=device, engine=ENGINE), warn=warnings.warn)


@pytest.fixture(scope="module")
def golden(data_directory: Path) -> list[dict[str, Any]]:
    return json.loads((data_directory / "golden" / "smollm2-q4_1.json").read_text())["results"]


@pytest.fixture(scope="module")
def int8_model(demo_model: Path) -> Iterator[LoadedModel]:
    loaded = load_demo(demo_model, "int8")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def float_model(demo_model: Path) -> Iterator[LoadedModel]:
    loaded = load_demo(demo_model, "float32")
    yield loaded
    loaded.close()


def first_close_call(gaps: list[float]) -> int:
    """How many of the reference's tokens are beyond doubt."""
    return next((i for i, gap in enumerate(gaps) if gap < FLOAT_GAP), len(gaps))


class TestAgainstTransformers:
    def test_tokenizer_and_template_are_exact(
        self, float_model: LoadedModel, golden: list[dict[str, Any]]
    ) -> None:
        template = float_model.chat_template
        assert template is not None
        for entry in golden:
            messages = [{"role": "user", "content": entry["prompt"]}]
            assert template.render(messages) == entry["text"]
            assert template.encode(float_model.tokenizer, messages) == entry["prompt_ids"]

    def test_greedy_float32_follows_the_reference(
        self, float_model: LoadedModel, golden: list[dict[str, Any]]
    ) -> None:
        drive = Drive(float_model.runner, float_model.engine_config, cache_groups(float_model.plan))
        results = drive.run([submit(i, entry["prompt_ids"], 64) for i, entry in enumerate(golden)])
        checked = 0
        for i, entry in enumerate(golden):
            sure = first_close_call(entry["gaps"])
            assert results[i].ids[:sure] == entry["out_ids"][:sure], entry["prompt"]
            checked += sure
        assert checked >= 100, "the recorded gaps leave hardly anything to compare"

    def test_first_logits_float32_agree(self, float_model: LoadedModel, golden: list[dict[str, Any]]) -> None:
        for entry in golden:
            logits = score(float_model.runner, entry["prompt_ids"])[-1]  # (vocab_size,)
            ids = [token_id for token_id, _value in entry["top20"]]
            expected = np.array([value for _id, value in entry["top20"]])
            assert np.abs(logits[ids] - expected).max() < TOP_LOGIT_TOLERANCE, entry["prompt"]
            assert sorted(np.argsort(-logits)[:5].tolist()) == sorted(ids[:5])

    def test_int8_stays_near_the_reference(
        self, int8_model: LoadedModel, float_model: LoadedModel, golden: list[dict[str, Any]]
    ) -> None:
        """Mean KL over the continuations; `benchmarks/kl_vs_llamacpp.py` has llama.cpp beside it."""
        total, count = 0.0, 0
        for entry in golden[:3]:
            ids = entry["prompt_ids"] + entry["out_ids"][:-1]
            first = len(entry["prompt_ids"]) - 1
            reference = log_softmax(score(float_model.runner, ids)[first:])
            ours = log_softmax(score(int8_model.runner, ids)[first:])
            total += float((np.exp(reference) * (reference - ours)).sum())
            count += len(reference)
        assert 0 < total / count < 0.02


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# -- the same bits whatever happens --------------------------------------------------------------------

NUM_TOKENS = 12
SYSTEM = "You are a helpful assistant. Answer briefly, in plain words, and never repeat the question. " * 2
QUESTIONS = [
    "Why is the sky blue?",
    "Name a river in Africa.",
    "2 + 2?",
    "Write one line about rain.",
    "What is a prime number? Explain it to a child of six, with an example and a counterexample.",
    "こんにちは",
    "def add(a, b):",
    "List three colours.",
]


def jobs(loaded: LoadedModel) -> list[Submit]:
    """Sixteen different requests: long, short, greedy, sampled, penalised, all with logprobs."""
    made: list[Submit] = []
    for i in range(16):
        text = (SYSTEM if i % 2 else "") + QUESTIONS[i % len(QUESTIONS)] + " " * (i // 8)
        ids = loaded.tokenizer.encode(text)
        options: dict[str, Any] = {"logprobs": 3}
        if i % 3 == 1:
            options |= {"temperature": 0.8, "seed": i, "top_p": 0.95}
        if i % 3 == 2:
            options |= {
                "temperature": 1.2,
                "seed": 7 + i,
                "top_k": 40,
                "min_p": 0.01,
                "repetition_penalty": 1.1,
            }
        made.append(submit(i, ids, NUM_TOKENS + i % 4, **options))
    return made


def assert_same(results: dict[int, Result], alone: dict[int, Result]) -> None:
    """Token ids and every logprob, compared as floats are: by their bits."""
    for id, result in results.items():
        assert result.tokens == alone[id].tokens, f"request {id} differs"


@pytest.fixture(scope="module", params=["int8", "float32"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return request.getfixturevalue({"int8": "int8_model", "float32": "float_model"}[request.param])


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> dict[int, Result]:
    """Each request in an engine of its own, with nothing cached."""
    config = replace(model.engine_config, enable_prefix_caching=False)
    results: dict[int, Result] = {}
    for job in jobs(model):
        results |= Drive(model.runner, config, cache_groups(model.plan)).run([job])
    return results


class TestSameBits:
    def test_in_a_batch_of_16(self, model: LoadedModel, alone: dict[int, Result]) -> None:
        drive = Drive(model.runner, model.engine_config, cache_groups(model.plan))
        assert_same(drive.run(jobs(model)), alone)
        assert max(stats.num_rows for stats in drive.steps) == 16

    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_in_chunks(self, model: LoadedModel, alone: dict[int, Result], chunk: int) -> None:
        config = replace(model.engine_config, max_num_batched_tokens=chunk, enable_prefix_caching=False)
        some = jobs(model)[: 4 if chunk == 1 else 16]
        drive = Drive(model.runner, config, cache_groups(model.plan))
        assert_same(drive.run(some), alone)
        assert max(stats.num_tokens for stats in drive.steps) <= chunk

    def test_with_a_prefix_hit(self, model: LoadedModel, alone: dict[int, Result]) -> None:
        drive = Drive(model.runner, model.engine_config, cache_groups(model.plan))
        missed = drive.run(jobs(model)[:1] + jobs(model)[1:2])
        hit = drive.run(jobs(model))
        assert_same(missed, alone)
        assert_same(hit, alone)
        assert sum(result.num_cached_tokens > 0 for result in hit.values()) >= 8

    def test_after_a_forced_preemption(self, model: LoadedModel, alone: dict[int, Result]) -> None:
        longest = max(len(job.prompt_token_ids) + job.max_tokens for job in jobs(model))
        size = model.engine_config.block_size
        pool = BlockPool(1 + 3 * (longest // size + 1))
        drive = Drive(model.runner, model.engine_config, [CacheGroup(pool)])
        assert_same(drive.run(jobs(model)), alone)
        assert drive.num_preempted > 0
