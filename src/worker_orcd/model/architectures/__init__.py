"""GGUF metadata to ModelConfig, one file an architecture. A new one: a file here, a line in `_ADAPTERS`."""

from __future__ import annotations

from collections.abc import Callable

from worker_orcd.errors import UnsupportedArchitecture
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures import gemma3, gpt2, gpt_oss, llama, phi3, qwen2, qwen3
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.tensors import check_tensors

_ADAPTERS: dict[str, Callable[[GGUFFile], ModelConfig]] = {
    "llama": llama.configure,
    "qwen2": qwen2.configure,
    "qwen3": qwen3.configure,
    "qwen3moe": qwen3.configure_moe,
    "phi3": phi3.configure,
    "gpt-oss": gpt_oss.configure,
    "gpt2": gpt2.configure,
    "gemma3": gemma3.configure,
}

SUPPORTED: tuple[str, ...] = tuple(_ADAPTERS)


def configure(file: GGUFFile) -> ModelConfig:
    """What the file says about its network, with every tensor's presence, shape and format checked.

    Reads metadata and the tensor table, no weights. Raises UnsupportedArchitecture, UnsupportedFormat or
    InvalidModelFile.
    """
    architecture = file.metadata.string("general.architecture")
    adapter = _ADAPTERS.get(architecture)
    if adapter is None:
        raise UnsupportedArchitecture(
            f"general.architecture is {quoted(architecture)}; supported: {', '.join(SUPPORTED)}"
        )
    config = adapter(file)
    check_tensors(file, config)
    return config
