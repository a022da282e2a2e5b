"""What a file says about its network, and what it must not say."""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, Tiny, TinyFile
from tiny_variants import VARIANTS, tiny_file

from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.errors import InvalidModelFile, LoadError, UnsupportedArchitecture, UnsupportedFormat
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.model.architectures import SUPPORTED, configure
from worker_orcd.model.config import ModelConfig
from worker_orcd.model.tensors import expected_tensors

ALL = MODELS | VARIANTS


def configured(tiny: Tiny, directory: Path) -> ModelConfig:
    with GGUFFile(tiny_file(tiny).write(directory / "tiny.gguf")) as file:
        return configure(file)


@pytest.mark.parametrize("name", ALL)
def test_a_good_file(name: str, tmp_path: Path):
    tiny = ALL[name]
    config = configured(tiny, tmp_path)
    assert config.architecture in SUPPORTED
    assert (config.dim, config.vocab_size, len(config.layers)) == (tiny.dim, tiny.vocab, tiny.layers)
    assert config.context_length == tiny.context
    assert config.tied_embeddings == tiny.tied
    layer = config.layers[0]
    assert layer.attention.num_heads == tiny.heads
    assert layer.attention.num_kv_heads == tiny.kv_heads
    assert layer.attention.head_dim == tiny.head_dim
    assert layer.attention.window == tiny.window
    assert layer.attention.scale == pytest.approx(tiny.head_dim**-0.5)
    assert layer.qkv_bias == (tiny.qkv_bias or tiny.architecture in {"gpt-oss", "gpt2"})
    assert layer.head_norms == tiny.head_norms
    assert layer.permuted_qk == (tiny.architecture == "llama")
    assert set(expected_tensors(config)) | config.unused_tensors >= set(tiny_file(tiny).tensors)


def test_rope_frequencies(tmp_path: Path):
    plain = configured(MODELS["llama"], tmp_path).layers[0].rope
    exponents = np.arange(0, 16, 2) / 16
    assert plain.inv_freq == pytest.approx((10000.0**-exponents).tolist())
    linear = configured(MODELS["llama-linear"], tmp_path).layers[0].rope
    assert linear.inv_freq == pytest.approx([freq / 4 for freq in plain.inv_freq])
    scaling = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    off = configured(replace(MODELS["llama"], metadata=scaling), tmp_path).layers[0].rope
    assert off.inv_freq == plain.inv_freq
    louder = configured(replace(MODELS["llama"], metadata={"llama.rope.scaling.attn_factor": 1.5}), tmp_path)
    assert louder.layers[0].rope == replace(plain, attention_factor=1.5)
    old = configured(replace(MODELS["llama"], metadata={"llama.rope.scale_linear": 4.0}), tmp_path)
    assert old.layers[0].rope.inv_freq == linear.inv_freq


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (
            "general.architecture",
            "mamba",
            UnsupportedArchitecture,
            r"'mamba'; supported: llama, qwen2, qwen3, qwen3moe, phi3, gpt-oss, gpt2, gemma3$",
        ),
        ("general.architecture", None, InvalidModelFile, r"general\.architecture"),
        ("llama.attention.head_count", 0, InvalidModelFile, r"llama\.attention\.head_count"),
        (
            "llama.attention.head_count",
            4,
            InvalidModelFile,
            r"attn_k.* shape \(32, 96\); expected \(48, 96\)",
        ),
        ("llama.attention.head_count", 7, InvalidModelFile, "7, which is not a multiple"),
        ("llama.attention.head_count_kv", 4, InvalidModelFile, "6, which is not a multiple .* 4"),
        ("llama.attention.head_count_kv", 7, InvalidModelFile, r"head_count_kv.* 7"),
        ("llama.attention.head_count_kv", 0, InvalidModelFile, r"head_count_kv"),
        ("llama.attention.key_length", 4096, InvalidModelFile, r"key_length.*4096"),
        ("llama.attention.value_length", 8, UnsupportedArchitecture, r"value_length is 8"),
        ("llama.embedding_length", None, InvalidModelFile, r"llama\.embedding_length"),
        ("llama.embedding_length", 2**63 - 1, InvalidModelFile, r"llama\.embedding_length"),
        ("llama.embedding_length", 98, InvalidModelFile, "98, which is not a multiple of"),
        ("llama.embedding_length", 192, InvalidModelFile, r"token_embd.*\(320, 96\).*\(320, 192\)"),
        ("llama.block_count", 2**40, InvalidModelFile, r"llama\.block_count"),
        ("llama.block_count", 3, InvalidModelFile, r"blk\.2\.attn_norm\.weight' is missing"),
        ("llama.block_count", 1, InvalidModelFile, r"blk\.1\..*no place in a llama model"),
        ("llama.context_length", 0, InvalidModelFile, r"llama\.context_length"),
        ("llama.context_length", 2**62, InvalidModelFile, r"llama\.context_length"),
        ("llama.feed_forward_length", 64, InvalidModelFile, r"ffn_gate.*\(160, 96\).*\(64, 96\)"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, InvalidModelFile, "layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), InvalidModelFile, "layer_norm_rms_epsilon"),
        ("llama.rope.dimension_count", 15, InvalidModelFile, r"dimension_count is 15; .* even"),
        ("llama.rope.dimension_count", 32, InvalidModelFile, r"dimension_count.*32"),
        ("llama.rope.freq_base", 0.0, InvalidModelFile, r"rope\.freq_base"),
        (
            "llama.rope.scaling.factor",
            1e-9,
            InvalidModelFile,
            r"factor is 1e-09; allowed are 0 and 0\.001 to",
        ),
        ("llama.rope.scale_linear", 1e-9, InvalidModelFile, r"factor is 1e-09"),
        ("llama.rope.scaling.type", "longrope", UnsupportedArchitecture, r"scaling\.type is 'longrope'"),
        ("llama.rope.scaling.attn_factor", 0.0, InvalidModelFile, r"attn_factor"),
        ("llama.attention.causal", False, UnsupportedArchitecture, r"attention\.causal is false"),
        ("llama.expert_count", 8, UnsupportedArchitecture, r"llama\.expert_count is 8"),
        ("tokenizer.ggml.tokens", ["a", "b"], InvalidModelFile, r"token_embd.* 320 rows; expected 2"),
        ("llama.attention.head_count", "6", InvalidModelFile, r"head_count"),
    ],
)
def test_bad_metadata_is_named(key: str, value: Any, error: type[LoadError], message: str, tmp_path: Path):
    tiny = replace(MODELS["llama"], metadata={key: value})
    with pytest.raises(error, match=message):
        configured(tiny, tmp_path)


def test_tensors_that_are_wrong_are_named(tmp_path: Path):
    def broken(tiny: Tiny, changes: dict[str, Any]) -> str:
        file = TinyFile(tiny)
        for name, change in changes.items():
            if change is None:
                del file.tensors[name]
            else:
                file.tensors[name] = change
        with GGUFFile(file.write(tmp_path / "tiny.gguf")) as opened, pytest.raises(InvalidModelFile) as info:
            configure(opened)
        return str(info.value)

    def zeros(*shape: int) -> tuple[Any, GGMLType]:
        return np.zeros(shape, dtype=np.float32), GGMLType.F32

    llama, qwen2, qwen3 = MODELS["llama"], MODELS["qwen2"], MODELS["qwen3"]
    assert broken(llama, {"blk.1.ffn_down.weight": None}) == (
        "tensor 'blk.1.ffn_down.weight' is missing; expected shape (96, 160)"
    )
    assert broken(llama, {"blk.0.attn_k.weight": zeros(96, 32)}) == (
        "tensor 'blk.0.attn_k.weight' has shape (96, 32); expected (32, 96)"
    )
    assert broken(llama, {"output_norm.weight": zeros(1, 96)}).startswith("tensor 'output_norm.weight' has")
    assert broken(llama, {"token_embd.weight": zeros(96)}).startswith(
        "tensor 'token_embd.weight' is of shape"
    )
    assert broken(llama, {"token_embd.weight": None}).startswith("tensor 'token_embd.weight' is missing")
    assert broken(llama, {"blk.0.attn_q.extra": zeros(4)}).startswith(
        "tensor 'blk.0.attn_q.extra' has no place"
    )
    assert broken(qwen2, {"blk.1.attn_v.bias": None}).startswith("tensor 'blk.1.attn_v.bias' is missing")
    assert broken(qwen3, {"blk.0.attn_q_norm.weight": zeros(16)}).startswith(
        "tensor 'blk.0.attn_q_norm.weight' has"
    )
    assert broken(MODELS["llama3"], {"rope_freqs.weight": zeros(8)}).endswith("not finite and positive")
    assert broken(MODELS["llama3"], {"rope_freqs.weight": zeros(4)}).endswith("has shape (4,); expected (8,)")


def test_a_tensor_type_we_cannot_execute_is_named(tmp_path: Path):
    path = TinyFile(replace(MODELS["llama"], formats={})).write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as file:
        info = file.tensors["blk.0.attn_q.weight"]
        file.tensors = {**file.tensors, info.name: replace(info, ggml_type=28)}  # F64
        with pytest.raises(
            UnsupportedFormat, match=re.escape("'blk.0.attn_q.weight' has ggml type 28; supported: F32")
        ):
            configure(file)


def test_qwen_refuses_a_sliding_window(tmp_path: Path):
    tiny = replace(MODELS["qwen2"], metadata={"qwen2.attention.sliding_window": 64})
    with pytest.raises(UnsupportedArchitecture, match=r"qwen2\.attention\.sliding_window is 64"):
        configured(tiny, tmp_path)


VALUES = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, 2, 3, 2**31, 2**32, 2**63 - 1]),
    st.floats(width=32),
    st.text(max_size=5),
    st.booleans(),
    st.just(np.array([6, 2], dtype=np.int32)),
    st.just(["a"]),
    st.none(),
)


FILES = {name: tiny_file(tiny) for name, tiny in ALL.items()}


@pytest.mark.slow
@given(name=st.sampled_from(sorted(ALL)), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_metadata_gives_a_configuration_or_a_load_error(name: str, data: st.DataObject):
    file = FILES[name]
    keys = sorted(file.metadata()) + [
        f"{file.tiny.architecture}.{key}"
        for key in (
            "rope.dimension_count",
            "rope.scaling.type",
            "rope.scaling.factor",
            "rope.scale_linear",
            "attention.key_length",
            "attention.value_length",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.scaling.original_context_length",
            "rope.scaling.yarn_beta_fast",
            "rope.freq_base_swa",
            "expert_count",
            "expert_used_count",
            "final_logit_softcapping",
        )
    ]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    changed = copy.copy(file)
    changed.tiny = replace(file.tiny, metadata=changes)
    with tempfile.TemporaryDirectory() as directory:
        path = changed.write(Path(directory) / "tiny.gguf")
        try:
            with GGUFFile(path) as opened:
                config = configure(opened)
        except LoadError as error:
            assert len(str(error)) < 500
            return
    for layer in config.layers:
        assert 0 < layer.attention.num_kv_heads <= layer.attention.num_heads
        if layer.rope is None:
            continue
        assert np.isfinite(layer.rope.inv_freq).all()
        assert layer.rope.rotary_dim == 2 * len(layer.rope.inv_freq) <= layer.attention.head_dim
