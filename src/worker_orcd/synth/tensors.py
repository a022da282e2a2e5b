"""Which tensors a file of each architecture holds, and how large their random values are.

Names and shapes (numpy order) are those of llama.cpp's converter. The sizes keep activations near one: a
matrix over k inputs has the standard deviation 1/sqrt(k); what is added to the residual stream is smaller by
sqrt(2 layers), so that all layers together add about what the embedding began with; norms are near one;
logits have a standard deviation of about two. Where the embedding is the output, too, the last norm has
gains of either sign: otherwise each token would be followed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker_orcd.synth.shapes import Shape

LOGIT_STD = 2.0
NORM_STD = 0.1
BIAS_STD = 0.1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Values are drawn with `mean` and `std`, unless `values` gives them."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    values: NDArray[np.float32] | None = None


def tensor_specs(shape: Shape) -> list[TensorSpec]:
    """All tensors of a model, in file order."""
    logit_std = LOGIT_STD / math.sqrt(shape.dim)
    stream = logit_std if shape.tied else 1.0  # what the residual stream begins with
    specs = [
        TensorSpec("token_embd.weight", (shape.vocab_size, shape.dim), stream),
        *_position_tensors(shape, stream),
        *_output_norm(shape),
    ]
    if not shape.tied:
        specs.append(TensorSpec("output.weight", (shape.vocab_size, shape.dim), logit_std))
    added = stream / math.sqrt(2 * shape.num_layers)
    for index in range(shape.num_layers):
        for spec in _layer(shape, added):
            specs.append(TensorSpec(f"blk.{index}.{spec.name}", spec.shape, spec.std, spec.mean))
    return specs


def _output_norm(shape: Shape) -> Iterator[TensorSpec]:
    weight, *bias = _norm("output_norm", shape.dim, with_bias=shape.architecture == "gpt2")
    yield TensorSpec(weight.name, weight.shape, 1.0) if shape.tied else weight
    yield from bias


def _position_tensors(shape: Shape, stream: float) -> Iterator[TensorSpec]:
    if shape.architecture == "gpt2":
        yield TensorSpec("position_embd.weight", (shape.context_length, shape.dim), stream / 2)
    if shape.architecture == "llama" and shape.rope_factor is not None:
        factors = llama3_factors(shape)
        yield TensorSpec("rope_freqs.weight", factors.shape, 0.0, values=factors)


def llama3_factors(shape: Shape) -> NDArray[np.float32]:
    """(head_dim / 2,): what Llama 3.1 divides its frequencies by: 1 for short waves, `rope_factor` for long
    ones, and between (1/4 to 1 of the original context) what leads from the one to the other.
    """
    factor, original = shape.rope_factor or 1.0, shape.original_context or shape.context_length
    pairs = np.arange(0, shape.head_dim, 2, dtype=np.float64)  # (head_dim / 2,)
    waves = 2 * math.pi * shape.rope_base ** (pairs / shape.head_dim) / original
    smooth = np.clip((1 / waves - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _layer(shape: Shape, added: float) -> Iterator[TensorSpec]:
    """The tensors of one layer, without `blk.N.`; `added`: the size of what it adds to the stream."""
    architecture = shape.architecture
    yield from _norm("attn_norm", shape.dim, with_bias=architecture == "gpt2")
    yield from _attention(shape, added)
    if architecture == "gemma3":
        yield from _norm("post_attention_norm", shape.dim)
    yield from _norm(
        "post_attention_norm" if architecture == "gpt-oss" else "ffn_norm",
        shape.dim,
        with_bias=architecture == "gpt2",
    )
    yield from _experts(shape, added) if shape.num_experts else _feed_forward(shape, added)
    if architecture == "gemma3":
        yield from _norm("post_ffw_norm", shape.dim)


def _attention(shape: Shape, added: float) -> Iterator[TensorSpec]:
    q_dim, kv_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    architecture = shape.architecture
    if architecture in ("gpt2", "phi3"):
        fused = q_dim + 2 * kv_dim
        yield from _matrix("attn_qkv", fused, shape.dim, with_bias=architecture == "gpt2")
    else:
        for letter, rows in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            yield from _matrix(
                f"attn_{letter}", rows, shape.dim, with_bias=architecture in ("qwen2", "gpt-oss")
            )
    if architecture in ("qwen3", "qwen3moe", "gemma3"):
        yield from _norm("attn_q_norm", shape.head_dim)
        yield from _norm("attn_k_norm", shape.head_dim)
    if architecture == "gpt-oss":
        yield TensorSpec("attn_sinks.weight", (shape.num_heads,), 1.0)
    has_bias = architecture in ("gpt2", "gpt-oss")
    yield from _matrix("attn_output", shape.dim, q_dim, size=added, with_bias=has_bias)


def _feed_forward(shape: Shape, added: float) -> Iterator[TensorSpec]:
    has_bias = shape.architecture == "gpt2"
    if shape.architecture == "phi3":
        yield from _matrix("ffn_up", 2 * shape.ffn_dim, shape.dim)  # gate, then up
    else:
        if shape.architecture != "gpt2":
            yield from _matrix("ffn_gate", shape.ffn_dim, shape.dim)
        yield from _matrix("ffn_up", shape.ffn_dim, shape.dim, with_bias=has_bias)
    yield from _matrix("ffn_down", shape.dim, shape.ffn_dim, size=added, with_bias=has_bias)


def _experts(shape: Shape, added: float) -> Iterator[TensorSpec]:
    has_bias = shape.architecture == "gpt-oss"
    experts, dim, inner = shape.num_experts, shape.dim, shape.expert_dim
    yield from _matrix("ffn_gate_inp", experts, dim, with_bias=has_bias)
    for name, rows, columns, size in (
        ("ffn_gate_exps", inner, dim, 1.0),
        ("ffn_up_exps", inner, dim, 1.0),
        ("ffn_down_exps", dim, inner, added),
    ):
        yield TensorSpec(f"{name}.weight", (experts, rows, columns), size / math.sqrt(columns))
        if has_bias:
            yield TensorSpec(f"{name}.bias", (experts, rows), BIAS_STD * size)


def _matrix(
    name: str, rows: int, columns: int, *, size: float = 1.0, with_bias: bool = False
) -> Iterator[TensorSpec]:
    """`size`: the standard deviation of its outputs for inputs of one."""
    yield TensorSpec(f"{name}.weight", (rows, columns), size / math.sqrt(columns))
    if with_bias:
        yield TensorSpec(f"{name}.bias", (rows,), BIAS_STD * size)


def _norm(name: str, width: int, *, with_bias: bool = False) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (width,), NORM_STD, mean=1.0)
    if with_bias:
        yield TensorSpec(f"{name}.bias", (width,), BIAS_STD)
