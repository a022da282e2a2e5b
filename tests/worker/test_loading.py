"""From settings to a model that computes, without HTTP."""

from __future__ import annotations

import io
import json
import os
import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_bench import TEMPLATE, tiny_file

from worker_orcd import hub, worker
from worker_orcd.config import ServerConfig, WorkerConfig
from worker_orcd.engine.messages import Output, Submit
from worker_orcd.errors import (
    InsufficientMemory,
    InvalidConfiguration,
    InvalidModelFile,
    InvalidParameter,
    ModelNotFound,
)
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.narration import Narration
from worker_orcd.sequence import FinishReason, SamplingParams
from worker_orcd.worker import loading
from worker_orcd.worker.progress import LoadProgress, LoadStopped

Reports = list[tuple[str, int, int]]


def load(config: WorkerConfig, warnings: list[str] | None = None, reports: Reports | None = None) -> Any:
    warned: list[str] = [] if warnings is None else warnings
    told: Reports = [] if reports is None else reports
    return worker.load(config, warn=warned.append, on_progress=lambda *report: told.append(report))


def test_a_loaded_model_knows_itself_and_answers(config: WorkerConfig, tiny_model: Path):
    warnings: list[str] = []
    reports: Reports = []
    loaded = load(config, warnings, reports)
    assert loaded.model_id == "tiny" and loaded.path == tiny_model
    assert loaded.file_bytes == tiny_model.stat().st_size and loaded.sha256 is None
    assert loaded.engine_config.max_model_len == loaded.plan.max_model_len == 512
    assert loaded.chat_template.source == TEMPLATE and not warnings
    assert loaded.timings.total > 0
    assert {stage for stage, _, _ in reports} == {"loading weights"}
    done = [done for _, done, _ in reports]
    assert done == sorted(done) and done[-1] == reports[-1][2] == loaded.file_bytes

    published: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
    engine = worker.start_engine(loaded, published.put)
    engine.send(
        Submit(
            id=1,
            prompt_token_ids=(1, 5, 6),
            max_tokens=5,
            stop_token_ids=frozenset(),
            sampling=SamplingParams(temperature=0.0),
        )
    )
    outputs = [output for _ in range(5) for output in published.get(timeout=60)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.stop(60)
    loaded.close()


def test_the_digest_is_checked_first(config: WorkerConfig, tiny_model: Path):
    digest = hub.file_sha256(tiny_model)
    loaded = load(replace(config, model_sha256=digest.upper()))
    assert loaded.sha256 == digest
    loaded.close()
    with pytest.raises(InvalidModelFile, match="SHA-256"):
        load(replace(config, model_sha256="0" * 64))


def test_one_digest_is_not_taken_for_that_of_many_files(config: WorkerConfig, tmp_path: Path):
    first = tmp_path / "tiny-00001-of-00002.gguf"
    tiny_file(**{"split.no": 0, "split.count": 2}).write(first)
    with GGUFWriter(tmp_path / "tiny-00002-of-00002.gguf") as second:
        second.add("split.no", 1)
        second.add("split.count", 2)
    split = replace(config, model=str(first))
    with pytest.raises(InvalidConfiguration, match="digest of one file; this model has 2"):
        load(replace(split, model_sha256=hub.file_sha256(first)))
    loaded = load(split)
    assert loaded.sha256 is None and loaded.model_id == "tiny"
    loaded.close()


def test_a_gpu_is_not_chosen_in_vain(config: WorkerConfig, tiny_model: Path):
    chosen = replace(config, device=replace(config.device, gpu_index=1))
    with pytest.raises(InvalidConfiguration, match="gpu_device is 1, but the model would run on cpu"):
        load(chosen)
    with GGUFFile(tiny_model) as file, pytest.raises(InvalidConfiguration, match="gpu_device is 1"):
        worker.plan_memory(file, chosen)


def test_what_is_not_there_is_said(config: WorkerConfig, tmp_path: Path):
    with pytest.raises(ModelNotFound, match="no such file"):
        load(replace(config, model=str(tmp_path / "none.gguf")))


def test_a_vocabulary_larger_than_the_network_is_refused(config: WorkerConfig, tmp_path: Path):
    file = tiny_file()
    names = file.tiny.metadata
    for key, more in (("tokens", "x"), ("token_type", 1), ("scores", -9.0)):
        names[f"tokenizer.ggml.{key}"] = [*np.array(names[f"tokenizer.ggml.{key}"]).tolist(), more]
    with pytest.raises(InvalidModelFile, match="26"):
        load(replace(config, model=str(file.write(tmp_path / "x.gguf"))))


def test_a_broken_template_costs_chat_only(config: WorkerConfig, tmp_path: Path):
    path = tiny_file(**{"tokenizer.chat_template": "{% for %}"}).write(tmp_path / "x.gguf")
    warnings: list[str] = []
    loaded = load(replace(config, model=str(path)), warnings)
    assert loaded.chat_template is None and "template" in loaded.no_chat_template
    assert len(warnings) == 1 and "Chat is not available" in warnings[0]
    loaded.close()
    path = tiny_file(**{"tokenizer.chat_template": None}).write(tmp_path / "x.gguf")
    loaded = load(replace(config, model=str(path)))
    assert loaded.chat_template is None and loaded.no_chat_template == "the model file has no chat template"
    loaded.close()


def test_a_given_template_replaces_the_models(config: WorkerConfig, tmp_path: Path):
    given = tmp_path / "chat.jinja"
    given.write_text("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    chosen = replace(config, server=ServerConfig(chat_template=given))
    loaded = load(chosen)
    assert loaded.chat_template.render([{"role": "user", "content": "ab"}]) == "<s>ab</s>"
    loaded.close()
    for content in (b"{% if %}", b"\xff"):
        given.write_bytes(content)
        with pytest.raises(InvalidConfiguration, match=r"chat\.jinja"):
            load(chosen)
    given.unlink()
    with pytest.raises(InvalidConfiguration, match=r"chat\.jinja cannot be read"):
        load(chosen)


def test_what_a_template_makes_of_messages_is_bounded_like_any_prompt(config: WorkerConfig, tmp_path: Path):
    given = tmp_path / "chat.jinja"
    given.write_text("{{ messages[0]['content'] * 3 }}")
    loaded = load(replace(config, server=ServerConfig(chat_template=given, max_prompt_chars=30)))
    assert len(loaded.chat_template.render([{"role": "user", "content": "a" * 10}])) == 30
    with pytest.raises(InvalidParameter, match="longer than 30 characters"):
        loaded.chat_template.render([{"role": "user", "content": "a" * 11}])
    loaded.close()


def test_too_little_memory_is_said_in_bytes(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch):
    for backend in (NativeBackend, ReferenceBackend):
        monkeypatch.setattr(backend, "available_memory", lambda _self: 1 << 20)
    with pytest.raises(InsufficientMemory, match=r"'tiny' requires .* MiB .* 1\.0 MiB available"):
        load(config)


def test_a_failed_load_undoes_what_was_begun(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch):
    closed: list[str] = []
    template_close, backend_of = loading.ChatTemplate.close, loading.select_backend

    def close_template(template: Any) -> None:
        closed.append("template")
        template_close(template)

    def select(*args: Any, **options: Any) -> Any:
        backend = backend_of(*args, **options)
        original = backend.close
        monkeypatch.setattr(backend, "close", lambda: closed.append("backend") or original())
        return backend

    def fail(*_args: Any, **_options: Any) -> Any:
        raise InvalidModelFile("broken")

    monkeypatch.setattr(loading.ChatTemplate, "close", close_template)
    monkeypatch.setattr(loading, "select_backend", select)
    monkeypatch.setattr(loading, "load_weights", fail)
    with pytest.raises(InvalidModelFile):
        load(config)
    assert closed == ["backend", "template"]


@pytest.mark.parametrize("spoil", ["cut", "emptied", "written anew", "touched"])
def test_a_file_that_changes_while_it_is_loaded_is_refused(config: WorkerConfig, tmp_path: Path, spoil: str):
    """Shortened, its mapping has lost pages: reading them would end the process with SIGBUS."""
    path = tiny_file().write(tmp_path / "tiny.gguf")
    size = path.stat().st_size

    def on_progress(_stage: str, done: int, _total: int) -> None:
        if not 0.2 < done / size < 0.5 or spoilt:
            return
        spoilt.append(done)
        if spoil == "written anew":
            path.write_bytes(bytes(size))
        elif spoil == "touched":
            os.utime(path)
        else:
            os.truncate(path, 0 if spoil == "emptied" else size - 100)

    spoilt: list[int] = []
    with pytest.raises(InvalidModelFile, match=r"^'tiny.gguf': .*the file was changed while it was loaded"):
        worker.load(replace(config, model=str(path)), warn=lambda _: None, on_progress=on_progress)
    assert spoilt


def test_a_file_may_be_replaced_or_removed_while_it_is_loaded(config: WorkerConfig, tmp_path: Path):
    """As downloads do it: under another name first."""
    path, other = tiny_file().write(tmp_path / "tiny.gguf"), tmp_path / "other"
    other.write_bytes(b"something else")

    def on_progress(_stage: str, done: int, _total: int) -> None:
        if done and other.exists():
            other.replace(path)

    wanted = replace(config, model=str(path))
    worker.load(wanted, warn=lambda _: None, on_progress=on_progress).close()
    assert path.read_bytes() == b"something else"
    tiny_file().write(path)
    worker.load(wanted, warn=lambda _: None, on_progress=lambda *_: path.unlink(missing_ok=True)).close()
    assert not path.exists()


def test_a_plan_loads_nothing(config: WorkerConfig, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "load_weights", None)
    with GGUFFile(tiny_model) as file:
        plan = worker.plan_memory(file, config)
    assert plan.kv_cache_bytes <= 4 << 20 and plan.max_model_len == 512


# -- progress ----------------------------------------------------------------------------------------------


def test_progress_is_told_in_quarters_and_counted_in_percent():
    log = io.StringIO()
    percents: list[float] = []
    progress = LoadProgress(Narration("json", stream=log), percents.append)
    for done in range(0, 1001, 10):
        progress("downloading x", done, 1000)
    progress("checking SHA-256", 0, 0)  # the size is not known
    for done in (0, 10, 400, 1000):
        progress("loading weights", done, 1000)
    told = [(e["stage"], e["percent"]) for e in map(json.loads, log.getvalue().splitlines())]
    quarters = [0, 25, 50, 75, 100]
    assert told == [
        *[("downloading x", q) for q in quarters],
        ("checking SHA-256", 0),
        *[("loading weights", q) for q in quarters],
    ]
    assert percents == sorted(set(percents)) and percents[-1] == 100
    assert 50 in percents and 70 in percents


def test_a_bar_takes_the_place_of_events():
    log = io.StringIO()
    drawn: Reports = []
    LoadProgress(Narration("json", stream=log), lambda _: None, lambda *r: drawn.append(r))("x", 1, 2)
    assert drawn == [("x", 1, 2)] and not log.getvalue()


def test_stopping_raises_where_loading_reports():
    progress = LoadProgress(Narration("json", stream=io.StringIO()), lambda _: None)
    progress("x", 1, 2)
    progress.stop()
    with pytest.raises(LoadStopped):
        progress("x", 2, 2)
