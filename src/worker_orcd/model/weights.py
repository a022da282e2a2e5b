"""
Loads the tensors of a decoder through a backend, in the layout that `decoder.Decoder` computes with.

Matrices with the same input are one fused weight (q, k and v; gate and up), whatever their formats. The rows
of llama's interleaved q and k are reordered as bytes, so that kernels know only half-split RoPE; a row is
never decoded here. Vectors (gains, biases) become float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Backend, Matrix, Tensor, Weight
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig, MoeConfig, Norm
from worker_orcd.model.tensors import (
    EMBEDDING,
    OUTPUT,
    OUTPUT_NORM,
    POSITIONS,
    check_tensor,
    check_tensors,
    format_of,
    read_rows,
    read_vector,
)

Scalar = TypeVar("Scalar", bound=np.generic)
Progress = Callable[[float], None]  # the fraction of tensor bytes loaded, 0 … 1, never falling


@dataclass(frozen=True, slots=True)
class NormWeights:
    gain: Tensor
    bias: Tensor | None = None  # of a LayerNorm


@dataclass(frozen=True, slots=True)
class DenseWeights:
    up: Weight  # outputs: gate, up; or up alone
    down: Weight


@dataclass(frozen=True, slots=True)
class MoeWeights:
    router: Weight
    gate_up: Weight  # of `expert_linear`: two outputs
    down: Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """What is None, the layer does not have."""

    attention_norm: NormWeights
    qkv: Weight  # outputs: q, k, v
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    sinks: Tensor | None
    attention_output: Weight
    post_attention_norm: NormWeights | None
    ffn_norm: NormWeights
    ffn: DenseWeights | MoeWeights
    post_ffn_norm: NormWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All a decoder multiplies by, packed by the backend that will compute."""

    embedding: Weight
    positions: Weight | None  # a row a position
    layers: tuple[LayerWeights, ...]
    output_norm: NormWeights
    output: Weight  # the embedding itself where the file ties them


def load_weights(
    file: GGUFFile,
    config: ModelConfig,
    backend: Backend,
    on_progress: Progress = lambda _fraction: None,
    *,
    forget: bool = False,
) -> Weights:
    """Pack every tensor of the file. The file may be closed afterwards.

    `forget`: what is packed leaves the machine's page cache. Where cache and packed weights have no room side
    by side, the system would otherwise drop what is oldest there: of this very file, what is yet to be read.

    Raises InvalidModelFile, UnsupportedFormat or InsufficientMemory.
    """
    check_tensors(file, config)
    return _Loader(file, config, backend, on_progress, forget).load()


def deinterleave(rows: NDArray[Scalar], num_heads: int, rotary_dim: int) -> NDArray[Scalar]:
    """Rows of q or k from interleaved rotary pairs (2i, 2i + 1) to half-split (i, i + rotary_dim / 2).

    (num_heads * head_dim, …) → the same shape, a copy. Rows beyond `rotary_dim` of each head stay in place.
    """
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])  # (num_heads, head_dim, …)
    rotary = heads[:, :rotary_dim]
    return np.concatenate((rotary[:, 0::2], rotary[:, 1::2], heads[:, rotary_dim:]), axis=1).reshape(
        rows.shape
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a fused weight: its outputs, and how its rows are stored."""

    name: str  # without ".weight"
    n: int
    bias: bool = False
    interleaved_heads: int = 0  # 0: rows are as kernels want them
    rotary_dim: int = 0


class _Loader:
    def __init__(
        self, file: GGUFFile, config: ModelConfig, backend: Backend, on_progress: Progress, forget: bool
    ) -> None:
        self._file = file
        self._config = config
        self._backend = backend
        self._on_progress = on_progress
        self._forget = forget
        self._total_bytes = max(1, sum(info.nbytes for info in file.tensors.values()))
        self._loaded_bytes = 0

    def load(self) -> Weights:
        config, backend = self._config, self._backend
        self._on_progress(0.0)
        embedding = backend.embedding(self._matrix(EMBEDDING, config.vocab_size, config.dim))
        self._loaded(EMBEDDING)
        positions = None
        if config.learned_positions:
            positions = backend.embedding(self._matrix(POSITIONS, config.context_length, config.dim))
            self._loaded(POSITIONS)
        layers = tuple(self._layer(f"blk.{index}", layer) for index, layer in enumerate(config.layers))
        output = embedding
        if not config.tied_embeddings:
            output = backend.matrix([self._matrix(OUTPUT, config.vocab_size, config.dim)])
            self._loaded(OUTPUT)
        output_norm = self._norm(OUTPUT_NORM)
        self._on_progress(1.0)
        return Weights(
            embedding=embedding, positions=positions, layers=layers, output_norm=output_norm, output=output
        )

    def _layer(self, prefix: str, layer: LayerConfig) -> LayerWeights:
        dim, attention = self._config.dim, layer.attention
        norms, post = layer.head_norms, layer.post_norms
        output = _Part(f"{prefix}.attn_output", dim, bias=layer.output_bias)
        return LayerWeights(
            attention_norm=self._norm(f"{prefix}.attn_norm"),
            qkv=self._fused(_qkv_parts(prefix, layer), dim, head_dim=_whole_heads(layer)),
            q_norm=self._head_norm(f"{prefix}.attn_q_norm", attention.head_dim) if norms else None,
            k_norm=self._head_norm(f"{prefix}.attn_k_norm", attention.head_dim) if norms else None,
            sinks=self._vector(f"{prefix}.attn_sinks.weight", attention.num_heads) if layer.sinks else None,
            attention_output=self._fused([output], attention.num_heads * attention.head_dim),
            post_attention_norm=self._norm(f"{prefix}.post_attention_norm") if post else None,
            ffn_norm=self._norm(f"{prefix}.{layer.ffn_norm}"),
            ffn=self._ffn(prefix, layer.ffn),
            post_ffn_norm=self._norm(f"{prefix}.post_ffw_norm") if post else None,
        )

    def _ffn(self, prefix: str, ffn: FfnConfig | MoeConfig) -> DenseWeights | MoeWeights:
        dim, bias = self._config.dim, ffn.bias
        if isinstance(ffn, MoeConfig):
            gate, up, down = (f"{prefix}.ffn_{name}_exps" for name in ("gate", "up", "down"))
            return MoeWeights(
                router=self._fused([_Part(f"{prefix}.ffn_gate_inp", ffn.num_experts, bias)], dim),
                gate_up=self._experts([_Part(gate, ffn.dim, bias), _Part(up, ffn.dim, bias)], dim, ffn),
                down=self._experts([_Part(down, dim, bias)], ffn.dim, ffn),
            )
        parts = [_Part(f"{prefix}.ffn_up", ffn.dim, bias)]
        if ffn.fused:
            parts = [_Part(f"{prefix}.ffn_up", 2 * ffn.dim, bias)]
        elif ffn.glu is not None:
            parts.insert(0, _Part(f"{prefix}.ffn_gate", ffn.dim, bias))
        down = self._fused([_Part(f"{prefix}.ffn_down", dim, bias)], ffn.dim)
        return DenseWeights(self._fused(parts, dim, gated=ffn.glu is not None), down)

    def _fused(self, parts: Sequence[_Part], k: int, *, gated: bool = False, head_dim: int = 0) -> Weight:
        """Pack matrices of `k` inputs as one weight; outputs in the order of `parts`."""
        matrices: list[Matrix] = []
        biases: list[NDArray[np.float32] | None] = []
        for part in parts:
            matrix = self._matrix(f"{part.name}.weight", part.n, k)
            bias = read_vector(self._file, f"{part.name}.bias", part.n) if part.bias else None
            if part.interleaved_heads:
                rows = deinterleave(matrix.data, part.interleaved_heads, part.rotary_dim)
                matrix = replace(matrix, data=rows)
                if bias is not None:
                    bias = deinterleave(bias, part.interleaved_heads, part.rotary_dim)
            matrices.append(matrix)
            biases.append(bias)
        bias = biases if any(part.bias for part in parts) else ()
        weight = self._backend.matrix(matrices, bias, gated=gated, head_dim=head_dim)
        for part in parts:
            self._loaded(f"{part.name}.weight")
        return weight

    def _experts(self, parts: Sequence[_Part], k: int, moe: MoeConfig) -> Weight:
        """Pack matrices of `k` inputs, one of each part for each expert."""
        matrices: list[Matrix] = []
        biases: list[NDArray[np.float32] | None] = []
        for part in parts:
            name = f"{part.name}.weight"
            info = check_tensor(self._file, name, (moe.num_experts, part.n, k))
            data = self._file.rows(name)  # (num_experts * n, row_bytes)
            matrices.append(Matrix(name=name, format=format_of(info), n=part.n, k=k, data=data))
            bias_name = f"{part.name}.bias"
            biases.append(read_rows(self._file, bias_name, (moe.num_experts, part.n)) if part.bias else None)
        weight = self._backend.experts(matrices, moe.num_experts, biases if moe.bias else ())
        for part in parts:
            self._loaded(f"{part.name}.weight")
        return weight

    def _matrix(self, name: str, n: int, k: int) -> Matrix:
        info = check_tensor(self._file, name, (n, k))
        return Matrix(name=name, format=format_of(info), n=n, k=k, data=self._file.rows(name))

    def _norm(self, name: str) -> NormWeights:
        dim = self._config.dim
        bias = self._vector(f"{name}.bias", dim) if self._config.norm is Norm.LAYER else None
        return NormWeights(self._vector(f"{name}.weight", dim), bias)

    def _head_norm(self, name: str, head_dim: int) -> NormWeights:
        return NormWeights(self._vector(f"{name}.weight", head_dim))

    def _vector(self, name: str, length: int) -> Tensor:
        values = self._backend.vector(read_vector(self._file, name, length))
        self._loaded(name)
        return values

    def _loaded(self, name: str) -> None:
        """The backend has its copy: forget the file's pages, so that a file larger than memory loads."""
        self._file.release(name, forget=self._forget)
        self._loaded_bytes += self._file.tensors[name].nbytes
        self._on_progress(min(1.0, self._loaded_bytes / self._total_bytes))


def _whole_heads(layer: LayerConfig) -> int:
    """The columns of a head, if nothing but rotating all of them stands between the product and the cache."""
    head_dim = layer.attention.head_dim
    turned = layer.rope is None or layer.rope.rotary_dim == head_dim
    return head_dim if turned and not layer.head_norms else 0


def _qkv_parts(prefix: str, layer: LayerConfig) -> list[_Part]:
    attention = layer.attention
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads, "v": attention.num_kv_heads}
    if layer.fused_qkv:
        width = sum(heads.values()) * attention.head_dim
        return [_Part(f"{prefix}.attn_qkv", width, bias=layer.qkv_bias)]
    return [
        _Part(
            name=f"{prefix}.attn_{letter}",
            n=num_heads * attention.head_dim,
            bias=layer.qkv_bias,
            interleaved_heads=num_heads if layer.permuted_qk and letter != "v" else 0,
            rotary_dim=0 if layer.rope is None else layer.rope.rotary_dim,
        )
        for letter, num_heads in heads.items()
    ]
