"""`perplexity`: what it prints and writes, for a text of one's own and the one that comes along."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.cli import perplexity as command
from worker_orcd.runner import perplexity as library

ALICE = "4cbce86540bcef439f901c89de486d295aa3848e8c4cbc911561054479e73960"


@pytest.fixture
def model(invoke: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    assert invoke("synth", "qwen2", str(path)).status == 0
    return path


def test_the_text_that_comes_along_is_always_the_same() -> None:
    from worker_orcd.cli.perplexity import default_text

    text = default_text()
    assert len(text) == 148_481
    assert hashlib.sha256(text.encode()).hexdigest() == ALICE
    assert "Alice was beginning to get very tired" in text


def test_a_made_up_model_knows_nothing(invoke: Any, model: Path, tmp_path: Path) -> None:
    """Random logits of standard deviation two: a perplexity above the vocabulary's 640."""
    result = tmp_path / "result.json"
    shown = invoke(*("perplexity", str(model), "--tokens", "1000", "--context", "128", "--json", str(result)))
    assert shown.status == 0
    assert "alice.txt: 7 windows of 128 tokens" in shown.out
    assert "scored: the second half of each, 441 tokens" in shown.out
    found = json.loads(result.read_text())
    assert f"{found['perplexity']:.4f}" in shown.out
    assert 640 < found["perplexity"] < 20_000
    assert found["perplexity"] == pytest.approx(math.exp(found["mean_nll"]))
    assert found["text"] == {"name": "alice.txt", "sha256": ALICE}
    assert (found["windows"], found["tokens"], found["scored"]) == (7, 896, 441)
    assert found["model"]["quant_kind"] == "Q4_K_M"


def test_a_text_of_ones_own_in_any_arithmetic(invoke: Any, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("Ein Text, 漢字 und dergleichen.\r\n" * 40, encoding="utf-8")
    found: list[float] = []
    for activations in ("int8", "float32", "float32"):
        result = tmp_path / "result.json"
        options = ("--text", str(text), "--context", "64", "--cpu-activations", activations)
        assert invoke("perplexity", str(model), *options, "--json", str(result)).status == 0
        found.append(json.loads(result.read_text())["mean_nll"])
    assert found[1] == found[2]
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_what_is_refused(invoke: Any, model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    refused = invoke("perplexity", str(model), "--text", str(short))
    assert refused.status == 2
    assert "--context: found 512; expected at most" in refused.err
    assert "'short.txt'" in refused.err
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfd")
    refused = invoke("perplexity", str(model), "--text", str(binary))
    assert "--text: 'binary.txt' is not UTF-8 (byte 0)" in refused.err
    refused = invoke("perplexity", str(model), "--text", str(tmp_path / "nothing.txt"))
    assert "--text: 'nothing.txt' cannot be read: No such file" in refused.err
    refused = invoke("perplexity", str(model), "--context", "2000")
    assert refused.status == 2
    assert "1024" in refused.err


def test_the_shortest_window_is_the_same_everywhere() -> None:
    assert command.MIN_CONTEXT == library.MIN_CONTEXT


@pytest.mark.slow
def test_the_demo_model_predicts_english(invoke: Any, demo_model: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    shown = invoke("perplexity", str(demo_model), "--tokens", "1024", "--json", str(result))
    assert shown.status == 0
    assert 10 < json.loads(result.read_text())["perplexity"] < 40
