"""
Phi-3 and Phi-3.5: q, k and v are one tensor, gate and up another; the window, where there is one, is of every
layer; longer variants have two sets of RoPE factors.

Which set serves is decided by the context that the worker serves (`ModelConfig.serving`), so a short request
gets the same answer whatever its length. The window is honoured as the model defines it (llama.cpp ignores
it).
"""

from __future__ import annotations

from dataclasses import replace

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.architectures.rope import (
    LONG_FACTORS,
    SHORT_FACTORS,
    read_original_context,
    read_rope,
)
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig

_KINDS = ("none", "linear", "longrope")


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file, may_slide=True)
    is_long = LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors
    short, long = (SHORT_FACTORS, LONG_FACTORS) if is_long else (None, None)
    layer = LayerConfig(
        attention=h.attention(),
        rope=read_rope(file, h.head_dim, kinds=_KINDS, factors=short),
        long_rope=read_rope(file, h.head_dim, kinds=_KINDS, factors=long) if is_long else None,
        ffn=FfnConfig(dim=h.ffn_dim, fused=True),
        fused_qkv=True,
    )
    model = h.model((layer,) * h.num_layers, unused_tensors=frozenset({LONG_FACTORS, SHORT_FACTORS}))
    return replace(model, original_context_length=read_original_context(file)) if is_long else model
