"""
The decoder-only transformer: blocks of attention and a feed-forward, as one function from a batch to logits.

Nothing here looks inside a tensor, so the same lines run eagerly, are traced into a program, or captured in a
graph. Logits are computed for `inputs.logit_tokens` only: what follows the last attention sees those rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import Backend, BatchInputs, LayerCache, Tensor
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig, MoeConfig
from worker_orcd.model.weights import DenseWeights, LayerWeights, MoeWeights, NormWeights, Weights


class Decoder:
    """A network with its weights. Stateless: caches are handed in."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.weights = weights
        self._backend = backend

    def forward(self, inputs: BatchInputs, caches: Sequence[LayerCache]) -> Tensor:
        """(num_logits, vocab_size) float32. `caches` has one entry a layer."""
        backend, weights = self._backend, self.weights
        x = self._embed(inputs)  # (num_tokens, dim)
        for layer, layer_weights, cache in zip(self.config.layers, weights.layers, caches, strict=True):
            x = backend.add(x, self._attention(x, inputs, cache, layer, layer_weights))
            if layer_weights is weights.layers[-1]:  # from here on tokens do not see each other
                x = backend.take(x, inputs.logit_tokens)  # (num_logits, dim)
            x = backend.add(x, self._ffn(x, layer, layer_weights))
        x = self._norm(x, weights.output_norm)
        return backend.linear(x, weights.output)

    def _embed(self, inputs: BatchInputs) -> Tensor:
        backend, weights = self._backend, self.weights
        x = backend.embed(inputs.token_ids, weights.embedding)
        if self.config.embedding_scale != 1.0:
            x = backend.scale(x, self.config.embedding_scale)
        if weights.positions is not None:
            x = backend.add(x, backend.embed(inputs.positions, weights.positions))
        return x

    def _norm(self, x: Tensor, norm: NormWeights) -> Tensor:
        if norm.bias is None:
            return self._backend.rms_norm(x, norm.gain, self.config.norm_eps)
        return self._backend.layer_norm(x, norm.gain, norm.bias, self.config.norm_eps)

    def _attention(
        self, x: Tensor, inputs: BatchInputs, cache: LayerCache, layer: LayerConfig, weights: LayerWeights
    ) -> Tensor:
        backend, params = self._backend, layer.attention
        q_dim = params.num_heads * params.head_dim
        kv_dim = params.num_kv_heads * params.head_dim
        qkv = backend.linear(self._norm(x, weights.attention_norm), weights.qkv)
        q, k, v = backend.split(qkv, (q_dim, kv_dim, kv_dim))  # (num_tokens, …) each
        if weights.q_norm is not None:
            q = self._norm(q, weights.q_norm)
        if weights.k_norm is not None:
            k = self._norm(k, weights.k_norm)
        if layer.rope is not None:
            q = backend.rope(q, inputs.positions, layer.rope, params.head_dim)
            k = backend.rope(k, inputs.positions, layer.rope, params.head_dim)
        backend.store_kv(k, v, cache, inputs)
        attended = backend.attention(q, cache, inputs, params, weights.sinks)  # (num_tokens, q_dim)
        out = backend.linear(attended, weights.attention_output)
        return out if weights.post_attention_norm is None else self._norm(out, weights.post_attention_norm)

    def _ffn(self, x: Tensor, layer: LayerConfig, weights: LayerWeights) -> Tensor:
        x = self._norm(x, weights.ffn_norm)
        match layer.ffn, weights.ffn:
            case FfnConfig() as dense, DenseWeights() as dense_weights:
                out = self._dense(x, dense, dense_weights)
            case MoeConfig() as moe, MoeWeights() as moe_weights:
                out = self._experts(x, moe, moe_weights)
            case _:
                raise Internal("a layer's weights are not of its kind")
        return out if weights.post_ffn_norm is None else self._norm(out, weights.post_ffn_norm)

    def _dense(self, x: Tensor, ffn: FfnConfig, weights: DenseWeights) -> Tensor:
        backend = self._backend
        hidden = backend.linear(x, weights.up)
        if ffn.glu is None:
            return backend.linear(backend.gelu(hidden), weights.down)
        gate, up = backend.split(hidden, (ffn.dim, ffn.dim))  # (num_tokens, ffn.dim) each
        return backend.linear(backend.glu(ffn.glu, gate, up), weights.down)

    def _experts(self, x: Tensor, moe: MoeConfig, weights: MoeWeights) -> Tensor:
        backend = self._backend
        routing = backend.route(backend.linear(x, weights.router), moe.top_k)
        gate, up = backend.expert_linear(x, weights.gate_up, routing)  # (num_tokens, top_k * moe.dim) each
        (out,) = backend.expert_linear(backend.glu(moe.glu, gate, up), weights.down, routing)
        return backend.combine(out, routing)
