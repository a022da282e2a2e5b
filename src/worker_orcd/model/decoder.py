"""
The decoder-only transformer: pre-norm blocks of attention and SwiGLU, as one function from a batch to logits.

Nothing here looks inside a tensor, so the same lines run eagerly, are traced into a program, or captured in a
graph. Logits are computed for `inputs.logit_tokens` only: what follows the last attention sees those rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker_orcd.kernels.backend import Backend, BatchInputs, LayerCache, Tensor
from worker_orcd.model.config import LayerConfig, ModelConfig
from worker_orcd.model.weights import LayerWeights, Weights


class Decoder:
    """A network with its weights. Stateless: caches are handed in."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.weights = weights
        self._backend = backend

    def forward(self, inputs: BatchInputs, caches: Sequence[LayerCache]) -> Tensor:
        """(num_logits, vocab_size) float32. `caches` has one entry a layer."""
        backend, config, weights = self._backend, self.config, self.weights
        x = backend.embed(inputs.token_ids, weights.embedding)  # (num_tokens, dim)
        for layer, layer_weights, cache in zip(config.layers, weights.layers, caches, strict=True):
            x = backend.add(x, self._attention(x, inputs, cache, layer, layer_weights))
            if layer_weights is weights.layers[-1]:  # from here on tokens do not see each other
                x = backend.take(x, inputs.logit_tokens)  # (num_logits, dim)
            x = backend.add(x, self._ffn(x, layer, layer_weights))
        x = backend.rms_norm(x, weights.output_norm, config.norm_eps)
        return backend.linear(x, weights.output)

    def _attention(
        self, x: Tensor, inputs: BatchInputs, cache: LayerCache, layer: LayerConfig, weights: LayerWeights
    ) -> Tensor:
        backend, eps, params = self._backend, self.config.norm_eps, layer.attention
        q_dim = params.num_heads * params.head_dim
        kv_dim = params.num_kv_heads * params.head_dim
        x = backend.rms_norm(x, weights.attention_norm, eps)
        qkv = backend.linear(x, weights.qkv)  # (num_tokens, q_dim + 2 * kv_dim)
        q, k, v = backend.split(qkv, (q_dim, kv_dim, kv_dim))
        if weights.q_norm is not None:
            q = backend.rms_norm(q, weights.q_norm, eps)
        if weights.k_norm is not None:
            k = backend.rms_norm(k, weights.k_norm, eps)
        q = backend.rope(q, inputs.positions, layer.rope, params.head_dim)
        k = backend.rope(k, inputs.positions, layer.rope, params.head_dim)
        backend.store_kv(k, v, cache, inputs)
        attended = backend.attention(q, cache, inputs, params)  # (num_tokens, q_dim)
        return backend.linear(attended, weights.attention_output)

    def _ffn(self, x: Tensor, layer: LayerConfig, weights: LayerWeights) -> Tensor:
        backend = self._backend
        x = backend.rms_norm(x, weights.ffn_norm, self.config.norm_eps)
        gate_up = backend.linear(x, weights.gate_up)  # (num_tokens, 2 * ffn_dim)
        gate, up = backend.split(gate_up, (layer.ffn_dim, layer.ffn_dim))
        return backend.linear(backend.swiglu(gate, up), weights.down)
