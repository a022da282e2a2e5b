"""Qwen3, dense or with experts: RMSNorm of each q and k head before RoPE; head_dim is not dim / num_heads."""

from __future__ import annotations

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import (
    Hyperparameters,
    read_experts,
    read_hyperparameters,
)
from worker_orcd.model.architectures.rope import read_rope
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig, MoeConfig


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file)
    return _model(file, h, h.ffn())


def configure_moe(file: GGUFFile) -> ModelConfig:
    """`qwen3moe`: every layer is a mixture of experts."""
    return _model(file, read_hyperparameters(file, experts=True), read_experts(file))


def _model(file: GGUFFile, h: Hyperparameters, ffn: FfnConfig | MoeConfig) -> ModelConfig:
    layer = LayerConfig(attention=h.attention(), rope=read_rope(file, h.head_dim), ffn=ffn, head_norms=True)
    return h.model((layer,) * h.num_layers)
