"""Logits of every architecture equal transformers', and no chunking changes a bit of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import MODELS, Tiny, TinyFile, load_runner, twin_logits

from worker_orcd.config import EngineConfig
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.runner.scoring import score

PROMPT = np.random.default_rng(7).integers(0, 320, 300).tolist()
ENGINE = EngineConfig(max_num_seqs=512, max_num_batched_tokens=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    file = TinyFile(MODELS[name])
    runner = load_runner(file.write(tmp_path / "tiny.gguf"), ReferenceBackend(), ENGINE)
    expected = twin_logits(file, PROMPT)
    found = score(runner, PROMPT)
    assert found.shape == expected.shape
    error = np.abs(found - expected).max(axis=1) / np.ptp(expected, axis=1)  # (300,)
    assert error.max() < 1e-4
