"""
The reference for logits: transformers in float32 on the dequantised weights of a GGUF file (architecture
`llama`).

`python benchmarks/reference.py MODEL GOLDEN` recomputes what GOLDEN records for its prompts (the
expectations in `tests/data/golden/`): 64 greedy ids, the top-20 logits at the first position, the gap
between the two most likely tokens at every position.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

import gguf

NUM_GREEDY = 64
NUM_TOP = 20


def load_reference(path: Path) -> LlamaForCausalLM:
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    tensors = {
        t.name: torch.from_numpy(
            gguf.quants.dequantize(t.data, t.tensor_type)
            .astype(np.float32)
            .reshape([int(n) for n in t.shape[::-1]])
        )
        for t in reader.tensors
    }
    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")

    def unpermuted(weight: torch.Tensor, n: int) -> torch.Tensor:
        # GGUF stores llama's q and k rows in interleaved pairs; transformers wants halves.
        rows, columns = weight.shape
        return (
            weight.reshape(n, rows // n // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns).contiguous()
        )

    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"]),
    }
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(value("block_count")):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for their_name, our_name in names.items():
            state[f"{theirs}{their_name}.weight"] = tensors[f"{ours}{our_name}.weight"]
        state[f"{theirs}self_attn.q_proj.weight"] = unpermuted(tensors[f"{ours}attn_q.weight"], heads)
        state[f"{theirs}self_attn.k_proj.weight"] = unpermuted(tensors[f"{ours}attn_k.weight"], kv_heads)
    config = LlamaConfig(
        vocab_size=state["lm_head.weight"].shape[0],
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        max_position_embeddings=value("context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def reference_logits(model: LlamaForCausalLM, ids: list[int]) -> NDArray[np.float32]:
    """(len(ids), vocab_size)."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt_ids: list[int]) -> dict[str, Any]:
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
