"""Tokenizer and template are loaded beside the weights, and neither outlives a load that fails."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from worker_orcd import worker
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InsufficientMemory, InvalidModelFile
from worker_orcd.worker import loading, words


def test_a_template_ends_with_the_load_that_failed(config: WorkerConfig):
    before = set(psutil.Process().children(recursive=True))
    small = replace(config, device=replace(config.device, memory_fraction=1e-9))
    with pytest.raises(InsufficientMemory):
        worker.load(small, warn=pytest.fail)
    left = set(psutil.Process().children(recursive=True)) - before
    psutil.wait_procs(left, timeout=60)
    assert not [process for process in left if process.is_running()]


def test_a_vocabulary_that_cannot_be_used_ends_the_load_before_the_weights_are_there(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_arguments: object) -> None:
        raise InvalidModelFile("no such vocabulary")

    monkeypatch.setattr(words, "load_tokenizer", refuse)
    started = words.BackgroundWords.__enter__

    def once_it_failed(self: words.BackgroundWords) -> words.BackgroundWords:
        self._words.exception()
        return started(self)

    monkeypatch.setattr(words.BackgroundWords, "__enter__", once_it_failed)
    monkeypatch.setattr(loading, "ModelRunner", pytest.fail)
    done: list[int] = []
    with pytest.raises(InvalidModelFile, match="no such vocabulary"):
        worker.load(config, warn=pytest.fail, on_progress=lambda _stage, now, _total: done.append(now))
    assert not done
