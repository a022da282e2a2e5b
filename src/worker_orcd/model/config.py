"""What an architecture adapter says about a model: data, no code."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from worker_orcd.kernels.backend import AttentionParams, Glu, RopeParams


class Norm(enum.Enum):
    RMS = "rms"  # a gain
    LAYER = "layer"  # a gain and a bias


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnConfig:
    """A dense feed-forward: gated (gate, up, down), or up, GELU, down where `glu` is None."""

    dim: int
    glu: Glu | None = Glu.SWIGLU
    bias: bool = False  # of all its matrices
    fused: bool = False  # gate and up are one tensor, ffn_up: gate first (phi3)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A mixture of experts: a router picks `top_k` of `num_experts` gated feed-forwards for each token.

    The softmax is over the chosen logits, which is also what normalising the chosen of all gives (qwen3moe).
    """

    dim: int  # of one expert
    num_experts: int
    top_k: int
    glu: Glu = Glu.SWIGLU
    bias: bool = False  # of the router and of all experts


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder block. Layers may differ, so nothing else asks for a layer's number."""

    attention: AttentionParams
    ffn: FfnConfig | MoeConfig
    rope: RopeParams | None
    long_rope: RopeParams | None = None  # instead of `rope` where longer contexts are served
    fused_qkv: bool = False  # q, k and v are one tensor (phi3, gpt2)
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False  # RMSNorm of each q and k head before RoPE (qwen3, gemma3)
    sinks: bool = False  # one learned score a head (gpt-oss)
    post_norms: bool = False  # a norm of what attention and feed-forward give, before it is added (gemma3)
    ffn_norm: str = "ffn_norm"  # the tensor's name
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
    norm: Norm = Norm.RMS
    learned_positions: bool = False  # a table of `context_length` rows is added to the embedding (gpt2)
    embedding_scale: float = 1.0  # multiplies the embedding (gemma3)
    original_context_length: int | None = None  # contexts longer than this use `long_rope`
    unused_tensors: frozenset[str] = frozenset()  # names the file may hold and nothing reads

    @property
    def cache_groups(self) -> tuple[int | None, ...]:
        """The windows that its layers have: None (they see everything) first, then the largest first.

        Layers of one window need the KV cache of the same positions, so they share block numbers.
        """
        windows = {layer.attention.window for layer in self.layers}
        return tuple(sorted(windows, key=lambda window: (window is not None, -(window or 0))))

    def serving(self, max_model_len: int) -> ModelConfig:
        """The same model for contexts of up to `max_model_len` tokens: here long RoPE factors are chosen.

        Once, by what is served and never by a request, so that the same request gets the same answer.
        """
        if self.original_context_length is None or max_model_len <= self.original_context_length:
            return self
        return replace(
            self, layers=tuple(replace(layer, rope=layer.long_rope or layer.rope) for layer in self.layers)
        )
