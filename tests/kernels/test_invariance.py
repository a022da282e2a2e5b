"""A small decoder on the native backend: near the reference, and the same bits however it is run."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cpu.reference import ReferenceBackend

CONFIGS = {
    "float32": ({}, {}),
    "int8": ({"cpu_activations": "int8"}, {}),
    "int16": ({"cpu_activations": "int16"}, {"weight_format": "Q8_0"}),
    "head norms, window": ({}, {"head_norms": True, "window": 11, "weight_format": "F32"}),
    "nine heads on three": ({"cpu_activations": "int8"}, {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}),
    "long window, float16 cache": (
        {"kv_cache_dtype": "float16"},
        {"window": 100, "num_heads": 8, "num_kv_heads": 1},
    ),
    "layer norms, learned positions, gelu": ({}, {"layer_norms": True, "dim": 96}),
    "geglu": ({"cpu_activations": "int16"}, {"glu": Glu.GEGLU}),
    "experts, sinks, window": (
        {"cpu_activations": "int8"},
        {"num_experts": 8, "top_k": 3, "glu": Glu.CLAMPED_SWIGLU, "sinks": True, "window": 20},
    ),
    "experts, float32": ({}, {"num_experts": 16, "top_k": 4, "weight_format": "Q8_0"}),
    "experts, int16": ({"cpu_activations": "int16"}, {"num_experts": 4, "glu": Glu.GEGLU, "sinks": True}),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def _prompts(count):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 80, n).tolist() for n in rng.integers(1, 30, count)]
    blocks = 1 + rng.permutation(255)
    return prompts, [blocks[2 * i : 2 * i + 2].tolist() for i in range(count)]


def test_near_the_reference(config, make_native, make_toy):
    native, model = config
    ids = np.random.default_rng(0).integers(0, 80, 150).tolist()
    blocks = np.random.default_rng(1).permutation(np.arange(1, 60)).tolist()
    want = make_toy(ReferenceBackend(), **model).logits(ids, blocks, 150)
    got = make_toy(make_native(**native), **model).logits(ids, blocks, 150)
    tolerance = {"int8": 0.1, "int16": 2e-3}.get(
        native.get("cpu_activations", ""), 2e-3 if native.get("kv_cache_dtype") else 2e-5
    )
    assert np.abs(got - want).max() < tolerance


def test_chunks_blocks_threads_and_instruction_sets(config, make_native, make_toy, isas, library):
    native, model = config
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 80, 130).tolist()
    want = None
    for isa in isas:
        library.force_isa(isa)
        for threads in (1, 2):
            toy = make_toy(make_native(threads, **native), **model)
            for chunk in (1, 7, 64, 130):
                got = toy.logits(ids, (1 + rng.permutation(255)).tolist(), chunk)
                want = got if want is None else want
                np.testing.assert_array_equal(got, want, err_msg=f"{isa}, {threads} threads, chunk {chunk}")


def test_alone_and_in_a_batch_of_16(config, make_native, make_toy, make_chunk):
    native, model = config
    prompts, tables = _prompts(16)
    alone = []
    for prompt, table in zip(prompts, tables, strict=True):
        toy = make_toy(make_native(1, **native), **model)
        alone.append(toy.logits(prompt, table, len(prompt)))
    toy = make_toy(make_native(2, **native), max_tokens=512, **model)
    for order in (range(16), np.random.default_rng(3).permutation(16)):
        chunks = [make_chunk(prompts[i], 0, len(prompts[i]), tables[i]) for i in order]
        for i, got in zip(order, toy.step(chunks), strict=True):
            np.testing.assert_array_equal(got, alone[i])


def test_prefill_beside_decode(config, make_native, make_toy, make_chunk):
    """A step that mixes the middle of one prompt, the end of another and single tokens."""
    native, model = config
    prompts, tables = _prompts(6)
    prompts[0] = np.random.default_rng(8).integers(0, 80, 31).tolist()
    alone = []
    toy = make_toy(make_native(2, **native), **model)
    for prompt, table in zip(prompts, tables, strict=True):
        alone.append(toy.logits(prompt, table, 5))
    chunks = [make_chunk(prompts[0], 3, 20, tables[0])]
    chunks += [make_chunk(p, len(p) - 1, 1, t) for p, t in zip(prompts[1:], tables[1:], strict=True)]
    got = toy.step(chunks)
    np.testing.assert_array_equal(got[0], alone[0][3:23])
    for part, whole in zip(got[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(part[0], whole[-1])
