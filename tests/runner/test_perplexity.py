"""Perplexity: exact log-probabilities, the windows that llama.cpp uses, and the twin's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_models import MODELS, TinyFile, load_runner, twin_logits

from worker_orcd.errors import ContextLengthExceeded
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.runner.perplexity import (
    log_softmax,
    perplexity,
    score_text,
    token_logprobs,
    window_logits,
    windows,
)
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.scoring import score, score_chunks

TEXT = np.random.default_rng(5).integers(0, 320, 150).tolist()


@pytest.fixture(scope="module")
def file() -> TinyFile:
    return TinyFile(MODELS["qwen2"])


@pytest.fixture(scope="module")
def runner(file: TinyFile, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = file.write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return load_runner(path, ReferenceBackend("float32", 1))


def test_log_softmax_is_exact_for_any_logits() -> None:
    logits = np.random.default_rng(1).standard_normal((7, 50)).astype(np.float32) * 10
    logits[1] += 1e4
    logits[2] *= 1e6
    found = log_softmax(logits)
    assert found.dtype == np.float64
    for row, wanted in zip(found, logits.astype(np.float64), strict=True):
        largest = wanted.max()
        norm = largest + math.log(math.fsum(math.exp(value - largest) for value in wanted))
        assert row == pytest.approx(wanted - norm, rel=1e-12, abs=1e-12)
    assert np.isfinite(found).all()


def test_token_logprobs_pick_the_targets() -> None:
    logits = np.random.default_rng(1).standard_normal((41, 30)).astype(np.float32)
    targets = np.random.default_rng(2).integers(0, 30, 41).tolist()
    wanted = log_softmax(logits)[np.arange(41), targets]
    assert np.array_equal(token_logprobs(logits, targets), wanted)


def test_windows_are_those_of_llamacpp() -> None:
    """Of each window of n tokens those from n / 2 + 1 on are scored: n - n / 2 - 1."""
    ids = list(range(100, 135))
    assert list(windows(ids, 16)) == [(ids[:16], 8), (ids[16:32], 8)]
    assert [window[0] for window, _ in windows(ids, 16, bos_id=1)] == [1, 1]
    assert [window[1:] for window, _ in windows(ids, 16, bos_id=1)] == [ids[1:16], ids[17:32]]
    assert list(windows(ids[:15], 16)) == []
    assert list(windows(ids[:5], 5)) == [(ids[:5], 2)]
    with pytest.raises(ValueError, match="a window of 3 tokens has none to score; needs 4"):
        list(windows(ids, 3))


@pytest.mark.parametrize("bos_id", [None, 7])
def test_scores_are_those_of_whole_windows(runner: ModelRunner, bos_id: int | None) -> None:
    found = list(score_text(runner, TEXT, 64, bos_id))
    assert [part.shape for part in found] == [(31,), (31,)]
    for number, part in enumerate(found):
        window = TEXT[64 * number : 64 * number + 64]
        if bos_id is not None:
            window[0] = bos_id
        logits = score(runner, window)[32:63]
        assert np.array_equal(part, token_logprobs(logits, window[33:]))


def test_the_twin_scores_alike(runner: ModelRunner, file: TinyFile) -> None:
    """transformers in float32 with equal weights."""
    [found] = score_text(runner, TEXT[:96], 96)
    wanted = token_logprobs(twin_logits(file, TEXT[:96])[48:95], TEXT[49:96])
    assert found == pytest.approx(wanted, abs=2e-3)
    assert perplexity(found).value == pytest.approx(perplexity(wanted).value, rel=1e-3)


def test_first_skips_logits_and_changes_none(runner: ModelRunner) -> None:
    whole = score(runner, TEXT[:70])
    for first in (0, 1, 33, 69, 70, 200):
        parts = list(score_chunks(runner, TEXT[:70], 16, first=first))
        assert np.array_equal(np.concatenate(parts), whole[min(first, 69) :])
        assert max(len(part) for part in parts) <= 16
    assert list(score_chunks(runner, [], first=3)) == []


def test_window_logits_are_what_is_scored(runner: ModelRunner) -> None:
    [(window, first)] = windows(TEXT[:40], 40)
    logits = np.concatenate(list(window_logits(runner, window, first)))
    assert np.array_equal(logits, score(runner, window)[20:39])


def test_too_long_a_window(runner: ModelRunner) -> None:
    with pytest.raises(ContextLengthExceeded):
        next(score_text(runner, [1] * 600, 600))


def test_statistics() -> None:
    logprobs = np.log([0.5, 0.25, 0.125, 0.5])
    found = perplexity(logprobs)
    assert found.num_tokens == 4
    assert found.mean_nll == pytest.approx((1 + 2 + 3 + 1) / 4 * math.log(2))
    assert found.value == pytest.approx(2 ** (7 / 4))
    deviation = math.sqrt(sum((n - 7 / 4) ** 2 for n in (1, 2, 3, 1)) / 3) * math.log(2)
    assert found.mean_nll_error == pytest.approx(deviation / 2)
    assert found.error == pytest.approx(found.value * deviation / 2)
    assert perplexity(np.full(10, -1e6)).value == math.inf
    assert math.isinf(perplexity(np.array([-1.0])).mean_nll_error)
    with pytest.raises(ValueError, match="no token was scored"):
        perplexity(np.array([]))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = perplexity(token_logprobs(np.zeros((100, 320), np.float32), [5] * 100))
    assert found.value == pytest.approx(320)
    assert found.mean_nll_error == pytest.approx(0, abs=1e-12)
