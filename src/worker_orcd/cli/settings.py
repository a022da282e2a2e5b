"""
The settings as people write them, and how they become a WorkerConfig.

Each has one name: `--max-num-seqs` on the command line, `WORKER_ORCD_MAX_NUM_SEQS` in the environment,
`max_num_seqs` in the TOML file. The command line wins over the environment, the environment over the file,
the file over the defaults of `config`. What is out of range is an InvalidConfiguration that names the
setting, where it came from, what was found and what is allowed; a secret is never repeated.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from worker_orcd.config import (
    CallbackConfig,
    DeviceConfig,
    EngineConfig,
    ServerConfig,
    WatchConfig,
    WorkerConfig,
)
from worker_orcd.errors import InvalidConfiguration

PREFIX = "WORKER_ORCD_"
Group = Literal["model", "device", "engine", "server", "callback", "watch"]

_SECTIONS: dict[str, type] = {
    "model": WorkerConfig,
    "device": DeviceConfig,
    "engine": EngineConfig,
    "server": ServerConfig,
    "callback": CallbackConfig,
    "watch": WatchConfig,
}
_OTHER_VARIABLES = frozenset({"CONFIG"})  # in the environment, but not a setting


def _setting(target: str, about: str, *, allowed: str = "", secret: bool = False, **constraints: Any) -> Any:
    """A setting that fills `target`, "section.field" of WorkerConfig, with that field's default."""
    section, _, name = target.partition(".")
    extra: dict[str, Any] = {"section": section, "field": name, "allowed": allowed, "secret": secret}
    default = _default(section, name)
    return Field(default=default, description=about, json_schema_extra=extra, **constraints)


def _default(section: str, name: str) -> Any:
    found = next(field for field in fields(_SECTIONS[section]) if field.name == name)
    return ... if found.default is MISSING else found.default


class Settings(BaseSettings):
    """Every setting: type, range, where it goes, and a line for `--help`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", hide_input_in_errors=True, frozen=True
    )

    model: str = _setting(
        "model.model",
        "path, file: URI, hf:org/repo/file.gguf, or demo",
        allowed="a non-empty text",
        min_length=1,
    )
    model_sha256: str | None = _setting(
        "model.model_sha256",
        "refuse the model file unless it has this SHA-256",
        allowed="64 hexadecimal digits",
        pattern=r"^[0-9a-fA-F]{64}$",
    )
    tokenizer: Path | None = _setting(
        "model.tokenizer", "a tokenizer.json that replaces the vocabulary in the model file"
    )
    worker_id: str | None = _setting(
        "model.worker_id",
        "this worker's name in logs and callbacks (default: a fresh UUID)",
        allowed="1 to 64 of A-Z a-z 0-9 . _ -",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
    )

    device: Literal["auto", "cpu", "cuda"] = _setting("device.device", "where the model runs")
    gpu_device: int = _setting("device.gpu_index", "which GPU, as CUDA counts them", ge=0, le=255)
    cpu_activations: Literal["int8", "int16", "float32"] = _setting(
        "device.cpu_activations", "arithmetic of the CPU kernels: float32 is exact and slow"
    )
    cpu_threads: int | None = _setting(
        "device.cpu_threads",
        "threads of the CPU kernels (default: the cores this process may use)",
        ge=1,
        le=1024,
    )
    kv_cache_dtype: Literal["auto", "float16", "float32", "fp8"] = _setting(
        "device.kv_cache_dtype",
        "numbers of the KV cache (auto: float32 with float32 activations, else float16; fp8: on a GPU)",
    )
    kv_cache_size_mb: int | None = _setting(
        "device.kv_cache_size_mb", "size of the KV cache (default: from the memory budget)", ge=1, le=16 << 20
    )
    vram_fraction: float = _setting(
        "device.memory_fraction", "of the device's free memory, how much the worker may use", gt=0.0, le=1.0
    )

    max_num_seqs: int = _setting("engine.max_num_seqs", "requests computed at the same time", ge=1, le=4096)
    max_num_batched_tokens: int = _setting(
        "engine.max_num_batched_tokens",
        "tokens computed in a step; longer prompts are chunked",
        ge=1,
        le=65536,
    )
    max_model_len: int | None = _setting(
        "engine.max_model_len",
        "longest prompt and answer together, in tokens (default: what the model was trained for, if it fits)",
        ge=1,
        le=1 << 24,
    )
    block_size: int = _setting("engine.block_size", "tokens in a block of the KV cache", ge=1, le=256)
    enable_prefix_caching: bool = _setting(
        "engine.enable_prefix_caching", "compute the common beginning of prompts only once"
    )
    decode_burst_ms: float = _setting(
        "engine.decode_burst_ms",
        "how long a GPU decodes before new requests are looked at; tokens come as many at a time (0: one)",
        ge=0,
        le=1000,
    )

    host: str = _setting(
        "server.host",
        "address to listen on",
        allowed="an IP address or host name",
        pattern=r"^[A-Za-z0-9.:_-]{1,253}$",
    )
    port: int = _setting("server.port", "port to listen on (0: any free one)", ge=0, le=65535)
    api_key: str | None = _setting(
        "server.api_key",
        "the bearer token that clients must present, or up to 64 of them, one a line",
        allowed="1 to 512 printable ASCII characters without spaces",
        secret=True,
        pattern=r"^[!-~]{1,512}(\n[!-~]{1,512}){0,63}$",
    )
    admin_key: str | None = _setting(
        "server.admin_key",
        "the bearer token for /shutdown and for cancelling anybody's job",
        allowed="1 to 512 printable ASCII characters without spaces",
        secret=True,
        pattern=r"^[!-~]{1,512}$",
    )
    max_queue: int = _setting(
        "server.max_queue", "requests waiting or running; more are refused", ge=1, le=1 << 20
    )
    max_body_bytes: int = _setting("server.max_body_bytes", "size of a request", ge=1024, le=1 << 30)
    max_prompt_chars: int = _setting("server.max_prompt_chars", "length of a prompt", ge=1, le=1 << 30)
    keep_alive_seconds: float = _setting(
        "server.keep_alive_seconds", "how often a silent stream gets a comment line", ge=0.1, le=3600.0
    )
    metrics_interval_ms: int = _setting(
        "server.metrics_interval_ms", "how often an /execute stream gets a metrics event", ge=250, le=1000
    )
    shutdown_grace_seconds: float = _setting(
        "server.shutdown_grace_seconds",
        "how long running requests may finish at shutdown",
        ge=0.0,
        le=86400.0,
    )
    log_prompts: bool = _setting("server.log_prompts", "write prompts and answers to the log")
    narration: Literal["auto", "json", "pretty"] = _setting(
        "server.narration", "form of the log (auto: pretty on a terminal, else JSON lines)"
    )
    chat_template: Path | None = _setting(
        "server.chat_template", "a file that replaces the chat template in the model file"
    )

    callback_url: str | None = _setting(
        "callback.url",
        "told by POST when the worker is ready",
        allowed="an http:// or https:// URL",
        pattern=r"^https?://[^\s/]+\S*$",
    )
    callback_token_file: Path | None = _setting(
        "callback.token_file", "holds the bearer token of the callback"
    )
    callback_attempts: int = _setting(
        "callback.attempts", "tries before the callback has failed", ge=1, le=100
    )
    callback_timeout_seconds: float = _setting(
        "callback.timeout_seconds", "time limit of one try", gt=0.0, le=600.0
    )

    yield_to_others: bool = _setting(
        "watch.yield_to_others", "give the GPU up while another process uses it, and come back afterwards"
    )
    gpu_poll_seconds: float = _setting(
        "watch.gpu_poll_seconds", "how often the GPU is looked at, and who else is there", ge=0.1, le=3600.0
    )
    residency_check_seconds: float = _setting(
        "watch.residency_check_seconds",
        "how often weights and KV cache are checked to be in the GPU's memory",
        ge=0.1,
        le=86400.0,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_in_numbers(cls, value: Any, info: Any) -> Any:
        """TOML's `port = true` is a mistake, not port 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("a truth value")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """In order of precedence. No .env file: what is read is what was named."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_config(
    given: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    key_files: Mapping[str, Path | None] | None = None,
    insecure: bool = False,
) -> tuple[WorkerConfig, list[str]]:
    """The configuration, and warnings to print.

    `given` are the settings of the command line by name, `key_files` hold `api_key` and `admin_key`. Raises
    InvalidConfiguration.
    """
    if config_file is None and os.environ.get(PREFIX + "CONFIG"):
        config_file = Path(os.environ[PREFIX + "CONFIG"])
    in_file = _read_toml(config_file) if config_file is not None else {}
    secrets = {name: _read_secret(file, name) for name, file in (key_files or {}).items() if file is not None}
    values: dict[str, Any] = {**given, **secrets}

    class Sourced(Settings):
        model_config = SettingsConfigDict(toml_file=config_file)

    try:
        settings = Sourced(**values)
    except ValidationError as error:
        raise InvalidConfiguration(_explain(error, given, in_file, secrets)) from None
    config = _assemble(settings)
    _refuse_contradictions(config, insecure)
    return config, _unknown_variables(os.environ)


def _assemble(settings: Settings) -> WorkerConfig:
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for name, info in Settings.model_fields.items():
        place = about(info)
        sections[place["section"]][place["field"]] = getattr(settings, name)
    return WorkerConfig(
        device=DeviceConfig(**sections["device"]),
        engine=EngineConfig(**sections["engine"]),
        server=ServerConfig(**sections["server"]),
        callback=CallbackConfig(**sections["callback"]),
        watch=WatchConfig(**sections["watch"]),
        **sections["model"],
    )


def about(info: FieldInfo) -> dict[str, Any]:
    """What `_setting` was told: section, field, allowed, secret."""
    extra = info.json_schema_extra
    return {**extra} if isinstance(extra, dict) else {}


# -- what is allowed ---------------------------------------------------------------------------------------


def allowed(info: FieldInfo) -> str:
    """For people: "an integer from 1 to 4096"."""
    told = about(info)["allowed"]
    if told:
        return str(told)
    kind = _plain_type(info.annotation)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return ("an integer" if kind is int else "a number") + _range(info)
    return "a path"


def choices(info: FieldInfo) -> tuple[str, ...]:
    """The values of a setting that has only these; empty for others."""
    kind = _plain_type(info.annotation)
    return tuple(str(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else ()


def is_flag(info: FieldInfo) -> bool:
    return info.annotation is bool


def _plain_type(annotation: Any) -> Any:
    """Without the None of an optional one."""
    if get_origin(annotation) is Literal:
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if kinds else annotation


def _range(info: FieldInfo) -> str:
    low = high = ""
    for constraint in info.metadata:
        if isinstance(constraint, annotated_types.Ge):
            low = f" from {constraint.ge}"
        elif isinstance(constraint, annotated_types.Gt):
            low = f" above {constraint.gt}"
        elif isinstance(constraint, annotated_types.Le):
            high = f" to {constraint.le}" if "from" in low else f", at most {constraint.le}"
    return low + high


# -- files and checks --------------------------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise InvalidConfiguration(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"--config {path}: not valid TOML: {error}") from None
    for key in values:
        if key not in Settings.model_fields:
            raise InvalidConfiguration(f"--config {path}: unknown setting {key!r}{_suggestion(key)}")
    return values


def _read_secret(path: Path, name: str) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return "\n".join(line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidConfiguration(f"--{name.replace('_', '-')}-file {path}: {reason}") from None


def _suggestion(name: str, form: str = "{}") -> str:
    close = difflib.get_close_matches(name.lower(), Settings.model_fields, n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def _unknown_variables(environ: Iterable[str]) -> list[str]:
    warnings: list[str] = []
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in _OTHER_VARIABLES or name.lower() in Settings.model_fields:
            continue
        close = difflib.get_close_matches(name.lower(), Settings.model_fields, n=1)
        hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
        warnings.append(f"the environment variable {variable} is not a setting and is ignored{hint}")
    return warnings


def _explain(
    error: ValidationError, given: Mapping[str, Any], in_file: Mapping[str, Any], secrets: Mapping[str, str]
) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    name = str(problem["loc"][0])
    info = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    if problem["type"] == "missing":
        return f"{name} is missing: give {flag}, {PREFIX}{name.upper()} or {name} in the --config file"
    if name in given:
        source, found = flag, given[name]
    elif name in secrets:
        source, found = f"{flag}-file", ""
    elif (variable := _variable(name)) is not None:
        source, found = variable, os.environ[variable]
    else:
        source, found = "the --config file", in_file.get(name)
    shown = "something else" if about(info)["secret"] else repr(found)
    return f"{name} (from {source}): found {shown}; expected {allowed(info)}"


def _variable(name: str) -> str | None:
    """The environment variable that holds a setting, as it is spelled there."""
    return next((variable for variable in os.environ if variable.lower() == (PREFIX + name).lower()), None)


def _refuse_contradictions(config: WorkerConfig, insecure: bool) -> None:
    server = config.server
    if server.api_key is None and not insecure and not is_loopback(server.host):
        raise InvalidConfiguration(
            f"host: found {server.host!r}, which other machines can reach, and no api_key; set "
            f"{PREFIX}API_KEY or --api-key-file, or say --insecure"
        )
    if server.admin_key is not None and server.admin_key in (server.api_key or "").split("\n"):
        raise InvalidConfiguration("admin_key is one of api_key: whoever has that would be an admin")
    if config.callback.token_file is not None and config.callback.url is None:
        raise InvalidConfiguration("callback_token_file is set and callback_url is not")
    if config.engine.max_model_len is not None and config.engine.block_size > config.engine.max_model_len:
        raise InvalidConfiguration(
            f"block_size: found {config.engine.block_size}; expected at most max_model_len, "
            f"{config.engine.max_model_len}"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
