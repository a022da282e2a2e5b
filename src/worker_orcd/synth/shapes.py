"""The shapes of known models, as their configurations state them, and a tiny one for each architecture.

A tiny shape keeps what makes its architecture different (rows that are no multiple of 256, heads wider than
the embedding, more experts than are used, windows and scaled positions that a short prompt reaches) and
computes in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

TINY = "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a network. Where `num_experts` is 0 every layer has one feed-forward of `ffn_dim`."""

    architecture: str
    vocabulary: str  # a key of `vocabulary.VOCABULARIES`
    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied: bool
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    window: int | None = None
    num_experts: int = 0
    num_experts_used: int = 0
    expert_dim: int = 0  # the feed-forward of one expert
    rope_factor: float | None = None  # YaRN (gpt-oss) or Llama 3's scaling of positions
    original_context: int | None = None  # the context that it stretches


_QWEN25_05B = Shape(
    architecture="qwen2",
    vocabulary="qwen2",
    num_layers=24,
    dim=896,
    ffn_dim=4864,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=151936,
    context_length=32768,
    tied=True,
    norm_eps=1e-6,
    rope_base=1e6,
)
_QWEN3_06B = Shape(
    architecture="qwen3",
    vocabulary="qwen2",
    num_layers=28,
    dim=1024,
    ffn_dim=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    context_length=40960,
    tied=True,
    norm_eps=1e-6,
    rope_base=1e6,
)
_QWEN3_30B_A3B = Shape(
    architecture="qwen3moe",
    vocabulary="qwen2",
    num_layers=48,
    dim=2048,
    ffn_dim=6144,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    context_length=40960,
    tied=False,
    norm_eps=1e-6,
    rope_base=1e6,
    num_experts=128,
    num_experts_used=8,
    expert_dim=768,
)
_LLAMA32_1B = Shape(
    architecture="llama",
    vocabulary="llama3",
    num_layers=16,
    dim=2048,
    ffn_dim=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=128256,
    context_length=131072,
    tied=True,
    rope_base=500000.0,
    rope_factor=32.0,
    original_context=8192,
)
_SMOLLM2_135M = Shape(
    architecture="llama",
    vocabulary="smollm",
    num_layers=30,
    dim=576,
    ffn_dim=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    context_length=8192,
    tied=True,
    rope_base=100000.0,
)
_GPT2 = Shape(
    architecture="gpt2",
    vocabulary="gpt2",
    num_layers=12,
    dim=768,
    ffn_dim=3072,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    vocab_size=50257,
    context_length=1024,
    tied=True,
)
_PHI3_MINI = Shape(
    architecture="phi3",
    vocabulary="phi3",
    num_layers=32,
    dim=3072,
    ffn_dim=8192,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    vocab_size=32064,
    context_length=4096,
    tied=False,
    window=2047,
    original_context=4096,
)
_GEMMA3_270M = Shape(
    architecture="gemma3",
    vocabulary="gemma3",
    num_layers=18,
    dim=640,
    ffn_dim=2048,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    vocab_size=262144,
    context_length=32768,
    tied=True,
    norm_eps=1e-6,
    rope_base=1e6,
    window=512,
)


def _gpt_oss(num_layers: int, num_experts: int) -> Shape:
    return Shape(
        architecture="gpt-oss",
        vocabulary="gpt-oss",
        num_layers=num_layers,
        dim=2880,
        ffn_dim=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=201088,
        context_length=131072,
        tied=False,
        rope_base=150000.0,
        window=128,
        num_experts=num_experts,
        num_experts_used=4,
        expert_dim=2880,
        rope_factor=32.0,
        original_context=4096,
    )


SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": _QWEN25_05B,
    "qwen3-0.6b": _QWEN3_06B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "llama-3.2-1b": _LLAMA32_1B,
    "smollm2-135m": _SMOLLM2_135M,
    "gpt2": _GPT2,
    "phi-3-mini": _PHI3_MINI,
    "gemma3-270m": _GEMMA3_270M,
    "gpt-oss-20b": _gpt_oss(num_layers=24, num_experts=32),
    "gpt-oss-120b": _gpt_oss(num_layers=36, num_experts=128),
}

_TINY: dict[str, Shape] = {
    "llama": Shape(
        architecture="llama",
        vocabulary="llama3",
        num_layers=4,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=640,
        context_length=4096,
        tied=True,
        rope_base=500000.0,
        rope_factor=32.0,
        original_context=128,
    ),
    "qwen2": Shape(
        architecture="qwen2",
        vocabulary="qwen2",
        num_layers=4,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=640,
        context_length=1024,
        tied=True,
        norm_eps=1e-6,
        rope_base=1e6,
    ),
    "qwen3": Shape(
        architecture="qwen3",
        vocabulary="qwen2",
        num_layers=4,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=640,
        context_length=1024,
        tied=True,
        norm_eps=1e-6,
        rope_base=1e6,
    ),
    "qwen3moe": Shape(
        architecture="qwen3moe",
        vocabulary="qwen2",
        num_layers=4,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=640,
        context_length=1024,
        tied=False,
        norm_eps=1e-6,
        rope_base=1e6,
        num_experts=16,
        num_experts_used=4,
        expert_dim=256,
    ),
    "gpt2": Shape(
        architecture="gpt2",
        vocabulary="gpt2",
        num_layers=4,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=640,
        context_length=512,
        tied=True,
    ),
    "phi3": Shape(
        architecture="phi3",
        vocabulary="phi3",
        num_layers=4,
        dim=768,
        ffn_dim=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=96,
        vocab_size=640,
        context_length=512,
        tied=False,
        window=64,
        original_context=512,
    ),
    "gemma3": Shape(
        architecture="gemma3",
        vocabulary="gemma3",
        num_layers=7,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        vocab_size=640,
        context_length=1024,
        tied=True,
        norm_eps=1e-6,
        rope_base=1e6,
        window=32,
    ),
    "gpt-oss": Shape(
        architecture="gpt-oss",
        vocabulary="gpt-oss",
        num_layers=4,
        dim=96,
        ffn_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=640,
        context_length=4096,
        tied=False,
        rope_base=150000.0,
        window=32,
        num_experts=16,
        num_experts_used=4,
        expert_dim=96,
        rope_factor=32.0,
        original_context=128,
    ),
}

ARCHITECTURES = tuple(_TINY)


def shape_named(architecture: str, name: str) -> Shape | None:
    """The shape `name` of an architecture; None where it has none of that name."""
    shape = _TINY.get(architecture) if name == TINY else SHAPES.get(name)
    return shape if shape is not None and shape.architecture == architecture else None


def shapes_of(architecture: str) -> list[str]:
    """The names that `shape_named` knows."""
    return [TINY, *(name for name, shape in SHAPES.items() if shape.architecture == architecture)]
