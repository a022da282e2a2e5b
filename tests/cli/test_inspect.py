"""`inspect`: true figures, valid JSON, and nothing from the file that a terminal would obey."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worker_orcd import hub
from worker_orcd.gguf.writer import GGUFWriter


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A well-formed file of an architecture that nobody knows, with everything awkward in its metadata."""
    path = tmp_path / "strange.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "perceptron")
        writer.add("evil", "\x1b]0;owned\x07[bold]markup[/bold]\nsecond line")
        writer.add("key\x1b[31m", "red")
        writer.add("nan", math.nan)
        writer.add("inf", np.array([1.0, math.inf], dtype=np.float32))
        writer.add("long", np.arange(1000, dtype=np.int32))
        writer.add("short", np.array([True, False]))
        writer.add("words", ["a", "b"])
        writer.add("text", "x" * 5000)
        writer.add_tensor("w[red]", (4, 32), 0, np.ones((4, 32), np.float32).view(np.uint8))
    return path


def test_a_file_that_cannot_be_served_can_be_looked_at(invoke: Any, strange: Path) -> None:
    outcome = invoke("inspect", str(strange))
    assert outcome.status == 0
    assert "no memory plan: general.architecture is 'perceptron'; supported: " in outcome.out
    assert "4 x 32" in outcome.out
    assert "(1,000 items)" in outcome.out
    assert "(5,000 characters)" in outcome.out


def test_nothing_from_the_file_reaches_the_terminal_raw(invoke: Any, strange: Path) -> None:
    outcome = invoke("inspect", str(strange))
    assert "\x1b" not in outcome.out
    assert "\x07" not in outcome.out
    assert r"\x1b]0;owned\x07[bold]markup[/bold]\nsecond line" in outcome.out
    assert r"key\x1b[31m" in outcome.out
    assert "w[red]" in outcome.out


def test_json_is_valid_and_short(invoke: Any, strange: Path) -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(name)

    outcome = invoke("inspect", str(strange), "--json")
    found = json.loads(outcome.out, parse_constant=no_constants)
    metadata = found["metadata"]
    assert metadata["nan"] == "nan"
    assert metadata["inf"] == [1.0, "inf"]
    assert metadata["long"] == {"length": 1000, "first": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert metadata["short"] == [True, False]
    assert metadata["words"] == ["a", "b"]
    assert found["memory_plan"] is None
    assert "perceptron" in found["no_memory_plan_because"]
    [tensor] = found["tensors"]
    assert (tensor["name"], tensor["shape"], tensor["type"], tensor["nbytes"]) == (
        "w[red]",
        [4, 32],
        "F32",
        512,
    )


def test_the_demo_model_in_figures(invoke: Any, demo_model: Path) -> None:
    found = json.loads(invoke("inspect", str(demo_model), "--json", "--context", "1024").out)
    assert found["quant_kind"] == "Q4_1"
    assert found["file_bytes"] == hub.DEMO.file_bytes
    assert found["metadata"]["general.architecture"] == "llama"
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 49152
    assert {share["name"]: share["num_tensors"] for share in found["types"]} == {
        "Q4_1": 210,
        "Q8_0": 1,
        "F32": 61,
    }
    assert sum(share["num_bytes"] for share in found["types"]) == sum(t["nbytes"] for t in found["tensors"])
    plan = found["memory_plan"]
    assert plan["max_model_len"] == 1024
    assert plan["weights_bytes"] == sum(tensor["nbytes"] for tensor in found["tensors"])
    (group,) = plan["kv_groups"]
    assert group["window"] is None
    parts = plan["weights_bytes"] + plan["workspace_bytes"] + group["num_blocks"] * group["block_bytes"]
    assert plan["total_bytes"] == parts


def test_the_plan_follows_context_and_settings(invoke: Any, demo_model: Path) -> None:
    def plan(*options: str) -> dict[str, Any]:
        made = json.loads(invoke("inspect", str(demo_model), "--json", *options).out)["memory_plan"]
        return made["kv_groups"][0]

    few = plan("--context", "512", "--max-num-seqs", "2")
    many = plan("--context", "512", "--max-num-seqs", "8")
    wide = plan("--context", "512", "--max-num-seqs", "2", "--kv-cache-dtype", "float32")
    assert many["num_blocks"] - 1 == 4 * (few["num_blocks"] - 1)
    assert wide["block_bytes"] == 2 * few["block_bytes"]


def test_too_long_a_context_is_a_reason_not_a_failure(invoke: Any, demo_model: Path) -> None:
    outcome = invoke("inspect", str(demo_model), "--no-tensors", "--context", "9000")
    assert outcome.status == 0
    assert "no memory plan: max_model_len is 9000" in outcome.out
    assert "blk.0." not in outcome.out


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file has 0 bytes"),
        (b"GGUF", "truncated|ends"),
        (b"PK\x03\x04" + b"\0" * 100, "magic"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, ""),
    ],
)
def test_what_is_no_model_file_is_one_line_and_status_1(
    invoke: Any, tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    outcome = invoke("inspect", str(path))
    assert outcome.status == 1
    assert outcome.err.startswith("error MODEL_LOAD_FAILED: ")
    assert len(outcome.err.strip().splitlines()) == 1
    assert str(tmp_path) not in outcome.err
