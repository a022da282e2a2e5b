"""Qwen2 and Qwen2.5: biases on q, k and v; the smaller ones tie their embeddings."""

from __future__ import annotations

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.architectures.rope import read_rope
from worker_orcd.model.config import LayerConfig, ModelConfig


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file)
    layer = LayerConfig(attention=h.attention(), rope=read_rope(file, h.head_dim), ffn=h.ffn(), qkv_bias=True)
    return h.model((layer,) * h.num_layers)
