"""Settings, merged once at the edge (CLI > environment > TOML file > defaults) and never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda"]
CPUActivations = Literal["int8", "int16", "float32"]
KVCacheDtype = Literal["auto", "float16", "float32", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the scheduler may do in one step and how the KV cache is shared."""

    max_num_seqs: int = 64  # rows in a step
    max_num_batched_tokens: int = 512  # token budget of a step; a longer prompt is computed in chunks
    max_model_len: int | None = None  # None: what the model was trained for, as far as memory allows
    block_size: int = 16  # tokens in a KV block
    enable_prefix_caching: bool = True
    decode_burst_ms: float = 16.0  # that a GPU decodes for before the scheduler looks again


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Which device runs the model and with how much memory."""

    device: DeviceName = "auto"
    gpu_index: int = 0
    cpu_activations: CPUActivations = "int8"
    cpu_threads: int | None = None  # None: the cores this process may use
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: float32 with float32 activations, float16 otherwise
    kv_cache_size_mb: int | None = None  # None: from the memory budget
    memory_fraction: float = 0.8  # of the device's free memory that the worker may use


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side: where it listens, whom it trusts, how much it accepts."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)  # or several, one a line
    admin_key: str | None = field(default=None, repr=False)  # None: see `server.auth`
    max_queue: int = 256  # requests waiting or running; one more gets QUEUE_FULL
    max_body_bytes: int = 8 << 20
    max_prompt_chars: int = 4 << 20
    keep_alive_seconds: float = 5.0  # an SSE comment this often while a stream has nothing to say
    metrics_interval_ms: int = 500  # of `metrics` events in /execute streams
    shutdown_grace_seconds: float = 5.0
    log_prompts: bool = False
    narration: Literal["auto", "json", "pretty"] = "auto"
    chat_template: Path | None = None  # replaces the template in the model file


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackConfig:
    """Who is told when the worker is ready."""

    url: str | None = None
    token_file: Path | None = None
    attempts: int = 5
    timeout_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """How a worker that serves looks after its GPU."""

    yield_to_others: bool = False  # give the GPU up while other processes use it
    gpu_poll_seconds: float = 2.0  # between looks at the GPU and at who is there
    residency_check_seconds: float = 60.0  # between looks at where weights and KV cache lie


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    model: str  # a path, `file:` URI, `hf:org/repo/file.gguf`, or `demo`
    model_sha256: str | None = None
    tokenizer: Path | None = None  # a tokenizer.json that replaces the vocabulary in the model file
    worker_id: str | None = None  # None: a fresh UUID
    device: DeviceConfig = DeviceConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    callback: CallbackConfig = CallbackConfig()
    watch: WatchConfig = WatchConfig()
