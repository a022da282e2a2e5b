"""
GPT-OSS: a mixture of experts with biases and clamped SwiGLU, attention sinks, a sliding window in every other
layer (even ones slide), YaRN.

YaRN's range of dimensions is not rounded to whole ones, as in the model's own implementation
(openai/gpt-oss, torch/model.py); llama.cpp rounds it.
"""

from __future__ import annotations

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Glu
from worker_orcd.model.architectures.hyperparameters import read_experts, read_hyperparameters
from worker_orcd.model.architectures.rope import read_rope
from worker_orcd.model.config import LayerConfig, ModelConfig


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file, may_slide=True, experts=True)
    rope = read_rope(file, h.head_dim, truncate=False)
    experts = read_experts(file, glu=Glu.CLAMPED_SWIGLU, bias=True)
    layers = (
        LayerConfig(
            attention=h.attention(slides=index % 2 == 0),
            rope=rope,
            ffn=experts,
            qkv_bias=True,
            output_bias=True,
            sinks=True,
            ffn_norm="post_attention_norm",
        )
        for index in range(h.num_layers)
    )
    return h.model(tuple(layers))
