"""
The hyper-parameters that every decoder-only GGUF states in the same keys, read once and checked.

An adapter adds what is particular to its architecture. Keys that would change the arithmetic in a way nothing
here computes (experts, unknown rope scaling) are refused by name: a file is executed right or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile, UnsupportedArchitecture
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import AttentionParams, RopeParams
from worker_orcd.model.config import LayerConfig, ModelConfig
from worker_orcd.model.tensors import EMBEDDING, OUTPUT, ROPE_FACTORS, read_vector

_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_HEAD_DIM = 1024
_MAX_CONTEXT = 1 << 30  # positions are int32
_MIN_LINEAR_FACTOR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    architecture: str
    name: str
    vocab_size: int
    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    window: int | None  # sliding window of every layer, None where it would never bite
    tied_embeddings: bool
    rope: RopeParams

    def attention(self) -> AttentionParams:
        return AttentionParams(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
        )

    def model(self, layers: tuple[LayerConfig, ...]) -> ModelConfig:
        return ModelConfig(
            architecture=self.architecture,
            name=self.name,
            vocab_size=self.vocab_size,
            dim=self.dim,
            context_length=self.context_length,
            norm_eps=self.norm_eps,
            tied_embeddings=self.tied_embeddings,
            layers=layers,
            unused_tensors=frozenset({ROPE_FACTORS}),  # read into rope.inv_freq
        )


def read_hyperparameters(file: GGUFFile, *, may_slide: bool = False) -> Hyperparameters:
    """Raises InvalidModelFile or UnsupportedArchitecture, naming the key and what was found.

    `may_slide`: a sliding window in the file is one of every layer. Otherwise it is refused.
    """
    metadata = file.metadata
    architecture = metadata.string("general.architecture")
    _refuse_what_is_not_computed(file, architecture)
    dim = metadata.integer(f"{architecture}.embedding_length", low=1, high=_MAX_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(file, architecture, dim)
    context_length = metadata.integer(f"{architecture}.context_length", low=1, high=_MAX_CONTEXT)
    window = metadata.integer(f"{architecture}.attention.sliding_window", default=0)
    if not 0 < window < context_length:
        window = None
    elif not may_slide:
        raise UnsupportedArchitecture(
            f"{architecture}.attention.sliding_window is {window}, shorter than the context of "
            f"{context_length}: not supported for {architecture}"
        )
    return Hyperparameters(
        architecture=architecture,
        name=metadata.string("general.name", default=architecture),
        vocab_size=_vocab_size(file),
        num_layers=metadata.integer(f"{architecture}.block_count", low=1, high=_MAX_LAYERS),
        dim=dim,
        ffn_dim=metadata.integer(f"{architecture}.feed_forward_length", low=1, high=_MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        norm_eps=metadata.number(f"{architecture}.attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        window=window,
        tied_embeddings=OUTPUT not in file.tensors,
        rope=_rope(file, architecture, head_dim),
    )


def _refuse_what_is_not_computed(file: GGUFFile, architecture: str) -> None:
    if not file.metadata.boolean(f"{architecture}.attention.causal", default=True):
        raise UnsupportedArchitecture(
            f"{architecture}.attention.causal is false: a model that embeds texts cannot continue them"
        )
    key = f"{architecture}.expert_count"
    if num_experts := file.metadata.optional_integer(key):
        raise UnsupportedArchitecture(
            f"{key} is {num_experts}: mixtures of experts are not supported for {architecture}"
        )


def _heads(file: GGUFFile, architecture: str, dim: int) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim)."""
    metadata, prefix = file.metadata, f"{architecture}.attention"
    num_heads = metadata.integer(f"{prefix}.head_count", low=1, high=_MAX_WIDTH)
    num_kv_heads = metadata.integer(f"{prefix}.head_count_kv", low=1, high=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise InvalidModelFile(
            f"{prefix}.head_count is {num_heads}, which is not a multiple of {prefix}.head_count_kv, "
            f"{num_kv_heads}"
        )
    head_dim = metadata.optional_integer(f"{prefix}.key_length", low=1, high=_MAX_HEAD_DIM)
    if head_dim is None:
        if dim % num_heads:
            raise InvalidModelFile(
                f"{architecture}.embedding_length is {dim}, which is not a multiple of {prefix}.head_count, "
                f"{num_heads}, and {prefix}.key_length is absent"
            )
        head_dim = dim // num_heads
    if head_dim > _MAX_HEAD_DIM:
        raise InvalidModelFile(f"heads have {head_dim} dimensions; at most {_MAX_HEAD_DIM} are allowed")
    value_length = metadata.integer(f"{prefix}.value_length", low=1, high=_MAX_HEAD_DIM, default=head_dim)
    if value_length != head_dim:
        raise UnsupportedArchitecture(
            f"{prefix}.value_length is {value_length}, but keys have {head_dim} dimensions; expected as many"
        )
    return num_heads, num_kv_heads, head_dim


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding, which must be as many as the file has tokens (where it has a vocabulary)."""
    table = file.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise InvalidModelFile(
            f"tensor '{EMBEDDING}' is {'missing' if table is None else f'of shape {table.shape}'}; "
            "expected (vocabulary, embedding_length)"
        )
    vocab_size = table.shape[0]
    if "tokenizer.ggml.tokens" in file.metadata:
        num_tokens = len(file.metadata.strings("tokenizer.ggml.tokens"))
        if num_tokens != vocab_size:
            raise InvalidModelFile(
                f"tensor '{EMBEDDING}' has {vocab_size} rows; expected {num_tokens}, "
                "as many as tokenizer.ggml.tokens has entries"
            )
    return vocab_size


def _rope(file: GGUFFile, architecture: str, head_dim: int) -> RopeParams:
    """inv_freq[i] = base ** (-2i / rotary_dim), over the linear factor and `rope_freqs.weight` (Llama 3)."""
    metadata, prefix = file.metadata, f"{architecture}.rope"
    rotary_dim = metadata.integer(f"{prefix}.dimension_count", low=2, high=head_dim, default=head_dim)
    if rotary_dim % 2:
        raise InvalidModelFile(f"{prefix}.dimension_count is {rotary_dim}; it must be even")
    base = metadata.number(f"{prefix}.freq_base", low=1.0, high=1e12, default=10000.0)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    inv_freq = base**-exponents / _linear_factor(file, prefix)  # (rotary_dim // 2,)
    if ROPE_FACTORS in file.tensors:
        inv_freq = inv_freq / _rope_factors(file, rotary_dim // 2)
    attention_factor = metadata.number(f"{prefix}.scaling.attn_factor", low=1e-3, high=1e3, default=1.0)
    return RopeParams(
        rotary_dim=rotary_dim, inv_freq=tuple(inv_freq.tolist()), attention_factor=attention_factor
    )


def _linear_factor(file: GGUFFile, prefix: str) -> float:
    """What positions are divided by; 1 where the file says nothing (or 0, as old converters wrote)."""
    metadata = file.metadata
    kind = metadata.string(f"{prefix}.scaling.type", default="linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise UnsupportedArchitecture(f"{prefix}.scaling.type is {quoted(kind)}; supported: none, linear")
    legacy = metadata.number(f"{prefix}.scale_linear", low=0.0, high=1e6, default=1.0)
    factor = metadata.number(f"{prefix}.scaling.factor", low=0.0, high=1e6, default=legacy) or 1.0
    if factor < _MIN_LINEAR_FACTOR:  # positions over it would leave the range of floats
        raise InvalidModelFile(
            f"{prefix}.scaling.factor is {factor:g}; allowed are 0 and {_MIN_LINEAR_FACTOR:g} to 1e6"
        )
    return factor


def _rope_factors(file: GGUFFile, count: int) -> NDArray[np.float64]:
    factors = read_vector(file, ROPE_FACTORS, count).astype(np.float64)
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise InvalidModelFile(f"tensor '{ROPE_FACTORS}' holds values that are not finite and positive")
    return factors
