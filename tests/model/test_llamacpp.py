"""llama.cpp, on the same file, is as sure of the same tokens; its logits differ by rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import MODELS
from tiny_variants import VARIANTS

from tiny_vs_llamacpp import NAMES, compare


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_most_likely_token_is_that_of_llamacpp_everywhere(name: str, tmp_path: Path):
    """In float32: where llama.cpp rounds activations to int8 its own tokens differ from transformers'."""
    found = compare(replace((MODELS | VARIANTS)[name], formats={}), tmp_path / "tiny.gguf")
    assert found.same_top_1 == 300
    assert found.error < 5e-4
    assert found.kl < 1e-6
