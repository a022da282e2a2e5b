"""The metadata of a made-up file, under the keys that llama.cpp's converter writes for each architecture."""

from __future__ import annotations

from worker_orcd.gguf.mixture import MIXTURES
from worker_orcd.gguf.writer import Written
from worker_orcd.synth.shapes import Shape
from worker_orcd.synth.vocabulary import tokenizer_metadata

QUANTIZATION_VERSION = 2  # of ggml's blocks; all files since 2023 have it


def metadata(shape: Shape, name: str, mixture: str) -> dict[str, Written]:
    """Everything but the tensors of a model called `name`."""
    values: dict[str, Written] = {
        "general.architecture": shape.architecture,
        "general.type": "model",
        "general.name": f"{name} (random weights)",
        "general.description": "random weights, for measuring and testing; its answers mean nothing",
    }
    values |= {f"{shape.architecture}.{key}": value for key, value in _hyperparameters(shape).items()}
    values |= tokenizer_metadata(shape.vocabulary, shape.vocab_size)
    values["general.quantization_version"] = QUANTIZATION_VERSION
    values["general.file_type"] = MIXTURES[mixture]
    return values


def _hyperparameters(shape: Shape) -> dict[str, Written]:
    architecture = shape.architecture
    values: dict[str, Written] = {
        "block_count": shape.num_layers,
        "context_length": shape.context_length,
        "embedding_length": shape.dim,
        "feed_forward_length": shape.ffn_dim,
        "attention.head_count": shape.num_heads,
    }
    if architecture == "gpt2":
        return values | {"attention.layer_norm_epsilon": shape.norm_eps}
    values |= {
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "rope.freq_base": shape.rope_base,
    }
    if architecture in ("qwen3", "qwen3moe", "gpt-oss", "gemma3"):
        values |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    if architecture in ("llama", "phi3"):
        values["rope.dimension_count"] = shape.head_dim
    if architecture == "llama":
        values["vocab_size"] = shape.vocab_size
    if shape.window is not None:
        values["attention.sliding_window"] = shape.window
    if shape.num_experts:
        values |= {
            "expert_count": shape.num_experts,
            "expert_used_count": shape.num_experts_used,
            "expert_feed_forward_length": shape.expert_dim,
        }
    return values | _positions(shape)


def _positions(shape: Shape) -> dict[str, Written]:
    if shape.architecture == "phi3" and shape.original_context is not None:
        return {"rope.scaling.original_context_length": shape.original_context}
    if shape.architecture == "gpt-oss" and None not in (shape.rope_factor, shape.original_context):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(shape.rope_factor or 1.0),
            "rope.scaling.original_context_length": shape.original_context or 0,
        }
    return {}
