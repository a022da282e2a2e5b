"""
The tiny models of the other architectures: each as its converter writes it, and its twin.

A variant overrides what differs. Sizes are chosen so that nothing can be confused: no two widths are equal,
windows are shorter than the prompts, sinks weigh as much as keys, and what is clamped exceeds its clamp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from tiny_models import Array, Tiny, TinyFile

from gguf import GGMLQuantizationType as GGMLType

EXPERTS, TOP_K, EXPERT_FFN = 8, 3, 64
ORIGINAL_CONTEXT = 64  # of YaRN and longrope: shorter than the prompts
YARN_FACTOR, LONG_SCALE = 32.0, 8.0

VARIANTS = {
    "qwen3moe": Tiny(architecture="qwen3moe", head_norms=True, head_dim=32, eps=1e-6, rope_base=1e6),
    "phi3": Tiny(architecture="phi3"),
    "phi3-window": Tiny(architecture="phi3", window=64),
    "phi3-long": Tiny(architecture="phi3", rope_long=True),
    "gpt-oss": Tiny(architecture="gpt-oss", layers=4, window=32, head_dim=32, rope_base=150000.0),
    "gpt2": Tiny(architecture="gpt2", kv_heads=6, tied=True, eps=0.03),
    "gemma3": Tiny(architecture="gemma3", layers=7, window=40, head_dim=32, head_norms=True, tied=True),
    "gemma3-linear": Tiny(
        architecture="gemma3", layers=7, window=40, head_dim=32, head_norms=True, tied=True, rope_linear=8.0
    ),
}


def tiny_file(tiny: Tiny) -> TinyFile:
    return _CLASSES.get(tiny.architecture, TinyFile)(tiny)


class _Experts(TinyFile):
    """A mixture of experts in place of the dense feed-forward."""

    def metadata(self) -> dict[str, Any]:
        prefix = self.tiny.architecture
        return super().metadata() | {
            f"{prefix}.expert_count": EXPERTS,
            f"{prefix}.expert_used_count": TOP_K,
            f"{prefix}.expert_feed_forward_length": EXPERT_FFN,
        }

    def _stack(self, name: str, n: int, k: int, scale: float) -> Array:
        """A matrix of each expert, stored; the decoded values: (experts, n, k)."""
        values = self._normal(EXPERTS, n, k) * np.float32(scale * k**-0.5)
        kind = self.tiny.formats.get(name.split(".")[-1], GGMLType.F32)
        return self._store(f"{name}.weight", values, kind)


class Qwen3Moe(_Experts):
    def _ffn(self, ours: str, theirs: str) -> None:
        dim = self.tiny.dim
        self._matrix(f"{ours}ffn_gate_inp", f"{theirs}mlp.gate", EXPERTS, dim, scale=2 * dim**-0.5)
        gate = self._stack(f"{ours}ffn_gate_exps", EXPERT_FFN, dim, 1.0)
        up = self._stack(f"{ours}ffn_up_exps", EXPERT_FFN, dim, 1.0)
        self.state[f"{theirs}mlp.experts.gate_up_proj"] = np.concatenate((gate, up), axis=1)
        self.state[f"{theirs}mlp.experts.down_proj"] = self._stack(
            f"{ours}ffn_down_exps", dim, EXPERT_FFN, 1.0
        )

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        config = transformers.Qwen3MoeConfig(
            **settings,
            moe_intermediate_size=EXPERT_FFN,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        )
        return config, transformers.Qwen3MoeForCausalLM


class GptOss(_Experts):
    norms: ClassVar = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {
            "gpt-oss.rope.scaling.type": "yarn",
            "gpt-oss.rope.scaling.factor": YARN_FACTOR,
            "gpt-oss.rope.scaling.original_context_length": ORIGINAL_CONTEXT,
        }

    def _attention(self, ours: str, theirs: str) -> None:
        super()._attention(ours, theirs)
        tiny = self.tiny
        for letter, heads in (("q", tiny.heads), ("k", tiny.kv_heads), ("v", tiny.kv_heads)):
            self._vector(
                f"{ours}attn_{letter}.bias",
                f"{theirs}self_attn.{letter}_proj.bias",
                self._normal(heads * tiny.head_dim),
            )
        self._vector(f"{ours}attn_output.bias", f"{theirs}self_attn.o_proj.bias", self._normal(tiny.dim))
        self._vector(f"{ours}attn_sinks.weight", f"{theirs}self_attn.sinks", 3 + 2 * self._normal(tiny.heads))

    def _ffn(self, ours: str, theirs: str) -> None:
        dim = self.tiny.dim
        self._matrix(f"{ours}ffn_gate_inp", f"{theirs}mlp.router", EXPERTS, dim, scale=2 * dim**-0.5)
        self._vector(f"{ours}ffn_gate_inp.bias", f"{theirs}mlp.router.bias", self._normal(EXPERTS))
        stacks: dict[str, Array] = {}
        biases: dict[str, Array] = {}
        for name, n, k in (("gate", EXPERT_FFN, dim), ("up", EXPERT_FFN, dim), ("down", dim, EXPERT_FFN)):
            # Gates and ups of which some exceed the clamp at 7.
            stacks[name] = self._stack(f"{ours}ffn_{name}_exps", n, k, 1.0 if name == "down" else 4.0)
            bias = self._normal(EXPERTS, n)
            biases[name] = self._store(f"{ours}ffn_{name}_exps.bias", bias, GGMLType.F32)
        gate_up = np.stack((stacks["gate"], stacks["up"]), axis=2)  # (experts, ffn, 2, dim): gate is even
        experts = f"{theirs}mlp.experts."
        self.state[f"{experts}gate_up_proj"] = gate_up.reshape(EXPERTS, 2 * EXPERT_FFN, dim).swapaxes(1, 2)
        self.state[f"{experts}gate_up_proj_bias"] = np.stack((biases["gate"], biases["up"]), 2).reshape(
            EXPERTS, -1
        )
        self.state[f"{experts}down_proj"] = stacks["down"].swapaxes(1, 2)
        self.state[f"{experts}down_proj_bias"] = biases["down"]

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        settings["intermediate_size"] = EXPERT_FFN
        settings["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": self.tiny.rope_base,
            "factor": YARN_FACTOR,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        }
        config = transformers.GptOssConfig(
            **settings,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            sliding_window=self.tiny.window,
        )
        return config, transformers.GptOssForCausalLM


class Phi3(TinyFile):
    def metadata(self) -> dict[str, Any]:
        values = super().metadata() | {"phi3.rope.dimension_count": self.tiny.head_dim}
        if self.tiny.rope_long:
            values["phi3.rope.scaling.type"] = "longrope"
            values["phi3.rope.scaling.original_context_length"] = ORIGINAL_CONTEXT
            values["phi3.rope.scaling.attn_factor"] = math.sqrt(
                1 + math.log(LONG_SCALE) / math.log(ORIGINAL_CONTEXT)
            )
        return values

    def _make(self) -> None:
        super()._make()
        if self.tiny.rope_long:
            half = self.tiny.head_dim // 2
            self.factors = {
                "short": np.linspace(1.0, 1.5, half, dtype=np.float32),
                "long": np.linspace(1.0, 9.0, half, dtype=np.float32),
            }
            for name, values in self.factors.items():
                self.tensors[f"rope_factors_{name}.weight"] = (values, GGMLType.F32)

    def _attention(self, ours: str, theirs: str) -> None:
        tiny = self.tiny
        width = (tiny.heads + 2 * tiny.kv_heads) * tiny.head_dim
        self._matrix(f"{ours}attn_qkv", f"{theirs}self_attn.qkv_proj", width, tiny.dim)
        self._matrix(f"{ours}attn_output", f"{theirs}self_attn.o_proj", tiny.dim, tiny.heads * tiny.head_dim)

    def _ffn(self, ours: str, theirs: str) -> None:
        tiny = self.tiny
        self._matrix(f"{ours}ffn_up", f"{theirs}mlp.gate_up_proj", 2 * tiny.ffn, tiny.dim)
        self._matrix(f"{ours}ffn_down", f"{theirs}mlp.down_proj", tiny.dim, tiny.ffn)

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        settings |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
        settings["sliding_window"] = self.tiny.window
        if self.tiny.rope_long:
            settings["original_max_position_embeddings"] = ORIGINAL_CONTEXT
            settings["rope_parameters"] = {
                "rope_type": "longrope",
                "rope_theta": self.tiny.rope_base,
                "factor": LONG_SCALE,
                "original_max_position_embeddings": ORIGINAL_CONTEXT,
                "short_factor": self.factors["short"].tolist(),
                "long_factor": self.factors["long"].tolist(),
            }
        return transformers.Phi3Config(**settings), transformers.Phi3ForCausalLM


class Gpt2(TinyFile):
    embedding, final_norm = "transformer.wte", "transformer.ln_f"
    block = "transformer.h."
    norms: ClassVar = {"attn_norm": "ln_1", "ffn_norm": "ln_2"}

    def metadata(self) -> dict[str, Any]:
        values = super().metadata()
        values["gpt2.attention.layer_norm_epsilon"] = values.pop("gpt2.attention.layer_norm_rms_epsilon")
        return values

    def _make(self) -> None:
        super()._make()
        tiny = self.tiny
        self._matrix("position_embd", "transformer.wpe", tiny.context, tiny.dim, scale=0.5)
        self._vector("output_norm.bias", "transformer.ln_f.bias", self._normal(tiny.dim))

    def _attention(self, ours: str, theirs: str) -> None:
        dim = self.tiny.dim
        for name in ("ln_1", "ln_2"):
            where = {"ln_1": "attn_norm", "ln_2": "ffn_norm"}[name]
            self._vector(f"{ours}{where}.bias", f"{theirs}{name}.bias", self._normal(dim))
        self._conv(f"{ours}attn_qkv", f"{theirs}attn.c_attn", 3 * dim, dim)
        self._conv(f"{ours}attn_output", f"{theirs}attn.c_proj", dim, dim)

    def _ffn(self, ours: str, theirs: str) -> None:
        tiny = self.tiny
        self._conv(f"{ours}ffn_up", f"{theirs}mlp.c_fc", tiny.ffn, tiny.dim)
        self._conv(f"{ours}ffn_down", f"{theirs}mlp.c_proj", tiny.dim, tiny.ffn)

    def _conv(self, name: str, twin: str, n: int, k: int) -> None:
        """A matrix that transformers holds transposed, and its bias."""
        self._matrix(name, twin, n, k)
        self.state[f"{twin}.weight"] = self.state[f"{twin}.weight"].T
        self._vector(f"{name}.bias", f"{twin}.bias", self._normal(n))

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        tiny = self.tiny
        config = transformers.GPT2Config(
            vocab_size=tiny.vocab,
            n_positions=tiny.context,
            n_embd=tiny.dim,
            n_layer=tiny.layers,
            n_head=tiny.heads,
            n_inner=tiny.ffn,
            layer_norm_epsilon=tiny.eps,
            attn_implementation="eager",
            bos_token_id=1,
            eos_token_id=1,
        )
        return config, transformers.GPT2LMHeadModel


class Gemma3(TinyFile):
    norms: ClassVar = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }

    def __init__(self, tiny: Tiny) -> None:
        super().__init__(replace(tiny, rope_base=1e6))
        for name in self.state:
            if "norm" in name:
                self.state[name] = self.state[name] - 1  # what the converter adds

    def _twin(self, transformers: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
        tiny = self.tiny
        settings["rope_parameters"] = {
            "full_attention": settings["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
        config = transformers.Gemma3TextConfig(
            **settings,
            sliding_window=tiny.window,
            query_pre_attn_scalar=tiny.head_dim,
            hidden_activation="gelu_pytorch_tanh",
            layer_types=[
                "full_attention" if (index + 1) % 6 == 0 else "sliding_attention"
                for index in range(tiny.layers)
            ],
        )
        return config, transformers.Gemma3ForCausalLM


_CLASSES: dict[str, type[TinyFile]] = {
    "qwen3moe": Qwen3Moe,
    "gpt-oss": GptOss,
    "phi3": Phi3,
    "gpt2": Gpt2,
    "gemma3": Gemma3,
}
