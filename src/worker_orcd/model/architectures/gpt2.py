"""GPT-2: LayerNorm, learned positions instead of RoPE, GELU, biases everywhere; q, k and v are one tensor."""

from __future__ import annotations

from dataclasses import replace

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig, Norm


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file, norm="layer_norm_epsilon")
    layer = LayerConfig(
        attention=h.attention(),
        rope=None,
        ffn=FfnConfig(dim=h.ffn_dim, glu=None, bias=True),
        fused_qkv=True,
        qkv_bias=True,
        output_bias=True,
    )
    return replace(h.model((layer,) * h.num_layers), norm=Norm.LAYER, learned_positions=True)
