"""Qwen3, dense: RMSNorm of each q and k head before RoPE; head_dim is not dim / num_heads."""

from __future__ import annotations

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.config import LayerConfig, ModelConfig


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file)
    layer = LayerConfig(attention=h.attention(), rope=h.rope, ffn_dim=h.ffn_dim, head_norms=True)
    return h.model((layer,) * h.num_layers)
