"""
Gemma 3, its text part: norms before and after attention and feed-forward, norms of heads, GEGLU, a scaled
embedding; five layers of six slide and have a RoPE base of their own, unscaled.

The files' gains are one higher than the model's own (llama.cpp's converter adds it).
"""

from __future__ import annotations

from dataclasses import replace

from worker_orcd.errors import UnsupportedArchitecture
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Glu
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.architectures.rope import frequencies, read_rope, rope_params
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig

_PERIOD = 6  # the last layer of a period sees everything
_LAYERS_27B = 62


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file, may_slide=True)
    metadata = file.metadata
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if found := metadata.number(f"gemma3.{key}", low=0.0, high=1e6, default=0.0):
            raise UnsupportedArchitecture(f"gemma3.{key} is {found:g}; supported: 0")
    global_rope = read_rope(file, h.head_dim)
    local_base = metadata.number("gemma3.rope.freq_base_swa", low=1.0, high=1e12, default=10000.0)
    local_rope = rope_params(frequencies(local_base, global_rope.rotary_dim))
    period = metadata.integer("gemma3.attention.sliding_window_pattern", low=1, default=_PERIOD)
    # The model's query_pre_attn_scalar is not in the file: the head's width, but for the largest model.
    scale = (h.dim / h.num_heads if h.num_layers == _LAYERS_27B else h.head_dim) ** -0.5
    layers: list[LayerConfig] = []
    for index in range(h.num_layers):
        slides = (index + 1) % period != 0
        layers.append(
            LayerConfig(
                attention=replace(h.attention(slides=slides), scale=scale),
                rope=local_rope if slides else global_rope,
                ffn=FfnConfig(dim=h.ffn_dim, glu=Glu.GEGLU),
                head_norms=True,
                post_norms=True,
            )
        )
    return replace(h.model(tuple(layers)), embedding_scale=h.dim**0.5)
