"""`quantize`: a model that runs, what it says about loss, and where it sends people with other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worker_orcd.gguf.kind import quant_kind
from worker_orcd.gguf.reader import GGUFFile


@pytest.fixture
def half(invoke: Any, tmp_path: Path) -> Path:
    path = tmp_path / "half.gguf"
    assert invoke("synth", "qwen2", str(path), "--mix", "F16").status == 0
    return path


def test_a_model_that_can_be_run(invoke: Any, half: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    made = invoke("quantize", str(half), str(out), "--mix", "q4_k_m")
    assert made.status == 0
    assert made.out.startswith(f"{out}: Q4_K_M, ")
    assert "Q5_0 22" in made.out
    assert "warning" not in made.err
    assert out.stat().st_size < half.stat().st_size / 2
    with GGUFFile(out) as file:
        assert quant_kind(file) == "Q4_K_M"
    answer = invoke("run", str(out), "hello", "--max-tokens", "8", "--max-model-len", "256")
    assert answer.status == 0
    assert answer.out


def test_quantising_twice_is_warned_of(invoke: Any, half: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    invoke("quantize", str(half), str(once), "--mix", "Q8_0")
    made = invoke("quantize", str(once), str(twice), "--mix", "Q4_0")
    assert made.status == 0
    assert "warning: weights that are quantised already (Q8_0 28) lose precision a second time" in made.err


@pytest.mark.parametrize("name", ["model.safetensors", "a-directory", "pytorch_model.bin"])
def test_other_formats_are_sent_to_the_tool_that_reads_them(invoke: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "." in name:
        path.write_bytes(b"\0" * 64)
    else:
        path.mkdir()
    refused = invoke("quantize", str(path), str(tmp_path / "out.gguf"), "--mix", "Q8_0")
    assert refused.status == 2
    assert f"IN: {name!r} is no GGUF file" in refused.err
    assert "convert_hf_to_gguf.py" in refused.err


def test_what_is_refused(invoke: Any, half: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    unknown = invoke("quantize", str(half), str(out), "--mix", "IQ2_XXS")
    assert unknown.status == 2
    assert "--mix: found 'IQ2_XXS'; expected one of F32, F16, Q4_0, " in unknown.err
    missing = invoke("quantize", str(tmp_path / "nothing.gguf"), str(out), "--mix", "Q8_0")
    assert missing.status == 1
    assert "no such file" in missing.err
    out.write_text("precious")
    kept = invoke("quantize", str(half), str(out), "--mix", "Q8_0")
    assert kept.status == 2
    assert "exists" in kept.err
    assert out.read_text() == "precious"


def test_a_file_can_take_its_own_place(invoke: Any, half: Path) -> None:
    made = invoke("quantize", str(half), str(half), "--mix", "Q8_0", "--force")
    assert made.status == 0
    with GGUFFile(half) as file:
        assert quant_kind(file) == "Q8_0"
