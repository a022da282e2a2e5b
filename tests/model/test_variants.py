"""What is particular to an architecture: which layers slide, how RoPE is scaled, which experts there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import MODELS, Tiny
from tiny_variants import (
    EXPERT_FFN,
    EXPERTS,
    LONG_SCALE,
    ORIGINAL_CONTEXT,
    TOP_K,
    VARIANTS,
    YARN_FACTOR,
    Phi3,
    tiny_file,
)

from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.errors import InvalidModelFile, LoadError, UnsupportedArchitecture
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Glu
from worker_orcd.model.architectures import configure
from worker_orcd.model.architectures.rope import frequencies, read_rope
from worker_orcd.model.config import FfnConfig, ModelConfig, MoeConfig, Norm


def configured(tiny: Tiny, directory: Path, **metadata: Any) -> ModelConfig:
    changes = {key.replace("__", "."): value for key, value in metadata.items()}
    file = tiny_file(replace(tiny, metadata=changes))
    with GGUFFile(file.write(directory / "tiny.gguf")) as opened:
        return configure(opened)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.attention.window for layer in config.layers]


def test_every_other_layer_of_gpt_oss_slides(tmp_path: Path):
    config = configured(VARIANTS["gpt-oss"], tmp_path)
    assert windows(config) == [32, None, 32, None]
    assert all(layer.sinks and layer.output_bias and layer.qkv_bias for layer in config.layers)
    assert config.layers[0].ffn == MoeConfig(
        dim=EXPERT_FFN, num_experts=EXPERTS, top_k=TOP_K, glu=Glu.CLAMPED_SWIGLU, bias=True
    )
    wide = configured(VARIANTS["gpt-oss"], tmp_path, **{"gpt-oss.attention.sliding_window": 4096})
    assert windows(wide) == [None] * 4  # longer than the context: it never bites


def test_one_layer_in_six_of_gemma_sees_everything(tmp_path: Path):
    config = configured(VARIANTS["gemma3"], tmp_path)
    assert windows(config) == [40] * 5 + [None] + [40]
    local, everywhere = config.layers[0].rope, config.layers[5].rope
    assert local is not None and everywhere is not None
    assert local.inv_freq == pytest.approx(frequencies(10000.0, 32).tolist())
    assert everywhere.inv_freq == pytest.approx(frequencies(1e6, 32).tolist())
    assert config.embedding_scale == pytest.approx(96**0.5)
    assert config.layers[0].attention.scale == pytest.approx(32**-0.5)
    every_third = configured(VARIANTS["gemma3"], tmp_path, gemma3__attention__sliding_window_pattern=3)
    assert windows(every_third) == [40, 40, None] * 2 + [40]
    other = configured(VARIANTS["gemma3"], tmp_path, gemma3__rope__freq_base_swa=50000.0)
    assert other.layers[0].rope.inv_freq == pytest.approx(frequencies(50000.0, 32).tolist())


def test_the_linear_factor_of_gemma_is_of_the_layers_that_see_everything(tmp_path: Path):
    plain = configured(VARIANTS["gemma3"], tmp_path)
    scaled = configured(VARIANTS["gemma3-linear"], tmp_path)
    assert scaled.layers[0].rope == plain.layers[0].rope
    assert scaled.layers[5].rope.inv_freq == pytest.approx(
        [value / 8 for value in plain.layers[5].rope.inv_freq]
    )


def test_the_largest_gemma_scales_by_its_width(tmp_path: Path):
    tiny = replace(VARIANTS["gemma3"], layers=62, dim=64, ffn=32, heads=1, kv_heads=1, vocab=32)
    assert configured(tiny, tmp_path).layers[0].attention.scale == pytest.approx(64**-0.5)


def test_gpt2_has_no_rope_and_learns_its_positions(tmp_path: Path):
    config = configured(VARIANTS["gpt2"], tmp_path)
    assert (config.norm, config.learned_positions) == (Norm.LAYER, True)
    assert {layer.rope for layer in config.layers} == {None}
    assert config.layers[0].ffn == FfnConfig(dim=160, glu=None, bias=True)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_that_of_transformers(truncate: bool, tmp_path: Path):
    import torch
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tiny = replace(VARIANTS["gpt-oss"], head_dim=64)
    twin = GptOssConfig(
        head_dim=64,
        max_position_embeddings=int(YARN_FACTOR * ORIGINAL_CONTEXT),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": tiny.rope_base,
            "factor": YARN_FACTOR,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": truncate,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        },
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](twin, torch.device("cpu"))
    with GGUFFile(tiny_file(tiny).write(tmp_path / "tiny.gguf")) as file:
        found = read_rope(file, 64, truncate=truncate)
    assert found.inv_freq == pytest.approx(expected.tolist(), rel=1e-6)
    assert found.attention_factor == pytest.approx(factor)
    assert found.inv_freq != pytest.approx(frequencies(tiny.rope_base, 64).tolist())


def test_gpt_oss_does_not_truncate(tmp_path: Path):
    path = tiny_file(VARIANTS["gpt-oss"]).write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as file:
        rope = configure(file).layers[0].rope
        assert rope == read_rope(file, 32, truncate=False)
        assert rope != read_rope(file, 32, truncate=True)


def test_yarn_keeps_what_turns_often_and_divides_what_hardly_turns(tmp_path: Path):
    path = tiny_file(replace(VARIANTS["gpt-oss"], head_dim=64)).write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as file:
        found = np.array(read_rope(file, 64, truncate=True).inv_freq)
    plain = frequencies(150000.0, 64)
    assert found[0] == plain[0]
    assert found[-1] == pytest.approx(plain[-1] / YARN_FACTOR)
    assert np.all(np.diff(found) < 0)


def test_long_factors_are_chosen_by_what_is_served(tmp_path: Path):
    config = configured(VARIANTS["phi3-long"], tmp_path)
    file = Phi3(VARIANTS["phi3-long"])
    plain = frequencies(10000.0, 16)
    assert config.original_context_length == ORIGINAL_CONTEXT
    for served, name in ((1, "short"), (ORIGINAL_CONTEXT, "short"), (ORIGINAL_CONTEXT + 1, "long")):
        for layer in config.serving(served).layers:
            assert layer.rope is not None
            assert layer.rope.inv_freq == pytest.approx((plain / file.factors[name]).tolist())
            expected = (1 + np.log(LONG_SCALE) / np.log(ORIGINAL_CONTEXT)) ** 0.5
            assert layer.rope.attention_factor == pytest.approx(expected)
    plain_config = configured(VARIANTS["phi3"], tmp_path)
    assert plain_config.serving(512) == plain_config


def test_the_window_of_phi3_is_of_every_layer(tmp_path: Path):
    assert windows(configured(VARIANTS["phi3-window"], tmp_path)) == [64, 64]


@pytest.mark.parametrize(
    ("name", "key", "value", "error", "message"),
    [
        ("gpt-oss", "expert_count", 0, InvalidModelFile, r"gpt-oss\.expert_count"),
        ("gpt-oss", "expert_count", 7, InvalidModelFile, r"ffn_gate_inp.*\(8, 96\); expected \(7, 96\)"),
        ("gpt-oss", "expert_used_count", 9, InvalidModelFile, r"expert_used_count.* 9.* 1 to 8"),
        ("gpt-oss", "expert_used_count", None, InvalidModelFile, r"expert_used_count.* missing"),
        ("gpt-oss", "expert_feed_forward_length", 32, InvalidModelFile, r"ffn_gate_exps.* expected \(8, 32"),
        ("qwen3moe", "expert_shared_count", 1, UnsupportedArchitecture, r"expert_shared_count is 1"),
        ("qwen3moe", "attention.sliding_window", 64, UnsupportedArchitecture, r"sliding_window is 64"),
        ("gpt-oss", "rope.scaling.original_context_length", None, InvalidModelFile, r"original_context_len"),
        ("gpt-oss", "rope.freq_base", 1.0, InvalidModelFile, r"freq_base is 1, with which yarn"),
        ("gpt-oss", "rope.scaling.yarn_beta_fast", 0.0, InvalidModelFile, r"yarn_beta_fast"),
        ("phi3", "rope.scaling.type", "yarn", UnsupportedArchitecture, r"supported: none, linear, longrope"),
        (
            "phi3-long",
            "rope.scaling.original_context_length",
            None,
            InvalidModelFile,
            r"original_context_length.* missing",
        ),
        (
            "gpt2",
            "context_length",
            100,
            InvalidModelFile,
            r"position_embd.* expected \(100, 96\)",
        ),
        ("gpt2", "attention.layer_norm_epsilon", None, InvalidModelFile, r"layer_norm_epsilon"),
        (
            "gemma3",
            "final_logit_softcapping",
            30.0,
            UnsupportedArchitecture,
            r"is 30; supported: 0",
        ),
        ("gemma3", "attention.sliding_window_pattern", 0, InvalidModelFile, r"sliding_window_pattern"),
    ],
)
def test_what_is_not_computed_is_refused(
    name: str, key: str, value: Any, error: type[LoadError], message: str, tmp_path: Path
):
    tiny = VARIANTS[name]
    with pytest.raises(error, match=message):
        configured(tiny, tmp_path, **{f"{tiny.architecture}.{key}": value})


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("gpt-oss", "blk.1.attn_sinks.weight", (7,)),
        ("gpt-oss", "blk.1.ffn_down_exps.bias", (96,)),
        ("gpt-oss", "blk.1.ffn_up_exps.weight", (8, 96, 64)),
        ("gpt2", "blk.0.attn_norm.bias", (95,)),
        ("gemma3", "blk.3.post_ffw_norm.weight", (32,)),
        ("phi3", "blk.0.attn_qkv.weight", (96, 96)),
        ("phi3-long", "rope_factors_long.weight", (16,)),
    ],
)
def test_tensors_of_a_wrong_shape_are_named(name: str, tensor: str, shape: tuple[int, ...], tmp_path: Path):
    file = tiny_file(VARIANTS[name])
    file.tensors[tensor] = (np.zeros(shape, np.float32), GGMLType.F32)
    with (
        GGUFFile(file.write(tmp_path / "tiny.gguf")) as opened,
        pytest.raises(InvalidModelFile, match=rf"'{tensor}' has shape"),
    ):
        configure(opened)
    del file.tensors[tensor]
    with (
        GGUFFile(file.write(tmp_path / "without.gguf")) as opened,
        pytest.raises(InvalidModelFile, match=rf"'{tensor}' is missing"),
    ):
        configure(opened)


def test_dense_models_have_no_experts(tmp_path: Path):
    assert isinstance(configured(MODELS["qwen3"], tmp_path).layers[0].ffn, FfnConfig)
    assert isinstance(configured(VARIANTS["qwen3moe"], tmp_path).layers[0].ffn, MoeConfig)
