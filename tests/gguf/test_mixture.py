"""Mixtures: the types that llama.cpp's quantiser chose, for every file type and tiny models of each shape.

`golden/mixtures.json` was made once with llama.cpp 0.5.0 (`llama_model_quantize`) from the tiny files of
`worker-orcd synth`: {architecture: {mixture: {type: tensors, "most": the type of the others}}}.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker_orcd.gguf.kind import FILE_TYPES
from worker_orcd.gguf.mixture import (
    ALIASES,
    MIXTURES,
    Network,
    counts,
    is_quantised,
    mixture_named,
    tensor_type,
)
from worker_orcd.synth import ARCHITECTURES, plan, shape_named

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "mixtures.json"
NETWORK = Network(num_layers=32, num_heads=32, num_kv_heads=8, tied=False)


def expected(golden: dict[str, str | list[str]], name: str) -> str:
    short = name.removesuffix(".weight").removeprefix("blk.")
    return next((kind for kind, names in golden.items() if short in names and kind != "most"), golden["most"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_types_are_those_of_llamacpp(architecture: str) -> None:
    golden = json.loads(GOLDEN.read_text())[architecture]
    assert golden.keys() == MIXTURES.keys()
    shape = shape_named(architecture, "tiny")
    assert shape is not None
    compared = 0
    for mixture in MIXTURES:
        if mixture == "MXFP4" and not shape.num_experts:
            continue  # ours differs on purpose: see below
        for tensor in plan(shape, mixture):
            name = tensor.spec.name
            if is_quantised(name, tensor.spec.shape) and "attn_qkv" not in name:
                assert tensor.type_name == expected(golden[mixture], name), (mixture, name)
                compared += 1
    assert compared > 12 * 18


def test_a_fused_qkv_has_the_type_of_published_files() -> None:
    """Phi-3's own Q4_K_M has Q5_K in every layer; llama.cpp has since changed its rule."""
    types = [tensor_type("Q4_K_M", f"blk.{n}.attn_qkv.weight", (9216, 3072), NETWORK) for n in range(32)]
    assert types == ["Q5_K"] * 32
    assert tensor_type("Q5_K_M", "blk.0.attn_qkv.weight", (9216, 3072), NETWORK) == "Q6_K"
    assert tensor_type("Q4_K_S", "blk.0.attn_qkv.weight", (9216, 3072), NETWORK) == "Q4_K"


def test_mxfp4_without_experts_is_for_the_layers() -> None:
    assert tensor_type("MXFP4", "blk.0.ffn_up.weight", (64, 64), NETWORK) == "MXFP4"
    assert tensor_type("MXFP4", "token_embd.weight", (64, 64), NETWORK) == "Q8_0"
    assert tensor_type("MXFP4", "output.weight", (64, 64), NETWORK) == "Q8_0"


def test_every_third_layer_and_the_ends_get_more_bits() -> None:
    more = [
        n
        for n in range(32)
        if tensor_type("Q4_K_M", f"blk.{n}.ffn_down.weight", (4096, 14336), NETWORK) == "Q6_K"
    ]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("mixture", "wanted"),
    [("Q4_K_M", "Q5_0"), ("Q5_K_M", "Q5_1"), ("Q6_K", "Q8_0"), ("Q2_K", "Q4_0"), ("Q3_K_S", "Q4_0")],
)
def test_rows_that_are_no_multiple_of_256(mixture: str, wanted: str) -> None:
    assert tensor_type(mixture, "blk.9.attn_q.weight", (896, 896), NETWORK) == wanted
    assert tensor_type(mixture, "output.weight", (1000, 896), NETWORK) == "Q8_0"


def test_rows_that_are_no_multiple_of_32() -> None:
    for mixture in ("Q4_K_M", "Q4_0", "Q8_0", "MXFP4", "IQ4_NL"):
        assert tensor_type(mixture, "blk.0.attn_q.weight", (80, 80), NETWORK) == "F16"
    assert tensor_type("BF16", "blk.0.attn_q.weight", (80, 80), NETWORK) == "BF16"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.attn_q.bias", (64,)),
        ("blk.0.ffn_up_exps.bias", (8, 64)),
        ("blk.0.ffn_gate_inp.weight", (8, 64)),
        ("position_embd.weight", (512, 64)),
        ("blk.0.attn_q_norm.weight", (4, 64)),
    ],
)
def test_what_no_mixture_touches(name: str, shape: tuple[int, ...]) -> None:
    for mixture in MIXTURES:
        assert tensor_type(mixture, name, shape, NETWORK) is None


def test_models_of_eight_experts_and_of_70b_have_rules_of_their_own() -> None:
    eight = Network(num_layers=32, num_heads=32, num_kv_heads=8, num_experts=8, tied=False)
    assert tensor_type("Q4_K_M", "blk.5.attn_v.weight", (1024, 4096), eight) == "Q8_0"
    assert tensor_type("Q4_K_M", "blk.5.attn_k.weight", (1024, 4096), eight) == "Q8_0"
    assert tensor_type("Q4_K_M", "blk.5.attn_output.weight", (4096, 4096), eight) == "Q5_K"
    seventy = Network(num_layers=80, num_heads=64, num_kv_heads=8, tied=False)
    values = [tensor_type("Q4_K_M", f"blk.{n}.attn_v.weight", (1024, 8192), seventy) for n in range(80)]
    assert counts(map(str, values)) == {"Q5_K": 40, "Q6_K": 40}


def test_names() -> None:
    assert mixture_named("q4_k_m") == mixture_named("Q4_K") == "Q4_K_M"
    assert mixture_named("mxfp4_moe") == "MXFP4"
    assert mixture_named("Q2_K_S") is None  # needs an importance matrix
    assert mixture_named("Q9") is None
    assert set(ALIASES.values()) <= MIXTURES.keys()
    assert all(FILE_TYPES[number][0] == name for name, number in MIXTURES.items())


def test_counts_are_ordered() -> None:
    assert list(counts(["F32", "Q4_K", "F32", "Q6_K"]).items()) == [("F32", 2), ("Q4_K", 1), ("Q6_K", 1)]
