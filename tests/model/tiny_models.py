"""Tiny random models: a GGUF file as converters write it, and its twin in transformers with equal weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gguf.quants
import numpy as np
from numpy.typing import NDArray

from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.kernels.backend import Backend
from worker_orcd.model.architectures import configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import load_weights
from worker_orcd.runner.plan import make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner

Array = NDArray[np.float32]

# Formats by the last part of a tensor's name, so that fused groups are mixtures; the rest is F32.
MIXED = {
    "token_embd": GGMLType.Q8_0,
    "output": GGMLType.Q5_0,
    "attn_q": GGMLType.Q8_0,
    "attn_k": GGMLType.F16,
    "attn_v": GGMLType.Q4_1,
    "ffn_gate": GGMLType.Q4_0,
    "ffn_up": GGMLType.Q8_0,
    "ffn_down": GGMLType.Q5_1,
    "attn_norm": GGMLType.F16,
    "attn_qkv": GGMLType.Q5_1,
    "position_embd": GGMLType.Q8_0,
    "ffn_gate_exps": GGMLType.MXFP4,
    "ffn_up_exps": GGMLType.Q8_0,
    "ffn_down_exps": GGMLType.MXFP4,
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What is written. The defaults make a plain model in which no two widths are equal."""

    architecture: str
    layers: int = 2
    dim: int = 96
    ffn: int = 160
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 320
    context: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0
    tied: bool = False
    qkv_bias: bool = False
    head_norms: bool = False
    rope_linear: float | None = None
    rope_llama3: bool = False
    rope_long: bool = False
    window: int | None = None
    formats: dict[str, GGMLType] = field(default_factory=lambda: dict(MIXED))
    seed: int = 1
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])  # replaces keys; None leaves one out


MODELS = {
    "llama": Tiny(architecture="llama", tied=True, eps=0.03),  # an epsilon that shows
    "llama-bias": Tiny(architecture="llama", qkv_bias=True),
    "llama3": Tiny(architecture="llama", rope_base=500000.0, rope_llama3=True),
    "llama-linear": Tiny(architecture="llama", rope_linear=4.0),
    "mistral": Tiny(architecture="llama", window=64),
    "qwen2": Tiny(architecture="qwen2", qkv_bias=True, tied=True, eps=1e-6, rope_base=1e6),
    "qwen2-untied": Tiny(architecture="qwen2", qkv_bias=True, eps=1e-6, rope_base=1e6),
    "qwen3": Tiny(architecture="qwen3", head_norms=True, head_dim=32, eps=1e-6, rope_base=1e6),
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ORIGINAL_CONTEXT = 64


def interleave(rows: Array, heads: int) -> Array:
    """The order in which converters store q and k of `llama`: (half, pair) becomes (pair, half)."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def llama3_factors(head_dim: int, base: float) -> Array:
    """`rope_freqs.weight` as Llama 3's converter computes it from the model's configuration."""
    low = LLAMA3_ORIGINAL_CONTEXT / LLAMA3_ROPE["low_freq_factor"]
    high = LLAMA3_ORIGINAL_CONTEXT / LLAMA3_ROPE["high_freq_factor"]
    factors: list[float] = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(LLAMA3_ROPE["factor"])
        else:
            smooth = (LLAMA3_ORIGINAL_CONTEXT / wavelength - LLAMA3_ROPE["low_freq_factor"]) / (
                LLAMA3_ROPE["high_freq_factor"] - LLAMA3_ROPE["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / LLAMA3_ROPE["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


class TinyFile:
    """Writes the file of a `Tiny` and keeps the dequantised weights under transformers' names.

    For llama, mistral, qwen2 and qwen3; `tiny_variants` has the others.
    """

    # Names of the twin.
    embedding, final_norm, block = "model.embed_tokens", "model.norm", "model.layers."
    norms: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.state: dict[str, Array] = {}
        self.tensors: dict[str, tuple[Array, GGMLType]] = {}  # as stored; a test may change it before writing
        self._rng = np.random.default_rng(tiny.seed)
        self._make()

    def write(self, path: Path) -> Path:
        with GGUFWriter(path) as writer:
            for key, value in (self.metadata() | self.tiny.metadata).items():
                if value is not None:
                    writer.add(key, value)
            for name, (values, kind) in self.tensors.items():
                data = gguf.quants.quantize(values, kind)
                writer.add_tensor(name, values.shape, int(kind), np.ascontiguousarray(data).view(np.uint8))
        return path

    def metadata(self) -> dict[str, Any]:
        tiny, prefix = self.tiny, self.tiny.architecture
        values: dict[str, Any] = {
            "general.architecture": prefix,
            "general.name": f"tiny {prefix}",
            f"{prefix}.block_count": tiny.layers,
            f"{prefix}.context_length": tiny.context,
            f"{prefix}.embedding_length": tiny.dim,
            f"{prefix}.feed_forward_length": tiny.ffn,
            f"{prefix}.attention.head_count": tiny.heads,
            f"{prefix}.attention.head_count_kv": tiny.kv_heads,
            f"{prefix}.attention.layer_norm_rms_epsilon": tiny.eps,
            f"{prefix}.rope.freq_base": tiny.rope_base,
            "tokenizer.ggml.tokens": [f"t{index}" for index in range(tiny.vocab)],
        }
        if tiny.head_dim * tiny.heads != tiny.dim:
            values[f"{prefix}.attention.key_length"] = tiny.head_dim
            values[f"{prefix}.attention.value_length"] = tiny.head_dim
        if tiny.rope_linear is not None:
            values[f"{prefix}.rope.scaling.type"] = "linear"
            values[f"{prefix}.rope.scaling.factor"] = tiny.rope_linear
        if tiny.window is not None:
            values[f"{prefix}.attention.sliding_window"] = tiny.window
        return values

    def _make(self) -> None:
        tiny = self.tiny
        if tiny.rope_llama3:
            factors = llama3_factors(tiny.head_dim, tiny.rope_base)
            self.tensors["rope_freqs.weight"] = (factors, GGMLType.F32)
        self._matrix("token_embd", self.embedding, tiny.vocab, tiny.dim, scale=1.0)
        self._vector("output_norm.weight", f"{self.final_norm}.weight", 1 + 0.2 * self._normal(tiny.dim))
        if tiny.tied:
            self.state["lm_head.weight"] = self.state[f"{self.embedding}.weight"]
        else:
            self._matrix("output", "lm_head", tiny.vocab, tiny.dim)
        for index in range(tiny.layers):
            self._layer(f"blk.{index}.", f"{self.block}{index}.")

    def _layer(self, ours: str, theirs: str) -> None:
        for name, twin in self.norms.items():
            gain = 1 + 0.2 * self._normal(self.tiny.dim)
            self._vector(f"{ours}{name}.weight", f"{theirs}{twin}.weight", gain)
        self._attention(ours, theirs)
        self._ffn(ours, theirs)

    def _attention(self, ours: str, theirs: str) -> None:
        tiny = self.tiny
        q_dim, kv_dim = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
        for letter, heads, n in (("q", tiny.heads, q_dim), ("k", tiny.kv_heads, kv_dim), ("v", 0, kv_dim)):
            permuted = heads if tiny.architecture == "llama" else 0
            twin = f"{theirs}self_attn.{letter}_proj"
            self._matrix(
                f"{ours}attn_{letter}", twin, n, tiny.dim, permuted=permuted, scale=3 / tiny.dim**0.5
            )
            if tiny.qkv_bias:
                self._vector(f"{ours}attn_{letter}.bias", f"{twin}.bias", self._normal(n), permuted)
            if tiny.head_norms and letter != "v":
                gain = 1 + 0.2 * self._normal(tiny.head_dim)
                self._vector(
                    f"{ours}attn_{letter}_norm.weight", f"{theirs}self_attn.{letter}_norm.weight", gain
                )
        self._matrix(f"{ours}attn_output", f"{theirs}self_attn.o_proj", tiny.dim, q_dim)

    def _ffn(self, ours: str, theirs: str) -> None:
        tiny = self.tiny
        self._matrix(f"{ours}ffn_gate", f"{theirs}mlp.gate_proj", tiny.ffn, tiny.dim)
        self._matrix(f"{ours}ffn_up", f"{theirs}mlp.up_proj", tiny.ffn, tiny.dim)
        self._matrix(f"{ours}ffn_down", f"{theirs}mlp.down_proj", tiny.dim, tiny.ffn)

    def _normal(self, *shape: int) -> Array:
        return self._rng.standard_normal(shape).astype(np.float32)

    def _vector(self, name: str, twin: str, values: Array, permuted: int = 0) -> None:
        self._add(name, twin, values, permuted)

    def _matrix(
        self, name: str, twin: str, n: int, k: int, permuted: int = 0, scale: float | None = None
    ) -> None:
        values = self._normal(n, k) * np.float32(k**-0.5 if scale is None else scale)
        self._add(f"{name}.weight", f"{twin}.weight", values, permuted)

    def _add(self, name: str, twin: str, values: Array, permuted: int) -> None:
        kind = (
            self.tiny.formats.get(name.split(".")[-2], GGMLType.F32)
            if name.endswith("weight")
            else GGMLType.F32
        )
        self.state[twin] = self._store(name, interleave(values, permuted) if permuted else values, kind)
        if permuted:
            self.state[twin] = decoded(values, kind)

    def _store(self, name: str, values: Array, kind: GGMLType) -> Array:
        """Put a tensor into the file; what a reader will decode."""
        self.tensors[name] = (values, kind)
        return decoded(values, kind)

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        """The configuration and the class of the twin."""
        tiny = self.tiny
        if tiny.architecture == "qwen2":
            return transformers.Qwen2Config(**settings), transformers.Qwen2ForCausalLM
        if tiny.architecture == "qwen3":
            return transformers.Qwen3Config(**settings), transformers.Qwen3ForCausalLM
        if tiny.window is not None:
            settings["sliding_window"] = tiny.window
            return transformers.MistralConfig(**settings), transformers.MistralForCausalLM
        settings["attention_bias"] = tiny.qkv_bias
        return transformers.LlamaConfig(**settings), transformers.LlamaForCausalLM

    def twin(self) -> tuple[Any, Any]:
        import transformers

        tiny = self.tiny
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": tiny.rope_base}
        if tiny.rope_linear is not None:
            rope |= {"rope_type": "linear", "factor": tiny.rope_linear}
        if tiny.rope_llama3:
            rope |= LLAMA3_ROPE | {
                "rope_type": "llama3",
                "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
            }
        settings: dict[str, Any] = {
            "vocab_size": tiny.vocab,
            "hidden_size": tiny.dim,
            "intermediate_size": tiny.ffn,
            "num_hidden_layers": tiny.layers,
            "num_attention_heads": tiny.heads,
            "num_key_value_heads": tiny.kv_heads,
            "head_dim": tiny.head_dim,
            "rms_norm_eps": tiny.eps,
            "rope_parameters": rope,
            "max_position_embeddings": tiny.context,
            "tie_word_embeddings": tiny.tied,
            "attn_implementation": "eager",
        }
        return self._twin(transformers, settings)


def decoded(values: Array, kind: GGMLType) -> Array:
    """What is left of the values once they are stored as `kind`."""
    return (
        gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        .astype(np.float32)
        .reshape(values.shape)
    )


def twin_logits(file: TinyFile, token_ids: list[int]) -> Array:
    """(len(token_ids), vocab): what transformers computes with the same weights in float32."""
    import torch

    config, model_class = file.twin()
    state = {name: torch.from_numpy(np.array(values)) for name, values in file.state.items()}
    with torch.no_grad():
        model = model_class(config).eval().float()
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or not all(name.endswith("o_proj.bias") for name in missing):
            raise AssertionError(f"missing {missing}, unexpected {unexpected}")
        for name in missing:
            model.get_parameter(name).zero_()
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()


def load_runner(
    path: Path,
    backend: Backend,
    engine: EngineConfig | None = None,
    change: Callable[[ModelConfig], ModelConfig] = lambda config: config,
) -> ModelRunner:
    """Everything from the file to a runner, as the worker does it; 8 MiB of KV cache at least.

    `change`: what the network is to compute instead of what the file says.
    """
    engine = engine or EngineConfig(max_num_seqs=64, max_num_batched_tokens=512)
    with GGUFFile(path) as file:
        config = configure(file)
        plan = make_plan(config, tensor_bytes(file), backend, engine, DeviceConfig(), 1 << 30)
        config = change(config.serving(plan.max_model_len))
        weights = load_weights(file, config, backend)
    return ModelRunner(Decoder(config, weights, backend), backend, plan, engine)
