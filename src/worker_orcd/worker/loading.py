"""From a configuration to a model that can compute, and from that to a running engine. Interface; no HTTP
here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worker_orcd.config import EngineConfig, WorkerConfig
from worker_orcd.engine.engine import Engine, Publish
from worker_orcd.engine.messages import StepObserver
from worker_orcd.errors import EngineError
from worker_orcd.hub import Progress
from worker_orcd.kernels.backend import Backend
from worker_orcd.model.config import ModelConfig
from worker_orcd.narration import Narration
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from worker_orcd.runner.plan import MemoryPlan
    from worker_orcd.runner.runner import ModelRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds that the stages of loading took."""

    resolve: float  # finding the file, downloading it if need be
    read: float  # header, metadata, tensor table; SHA-256 if asked for
    tokenizer: float  # and chat template
    weights: float
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
    plan: MemoryPlan
    engine_config: EngineConfig  # with the `max_model_len` that the plan found room for
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    no_chat_template: str  # why there is none
    backend: Backend
    runner: ModelRunner
    timings: Timings

    def close(self) -> None:
        """Give the device memory back."""
        raise NotImplementedError


def load(
    config: WorkerConfig, *, warn: Callable[[str], None], on_progress: Progress | None = None
) -> LoadedModel:
    """Load the model that `config` names. Raises LoadError.

    `on_progress(stage, done, total)` is told of bytes, on this thread and while downloading on a library's;
    the stages are those of `hub.resolve`, then "checking SHA-256" where asked for, then "loading weights".
    """
    raise NotImplementedError


def start_engine(
    loaded: LoadedModel,
    publish: Publish,
    observer: StepObserver | None = None,
    *,
    narration: Narration | None = None,
    on_failure: Callable[[EngineError], None] | None = None,
) -> Engine:
    """A started engine on a loaded model. `publish` is called on the engine's thread; stop it before closing."""
    raise NotImplementedError
