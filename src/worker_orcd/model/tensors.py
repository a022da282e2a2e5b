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
from worker_orcd.model.config import LayerConfig, ModelConfig, MoeConfig, Norm
from worker_orcd.quant import BY_NAME, FORMATS, WeightFormat

EMBEDDING = "token_embd.weight"
POSITIONS = "position_embd.weight"
OUTPUT_NORM = "output_norm"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"

Shapes = dict[str, tuple[int, ...]]  # by tensor name


def expected_tensors(config: ModelConfig) -> Shapes:
    """Every tensor that `weights.load_weights` reads."""
    expected: Shapes = {EMBEDDING: (config.vocab_size, config.dim)}
    if config.learned_positions:
        expected[POSITIONS] = (config.context_length, config.dim)
    if not config.tied_embeddings:
        expected[OUTPUT] = (config.vocab_size, config.dim)
    expected |= _norm_tensors(OUTPUT_NORM, config)
    for index, layer in enumerate(config.layers):
        tensors = _attention_tensors(layer, config) | _ffn_tensors(layer, config)
        expected |= {f"blk.{index}.{name}": shape for name, shape in tensors.items()}
    return expected


def _norm_tensors(name: str, config: ModelConfig) -> Shapes:
    kinds = ("weight", "bias") if config.norm is Norm.LAYER else ("weight",)
    return {f"{name}.{kind}": (config.dim,) for kind in kinds}


def _matrix_tensors(name: str, n: int, k: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (n, k)} | ({f"{name}.bias": (n,)} if bias else {})


def _attention_tensors(layer: LayerConfig, config: ModelConfig) -> Shapes:
    dim, attention = config.dim, layer.attention
    q_dim, kv_dim = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    widths = {"q": q_dim, "k": kv_dim, "v": kv_dim}
    if layer.fused_qkv:
        widths = {"qkv": q_dim + 2 * kv_dim}
    tensors = _norm_tensors("attn_norm", config)
    for letters, width in widths.items():
        tensors |= _matrix_tensors(f"attn_{letters}", width, dim, bias=layer.qkv_bias)
    tensors |= _matrix_tensors("attn_output", dim, q_dim, bias=layer.output_bias)
    if layer.head_norms:
        tensors |= {f"attn_{letter}_norm.weight": (attention.head_dim,) for letter in "qk"}
    if layer.sinks:
        tensors["attn_sinks.weight"] = (attention.num_heads,)
    if layer.post_norms:
        tensors |= _norm_tensors("post_attention_norm", config)
    return tensors


def _ffn_tensors(layer: LayerConfig, config: ModelConfig) -> Shapes:
    dim, ffn = config.dim, layer.ffn
    tensors = _norm_tensors(layer.ffn_norm, config)
    if layer.post_norms:
        tensors |= _norm_tensors("post_ffw_norm", config)
    if isinstance(ffn, MoeConfig):
        tensors |= _matrix_tensors("ffn_gate_inp", ffn.num_experts, dim, bias=ffn.bias)
        for name, n, k in (("gate", ffn.dim, dim), ("up", ffn.dim, dim), ("down", dim, ffn.dim)):
            tensors[f"ffn_{name}_exps.weight"] = (ffn.num_experts, n, k)
            if ffn.bias:
                tensors[f"ffn_{name}_exps.bias"] = (ffn.num_experts, n)
        return tensors
    if ffn.glu is not None and not ffn.fused:
        tensors |= _matrix_tensors("ffn_gate", ffn.dim, dim, bias=ffn.bias)
    tensors |= _matrix_tensors("ffn_up", 2 * ffn.dim if ffn.fused else ffn.dim, dim, bias=ffn.bias)
    return tensors | _matrix_tensors("ffn_down", dim, ffn.dim, bias=ffn.bias)


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
    return read_rows(file, name, (length,))


def read_rows(file: GGUFFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A small tensor, dequantised: float32 of this shape, a copy."""
    info = check_tensor(file, name, shape)
    return format_of(info).dequantize_rows(file.rows(name)).astype(np.float32).reshape(shape)
