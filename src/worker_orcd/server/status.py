"""What the worker is and how it is doing, kept ready so that `/health` never has to ask anybody.

Owned by the event loop: every method is called there (from another thread: `loop.call_soon_threadsafe`).
States: starting → ready ⇄ busy → draining, and failed from anywhere. Ready and busy are not stored: a loaded
worker is busy while a job is admitted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.engine.messages import EngineSnapshot
from worker_orcd.errors import Draining, LoadError, NotReady, Paused, QueueFull, Unavailable, WorkerError
from worker_orcd.server.client import EngineClient
from worker_orcd.server.gpu import GpuState, Residency
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION

State = Literal["starting", "ready", "busy", "draining", "failed"]
Health = Literal["loading", "healthy", "degraded", "draining", "unhealthy"]

PROTOCOL = "worker-orcd/1"  # of /execute and its events
PAUSE_RETRY_SECONDS = 10  # what whoever asks a paused worker is told to wait
CAPABILITIES = (
    "execute",
    "cancel",
    "tokenize",
    "detokenize",
    "apply-template",
    "openai-completions",
    "openai-chat-completions",
    "logprobs",
    "stop-strings",
    "deadlines",
    "priorities",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model once it is loaded. Sizes are bytes, lengths are tokens."""

    architecture: str
    quant_kind: str  # of the file: Q4_K_M, Q4_0, MXFP4, …
    tokenizer_kind: str
    vocab_size: int
    context_length: int  # what is served: prompt and answer together
    device: str  # for people: "cpu, 2 threads, int8 activations"
    memory_bytes_used: int  # by weights, KV cache and workspaces
    memory_bytes_total: int  # of the device
    kv_block_size: int  # tokens
    trained_context_length: int | None = None
    model_sha256: str | None = None  # of the file, when it was computed
    sm: str | None = None  # compute capability, on CUDA
    cuda_runtime_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a request needs of the loaded worker."""

    model_id: str
    facts: ModelFacts
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    client: EngineClient
    snapshot: Callable[[], EngineSnapshot]  # the engine's counts as its last step left them
    no_chat_template: str = "the model file has no chat template"  # why, when `chat_template` is None
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds, for /v1/models

    @property
    def fingerprint(self) -> str:
        """Names everything that decides the bits of an answer: equal fingerprint and seed, equal answer."""
        facts = self.facts
        parts = (self.model_id, facts.model_sha256, facts.architecture, facts.quant_kind, facts.device)
        return _fingerprint(parts)


@lru_cache(maxsize=4)
def _fingerprint(parts: tuple[str | None, ...]) -> str:
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return f"worker-orcd-{VERSION}-c{REPRODUCIBILITY_CONTRACT}-{digest}"


class Status:
    """The worker's state, from the first moment of the process to its last."""

    def __init__(self, *, worker_id: str, model_ref: str, clock: Clock = MONOTONIC) -> None:
        self.worker_id = worker_id
        self.model_ref = model_ref  # as the user wrote it, without a directory
        self.serving: Serving | None = None
        self.load_percent = 0.0
        self.slow: str | None = None  # why answers are slower than they should be
        self.paused: str | None = None  # why the model is not in memory for a while
        self.num_pauses = 0
        self.gpu = GpuState()
        self.residency = Residency()
        self._failure: WorkerError | None = None
        self._draining = False
        self._clock = clock
        self._started = clock()

    def loading(self, percent: float) -> None:
        """Loading has come this far, 0 to 100."""
        self.load_percent = min(100.0, max(self.load_percent, percent))

    def loaded(self, serving: Serving) -> None:
        """From now on jobs are accepted."""
        self.load_percent = 100.0
        self.serving, self.paused = serving, None

    def pause(self, reason: str) -> None:
        """The model is given up until `loaded` is called once more."""
        self.paused, self.serving, self.load_percent = reason, None, 0.0
        self.num_pauses += 1
        self.residency = replace(self.residency, resident=None, found=None)

    def fail(self, error: WorkerError) -> None:
        """The worker will not serve any more; the first failure is the one that is told."""
        if self._failure is None:
            self._failure = error

    def begin_drain(self) -> None:
        """New jobs are refused from now on."""
        self._draining = True
        if self.serving is not None:
            self.serving.client.begin_drain()

    @property
    def failure(self) -> WorkerError | None:
        return self._failure

    @property
    def degraded(self) -> str | None:
        """Why answers are slower or fewer than they should be."""
        reasons = (self.paused, self.slow, self.gpu.fault)
        return "; ".join(filter(None, reasons)) or None

    @property
    def uptime_seconds(self) -> float:
        return self._clock() - self._started

    @property
    def state(self) -> State:
        if self._failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        if self.serving is None:
            return "starting"
        return "busy" if self.serving.client.num_admitted else "ready"

    @property
    def health(self) -> Health:
        match self.state:
            case "failed":
                return "unhealthy"
            case "draining":
                return "draining"
            case "starting":
                return "loading" if self.paused is None else "degraded"
            case "ready" | "busy":
                if self.residency.resident is False:
                    return "unhealthy"
                return "degraded" if self.degraded is not None else "healthy"

    def require_serving(self) -> Serving:
        """What to serve with, or why not: raises the load failure, NotReady or Draining."""
        if self._failure is not None:
            if isinstance(self._failure, LoadError):
                raise self._failure
            raise NotReady(f"the worker has failed: {self._failure.message}", retry_after=30)
        if self._draining:
            raise Draining("the worker is shutting down and takes no new jobs", retry_after=5)
        if self.paused is not None:
            raise Paused(self.paused, retry_after=PAUSE_RETRY_SECONDS)
        if self.serving is None:
            raise NotReady(f"the model is still loading ({self.load_percent:.0f} %)", retry_after=1)
        return self.serving

    def not_ready(self) -> Unavailable | LoadError | None:
        """Why a job would be refused now; None when it would be accepted."""
        try:
            serving = self.require_serving()
        except (Unavailable, LoadError) as error:
            return error
        if serving.client.is_full:
            return QueueFull(f"the queue is full: {serving.client.num_admitted} sequences waiting or running")
        return None
