"""What an architecture adapter says about a model: data, no code."""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.kernels.backend import AttentionParams, RopeParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder block. Layers may differ, so nothing else asks for a layer's number."""

    attention: AttentionParams
    rope: RopeParams
    ffn_dim: int
    qkv_bias: bool = False
    head_norms: bool = False  # RMSNorm of each q and k head before RoPE (qwen3)
    permuted_qk: bool = False  # q and k rows are stored interleaved (llama): un-permute at load


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer as the runner needs it."""

    architecture: str
    name: str  # general.name, for people
    vocab_size: int
    dim: int
    context_length: int  # what it was trained for
    norm_eps: float
    tied_embeddings: bool
    layers: tuple[LayerConfig, ...]
    unused_tensors: frozenset[str] = frozenset()  # names the file may hold and nothing reads
