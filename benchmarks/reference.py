"""
The reference for logits: transformers in float32 on the dequantised weights of a GGUF file (architectures
`llama` and `gemma3`).

`python benchmarks/reference.py MODEL GOLDEN` recomputes what GOLDEN records for its prompts (the
expectations in `tests/data/golden/`): 64 greedy ids, the top-20 logits at the first position, the gap
between the two most likely tokens at every position.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import gguf

NUM_GREEDY = 64
NUM_TOP = 20


class _File:
    """A GGUF file's hyper-parameters, and its tensors in float32."""

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self.architecture: str = self._reader.fields["general.architecture"].contents()
        self.tensors = {
            t.name: torch.from_numpy(
                gguf.quants.dequantize(t.data, t.tensor_type)
                .astype(np.float32)
                .reshape([int(n) for n in t.shape[::-1]])
            )
            for t in self._reader.tensors
        }

    def value(self, key: str) -> Any:
        return self._reader.fields[f"{self.architecture}.{key}"].contents()

    def settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": self.value("embedding_length"),
            "intermediate_size": self.value("feed_forward_length"),
            "num_hidden_layers": self.value("block_count"),
            "num_attention_heads": self.value("attention.head_count"),
            "num_key_value_heads": self.value("attention.head_count_kv"),
            "rms_norm_eps": self.value("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self.value("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attn_implementation": "eager",
        }

    def state(self, names: dict[str, str], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
        """Transformers' state: `names` maps its names within a layer to the file's."""
        tensors = self.tensors
        state = {
            "model.embed_tokens.weight": tensors["token_embd.weight"],
            "model.norm.weight": change("norm", tensors["output_norm.weight"]),
            "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"]),
        }
        for i in range(self.value("block_count")):
            for theirs, ours in names.items():
                tensor = tensors[f"blk.{i}.{ours}.weight"]
                state[f"model.layers.{i}.{theirs}.weight"] = change(theirs, tensor)
        return state


_MATRICES = {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"} | {
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load_reference(path: Path) -> Any:
    """The model of the `transformers` library, architecture `llama` or `gemma3`."""
    file = _File(path)
    config, model_class, state = {"llama": _llama, "gemma3": _gemma3}[file.architecture](file)
    model = model_class(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def _llama(file: _File) -> tuple[Any, Any, Any]:
    heads = {
        "self_attn.q_proj": file.value("attention.head_count"),
        "self_attn.k_proj": file.value("attention.head_count_kv"),
    }

    def unpermuted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # GGUF stores llama's q and k rows in interleaved pairs; transformers wants halves.
        if name not in heads:
            return tensor
        rows, columns = tensor.shape
        pairs = tensor.reshape(heads[name], rows // heads[name] // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns).contiguous()

    names = _MATRICES | {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    rope = {"rope_type": "default", "rope_theta": file.value("rope.freq_base")}
    config = LlamaConfig(**file.settings(), rope_parameters=rope)
    return config, LlamaForCausalLM, file.state(names, unpermuted)


def _gemma3(file: _File) -> tuple[Any, Any, Any]:
    def without_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor - 1 if name.endswith("norm") else tensor  # the converter adds it

    names = _MATRICES | {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    head_dim = file.value("attention.key_length")
    config = Gemma3TextConfig(
        **file.settings(),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=file.value("attention.sliding_window"),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": file.value("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    return config, Gemma3ForCausalLM, file.state(names, without_one)


@torch.no_grad()
def reference_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """(len(ids), vocab_size)."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    output = model(torch.tensor([prompt_ids]), use_cache=True)
    logits, ids, gaps = output.logits[0, -1], [], []
    top = torch.topk(logits, NUM_TOP)
    first = [[int(i), round(float(v), 5)] for i, v in zip(top.indices, top.values, strict=True)]
    for _ in range(NUM_GREEDY):
        best = torch.topk(logits, 2)
        ids.append(int(best.indices[0]))
        gaps.append(round(float(best.values[0] - best.values[1]), 5))
        output = model(torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        logits = output.logits[0, -1]
    return {"out_ids": ids, "gaps": gaps, "top20": first}


def main(model_path: Path, golden_path: Path) -> None:
    torch.set_num_threads(1)
    golden = json.loads(golden_path.read_text())
    model = load_reference(model_path)
    for entry in golden["results"]:
        entry.update(greedy(model, entry["prompt_ids"]))
        print(
            entry["prompt"][:40].encode("unicode_escape").decode(),
            entry["out_ids"][:8],
            "smallest gap",
            min(entry["gaps"]),
        )
    golden_path.write_text(json.dumps(golden, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
