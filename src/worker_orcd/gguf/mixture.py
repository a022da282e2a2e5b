"""Which tensor type each tensor of a quantised file has: the mixtures that `general.file_type` names.

The rules are those by which llama.cpp quantises without an importance matrix, so a file made here holds what
published files of the name hold. Three things decide: what a tensor is for, which layer it is in, and whether
its rows are whole blocks. Where they are not, a type of smaller blocks takes the place (Q4_K: Q5_0, Q6_K:
Q8_0), which is why most "Q4_K_M" files are a mixture of five types.

Two of its rules have changed over time; these follow what is published. A fused q, k and v is Q5_K in Q4_K_M
(as in Phi-3's files), and MXFP4 covers the matrices of every layer where a model has no experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from worker_orcd.gguf.kind import FILE_TYPES
from worker_orcd.gguf.types import TENSOR_TYPES

# Q2_K_S is for quantising with an importance matrix, which nothing here does.
MIXTURES: dict[str, int] = {
    name: number for number, (name, _main) in FILE_TYPES.items() if name != "Q2_K_S"
}  # -> general.file_type
ALIASES = {"Q2_K_M": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4_MOE": "MXFP4"}

_BLOCK_SIZES = {kind.name: kind.block_size for kind in TENSOR_TYPES.values()}
_PLAIN = ("F32", "F16", "BF16")
# What takes the place of a type whose blocks do not fit a row.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")
_NEVER = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")
_ROLES = ("attn_qkv.weight", "attn_v.weight", "attn_k.weight", "attn_output.weight", "ffn_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the rules ask about a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0
    tied: bool  # no output.weight: the embedding is the output, too

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads


def mixture_named(name: str) -> str | None:
    """The mixture of a name in any case, or of an alias that llama.cpp knows; None if there is none."""
    upper = name.upper()
    known = ALIASES.get(upper, upper)
    return known if known in MIXTURES else None


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mixture says anything about the tensor: not about vectors, norms, routers and positions."""
    return len(shape) >= 2 and name.endswith("weight") and not name.endswith(_NEVER)


def tensor_type(mixture: str, name: str, shape: tuple[int, ...], network: Network) -> str | None:
    """The type's name for a tensor of `shape` (numpy order); None: it stays as it is."""
    if not is_quantised(name, shape):
        return None
    main = FILE_TYPES[MIXTURES[mixture]][1]
    if main in _PLAIN:
        return main
    row = shape[-1]
    if name == "output.weight" or (name == "token_embd.weight" and network.tied):
        chosen = _output_type(mixture, row, main)
    elif mixture == "MXFP4":
        chosen = _mxfp4_type(name, shape, network)
    else:
        chosen = _layer_type(mixture, name, main, network) or main
    while row % _BLOCK_SIZES[chosen]:
        chosen = _FALLBACKS.get(chosen, "F16")
    return chosen


def _output_type(mixture: str, row: int, main: str) -> str:
    """The last matrix decides over every token; it gets more bits than the rest."""
    return "Q8_0" if mixture in ("Q8_0", "MXFP4") or row % _BLOCK_SIZES[main] else "Q6_K"


def _mxfp4_type(name: str, shape: tuple[int, ...], network: Network) -> str:
    in_layer = _LAYER.match(name) is not None
    return "MXFP4" if (len(shape) == 3 if network.num_experts > 1 else in_layer) else "Q8_0"


def _layer_type(mixture: str, name: str, main: str, network: Network) -> str | None:
    """What differs from the mixture's main type."""
    match = _LAYER.match(name)
    role = next((role for role in _ROLES if role in name), None)
    if match is None or role is None:
        return None
    layer = int(match[1])
    eight = network.num_experts == 8  # of Mixtral: there, attention is small and worth its bits
    if eight and role in ("attn_v.weight", "attn_k.weight", "attn_qkv.weight"):
        return "Q8_0"
    if role == "attn_v.weight":
        chosen = _value_type(mixture, layer, network) or main
        # Llama's 70B: eight heads share a small attn_v.
        seventy = network.num_layers == 80 and network.heads_per_kv_head > 1
        return "Q5_K" if seventy and chosen in ("Q3_K", "Q4_K") else chosen
    if role == "ffn_down":
        return _down_type(mixture, layer, network.num_layers)
    if role == "attn_output.weight":
        if eight:
            return "Q5_K" if mixture.startswith(("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K", "IQ4_NL")) else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture)
    if role == "attn_qkv.weight":
        return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(mixture)
    return None


def _value_type(mixture: str, layer: int, network: Network) -> str | None:
    shared = network.heads_per_kv_head >= 4
    if mixture == "Q2_K":
        return "Q4_K" if shared else "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mixture == "Q3_K_L" or (mixture == "IQ4_NL" and shared):
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, network.num_layers):
        return "Q6_K"
    return "Q5_K" if mixture == "Q4_K_S" and layer < 4 else None


def _down_type(mixture: str, layer: int, num_layers: int) -> str | None:
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    if mixture == "Q3_K_L":
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, num_layers):
        return "Q6_K"
    return "Q5_K" if mixture in ("Q4_K_S", "IQ4_NL") and layer < num_layers // 8 else None


def _more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    first = num_layers // 8
    return layer < first or layer >= 7 * num_layers // 8 or (layer - first) % 3 == 2


def counts(types: Iterable[str]) -> dict[str, int]:
    """How many tensors there are of each type, most first."""
    found: dict[str, int] = {}
    for name in types:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
