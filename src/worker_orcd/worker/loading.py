"""From a configuration to a model that can compute, and from that to a running engine. No HTTP here."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from worker_orcd import hub
from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.config import DeviceConfig, EngineConfig, WorkerConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.engine import Engine, Publish, ignore_failure
from worker_orcd.engine.messages import StepObserver
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.errors import EngineError, InvalidConfiguration
from worker_orcd.gguf.kind import quant_kind
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.hub import Progress
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.memory import Held
from worker_orcd.kernels.pages import WatchedPages
from worker_orcd.kernels.select import OnCompile, select_backend
from worker_orcd.model.architectures import configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import Weights, load_weights
from worker_orcd.narration import Narration
from worker_orcd.runner.measure import seal, settled
from worker_orcd.runner.plan import MemoryPlan, make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer
from worker_orcd.worker.words import BackgroundWords

_PART = re.compile(r"-\d{5}-of-\d{5}$")

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds that the stages of loading took."""

    resolve: float  # finding the file, downloading it if need be
    read: float  # header, metadata, tensor table; SHA-256 if asked for
    tokenizer: float  # and chat template: what was waited for after the rest was ready
    weights: float  # choosing the device, planning its memory, packing the tensors
    compile: float  # KV cache, buffers, the compiled step

    @property
    def total(self) -> float:
        return self.resolve + self.read + self.tokenizer + self.weights + self.compile


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, ready to compute. Whoever loaded it closes it, after the engine has stopped."""

    model_id: str  # what clients call it: the file's name without directory and suffix
    path: Path
    file_bytes: int  # of all parts
    sha256: str | None  # None unless it was asked for
    quant_kind: str  # of the file: Q4_K_M, Q4_1, MXFP4, …
    config: ModelConfig
    plan: MemoryPlan  # by which the KV cache was allocated
    held: Held | None  # what all of it takes, where a device's memory is counted
    engine_config: EngineConfig  # with the `max_model_len` that the plan found room for
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    no_chat_template: str  # why there is none
    backend: Backend
    runner: ModelRunner
    timings: Timings

    def close(self) -> None:
        """Give the device memory back and end the template's process."""
        if self.chat_template is not None:
            self.chat_template.close()
        self.backend.close()


def load(
    config: WorkerConfig,
    *,
    warn: Warn,
    on_progress: Progress | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> LoadedModel:
    """Load the model that `config` names. Raises LoadError; what was begun is undone.

    `on_progress(stage, done, total)` is told of bytes, on this thread and while downloading on a library's;
    the stages are those of `hub.resolve`, "checking SHA-256" where asked for, "compiling the CPU kernels"
    where that has not been done yet (it begins; how far it is nobody knows), "loading weights", and where the
    model runs on a GPU "compiling the GPU kernels", counted in kernels.
    `on_plan` is told, on this thread, what the model will take before any of it is taken.
    """
    report = on_progress or _silent
    clock = _Clock()
    path = hub.resolve(config.model, report)
    resolved = clock.lap()
    if config.model_sha256 is not None:
        hub.check_sha256(path, config.model_sha256, report)
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(GGUFFile(path))
        if config.model_sha256 is not None and file.num_parts > 1:
            raise InvalidConfiguration(
                f"model_sha256 is the digest of one file; this model has {file.num_parts}"
            )
        model = configure(file)
        read = clock.lap()
        words = undo.enter_context(BackgroundWords(config, file, model.vocab_size))

        def on_compile(whose: str, done: int, total: int) -> None:
            report(f"compiling the {whose} kernels", done, total)

        backend = _backend(config.device, warn, on_compile)
        undo.callback(backend.close)
        plan = _plan(file, model, backend, config.engine, config.device)
        if on_plan is not None:
            on_plan(plan)
        for note in plan.notes:
            warn(note)

        weights = _load_weights(file, model, backend, plan, words, report)
        weighed = clock.lap()
        named = replace(model, name=_model_id(path))
        plan = settled(plan, named, weights, backend, config.engine, config.device)
        model = model.serving(plan.max_model_len)
        engine_config = replace(config.engine, max_model_len=plan.max_model_len)
        runner = ModelRunner(Decoder(model, weights, backend), backend, plan, engine_config)
        held = seal(plan, backend, warn)
        compiled = clock.lap()
        tokens = words.wait(warn)
        file.close()
        undo.pop_all()
    return LoadedModel(
        model_id=_model_id(path),
        path=path,
        file_bytes=file.file_bytes,
        sha256=_sha256(config),
        quant_kind=quant_kind(file),
        config=model,
        plan=plan,
        held=held,
        engine_config=engine_config,
        tokenizer=tokens.tokenizer,
        chat_template=tokens.template,
        no_chat_template=tokens.no_template,
        backend=backend,
        runner=runner,
        timings=Timings(
            resolve=resolved, read=read, tokenizer=clock.lap(), weights=weighed, compile=compiled
        ),
    )


def _load_weights(
    file: GGUFFile,
    model: ModelConfig,
    backend: Backend,
    plan: MemoryPlan,
    words: BackgroundWords,
    report: Progress,
) -> Weights:
    """Of the file as it was when it was opened: where that cannot be had, there are none."""
    with WatchedPages(file) as pages:

        def on_weights(fraction: float) -> None:
            words.raise_what_failed()
            pages.check()
            report("loading weights", int(fraction * file.file_bytes), file.file_bytes)

        forget = backend.displaces_files(plan.weights_bytes)
        return load_weights(file, model, backend, on_weights, forget=forget)


def plan_memory(file: GGUFFile, config: WorkerConfig) -> MemoryPlan:
    """What serving this file would take on this machine now. Loads no weights. Raises LoadError."""
    backend = _backend(config.device, _no_warning, _silent)
    try:
        return _plan(file, configure(file), backend, config.engine, config.device)
    finally:
        backend.close()


def start_engine(
    loaded: LoadedModel,
    publish: Publish,
    observer: StepObserver | None = None,
    *,
    narration: Narration | None = None,
    on_failure: Callable[[EngineError], None] = ignore_failure,
    clock: Clock = MONOTONIC,
) -> Engine:
    """A started engine on a loaded model; stop it before closing the model.

    `publish` gets each step's outputs, on the engine's thread.
    """
    scheduler = Scheduler(loaded.engine_config, cache_groups(loaded.plan))
    engine = Engine(
        scheduler,
        loaded.runner,
        publish,
        observer=observer,
        narration=narration,
        on_failure=on_failure,
        burst_seconds=loaded.engine_config.decode_burst_ms / 1000.0,
        clock=clock,
    )
    engine.start()
    return engine


def cache_groups(plan: MemoryPlan) -> list[CacheGroup]:
    """The blocks of a plan, all free."""
    return [CacheGroup(BlockPool(group.num_blocks), group.window) for group in plan.kv_groups]


class _Clock:
    """Seconds between calls of `lap`."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        last, self._last = self._last, time.monotonic()
        return self._last - last


def _backend(device: DeviceConfig, warn: Warn, on_compile: OnCompile) -> Backend:
    backend = select_backend(device, warn, on_compile=on_compile)
    if device.gpu_index and backend.name != "cuda":
        backend.close()
        raise InvalidConfiguration(
            f"gpu_device is {device.gpu_index}, but the model would run on {backend.name}, which is no GPU"
        )
    return backend


def _plan(
    file: GGUFFile, model: ModelConfig, backend: Backend, engine: EngineConfig, device: DeviceConfig
) -> MemoryPlan:
    known = replace(model, name=_model_id(file.path))  # what its user calls it, for messages
    return make_plan(known, tensor_bytes(file), backend, engine, device, backend.available_memory())


def _model_id(path: Path) -> str:
    return _PART.sub("", path.stem)


def _sha256(config: WorkerConfig) -> str | None:
    """What is known without reading the file once more."""
    if config.model_sha256 is not None:
        return config.model_sha256.lower()
    return hub.DEMO.sha256 if config.model == "demo" else None


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody is watching."""


def _no_warning(_sentence: str) -> None:
    """A plan is asked for, not the device."""
