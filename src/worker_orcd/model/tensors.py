"""
Which tensors a decoder's file must hold, under which names and shapes, and how small ones are read.

Shapes are numpy's: (outputs, inputs). The check runs before anything is allocated: a missing, misshapen,
unreadable or unexpected tensor is an error that names it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile, UnsupportedFormat
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile, TensorInfo
from worker_orcd.model.config import LayerConfig, ModelConfig
from worker_orcd.quant import BY_NAME, FORMATS, WeightFormat

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that `weights.load_weights` reads."""
    expected: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.dim),
        OUTPUT_NORM: (config.dim,),
    }
    if not config.tied_embeddings:
        expected[OUTPUT] = (config.vocab_size, config.dim)
    for index, layer in enumerate(config.layers):
        for name, shape in _layer_tensors(layer, config.dim).items():
            expected[f"blk.{index}.{name}"] = shape
    return expected


def _layer_tensors(layer: LayerConfig, dim: int) -> dict[str, tuple[int, ...]]:
    attention = layer.attention
    q_dim = attention.num_heads * attention.head_dim
    kv_dim = attention.num_kv_heads * attention.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (dim,),
        "attn_q.weight": (q_dim, dim),
        "attn_k.weight": (kv_dim, dim),
        "attn_v.weight": (kv_dim, dim),
        "attn_output.weight": (dim, q_dim),
        "ffn_norm.weight": (dim,),
        "ffn_gate.weight": (layer.ffn_dim, dim),
        "ffn_up.weight": (layer.ffn_dim, dim),
        "ffn_down.weight": (dim, layer.ffn_dim),
    }
    if layer.qkv_bias:
        tensors |= {"attn_q.bias": (q_dim,), "attn_k.bias": (kv_dim,), "attn_v.bias": (kv_dim,)}
    if layer.head_norms:
        tensors |= {"attn_q_norm.weight": (attention.head_dim,), "attn_k_norm.weight": (attention.head_dim,)}
    return tensors


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Raises InvalidModelFile or UnsupportedFormat for the first tensor that is not as `config` needs it."""
    expected = expected_tensors(config)
    for name, shape in expected.items():
        check_tensor(file, name, shape)
    unknown = [name for name in file.tensors if name not in expected and name not in config.unused_tensors]
    if unknown:
        raise InvalidModelFile(
            f"tensor {quoted(unknown[0])} has no place in a {config.architecture} model "
            f"({len(unknown)} such tensors)"
        )


def check_tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise InvalidModelFile(f"tensor '{name}' is missing; expected shape {shape}")
    if info.shape != shape:
        raise InvalidModelFile(f"tensor '{name}' has shape {info.shape}; expected {shape}")
    weight_format = format_of(info)
    if shape[-1] % weight_format.block_size:
        raise InvalidModelFile(
            f"tensor '{name}' has rows of {shape[-1]} weights; {weight_format.name} needs a multiple of "
            f"{weight_format.block_size}"
        )
    return info


def format_of(info: TensorInfo) -> WeightFormat:
    """Raises UnsupportedFormat."""
    weight_format = FORMATS.get(info.ggml_type)
    if weight_format is None:
        raise UnsupportedFormat(
            f"tensor '{info.name}' has ggml type {info.ggml_type}; supported: {', '.join(BY_NAME)}"
        )
    return weight_format


def read_vector(file: GGUFFile, name: str, length: int) -> NDArray[np.float32]:
    """A one-dimensional tensor, dequantised: (length,) float32, a copy."""
    info = check_tensor(file, name, (length,))
    return format_of(info).dequantize_rows(file.rows(name))[0].astype(np.float32)
