"""
The Llama family: Llama 1 to 3, SmolLM2, Mistral.

GGUF stores the rows of q and k interleaved for these (see `weights.deinterleave`), and Llama 3's RoPE scaling
as a tensor of factors. Some members have biases on q, k and v.
"""

from __future__ import annotations

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures.hyperparameters import read_hyperparameters
from worker_orcd.model.architectures.rope import read_rope
from worker_orcd.model.config import LayerConfig, ModelConfig
from worker_orcd.model.tensors import ROPE_FACTORS


def configure(file: GGUFFile) -> ModelConfig:
    h = read_hyperparameters(file, may_slide=True)
    layer = LayerConfig(
        attention=h.attention(),
        rope=read_rope(file, h.head_dim, factors=ROPE_FACTORS if ROPE_FACTORS in file.tensors else None),
        ffn=h.ffn(),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        permuted_qk=True,
    )
    return h.model((layer,) * h.num_layers, unused_tensors=frozenset({ROPE_FACTORS}))
