from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import AttentionParams, Counts, Limits, RopeParams
from worker_orcd.kernels.cpu.inputs import valid_inputs
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.memory import Widths
from worker_orcd.quant import BY_NAME


def test_linear_concatenates_parts_of_different_formats_and_adds_biases(make_matrix):
    rng = np.random.default_rng(0)
    parts = [
        make_matrix(rng, "Q4_0", 48, 64),
        make_matrix(rng, "F32", 7, 64),
        make_matrix(rng, "Q8_0", 33, 64),
    ]
    bias = rng.standard_normal(7).astype(np.float32)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    backend = ReferenceBackend()
    got = backend.linear(torch.tensor(x), backend.matrix(parts, [None, bias, None])).numpy()
    dense = np.concatenate([part.format.dequantize_rows(part.data) for part in parts]).astype(np.float64)
    want = x @ dense.T
    want[:, 48:55] += bias
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_linear_with_more_rows_than_a_tile(make_matrix):
    rng = np.random.default_rng(0)
    part = make_matrix(rng, "Q8_0", 1500, 512)
    x = rng.standard_normal((2, 512)).astype(np.float32)
    backend = ReferenceBackend()
    got = backend.linear(torch.tensor(x), backend.matrix([part])).numpy()
    want = x @ part.format.dequantize_rows(part.data).astype(np.float64).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_weights_survive_the_file_they_came_from(make_matrix):
    part = make_matrix(np.random.default_rng(0), "Q8_0", 16, 32)
    backend = ReferenceBackend()
    weight = backend.embedding(part)
    want = backend.embed(torch.tensor([3], dtype=torch.int32), weight).clone()
    part.data[:] = 0
    assert torch.equal(backend.embed(torch.tensor([3], dtype=torch.int32), weight), want)


def test_a_bias_for_every_part_or_none(make_matrix):
    part = make_matrix(np.random.default_rng(0), "F32", 4, 32)
    with pytest.raises(Internal, match="1 biases for 2 matrices"):
        ReferenceBackend().matrix([part, part], [np.zeros(4, np.float32)])


def test_rms_norm_of_rows_and_of_heads():
    x = torch.randn(3, 90, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.5, 1.5, 30)
    got = ReferenceBackend().rms_norm(x, gain, 1e-3)
    runs = x.double().reshape(3, 3, 30)
    want = runs / torch.sqrt((runs**2).mean(-1, keepdim=True) + 1e-3) * gain
    torch.testing.assert_close(got, want.reshape(3, 90).float(), rtol=1e-6, atol=1e-6)


def test_rope_rotates_pairs_by_their_angle_and_leaves_the_rest():
    params = RopeParams(rotary_dim=4, inv_freq=(1.0, 0.01), attention_factor=2.0)
    x = torch.arange(12.0).reshape(1, 12)  # two heads of 6
    got = ReferenceBackend().rope(x, torch.tensor([5]), params, 6)[0].tolist()
    want = []
    for head in ([0.0, 1, 2, 3, 4, 5], [6.0, 7, 8, 9, 10, 11]):
        angles = [5.0, 0.05]
        cos, sin = [2 * math.cos(a) for a in angles], [2 * math.sin(a) for a in angles]
        want += [head[i] * cos[i] - head[i + 2] * sin[i] for i in range(2)]
        want += [head[i + 2] * cos[i] + head[i] * sin[i] for i in range(2)] + head[4:]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_is_softmax_over_the_window(window, make_toy, make_chunk):
    toy = make_toy(ReferenceBackend(), layers=1, num_heads=6, num_kv_heads=2, head_dim=8, dim=32)
    backend, cache, rng = toy.backend, toy.caches[0], np.random.default_rng(1)
    length = 40
    q, k, v = (torch.tensor(rng.standard_normal((length, w)), dtype=torch.float32) for w in (48, 16, 16))
    blocks = [9, 4, 7]
    counts = Counts(length, 1, length)
    inputs = _filled(toy, make_chunk([0] * length, 0, length, blocks), counts)
    backend.store_kv(k, v, cache, inputs)
    params = AttentionParams(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.3, window=window)
    got = backend.attention(q, cache, inputs, params).reshape(length, 6, 8)
    keys = k.double().reshape(length, 2, 8).repeat_interleave(3, 1)
    values = v.double().reshape(length, 2, 8).repeat_interleave(3, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double().reshape(length, 6, 8), keys) * 0.3
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    hidden = (ahead > 0) if window is None else (ahead > 0) | (ahead <= -window)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, values).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def _filled(toy, chunk, counts):
    toy.step([chunk])
    toy.caches[0].tensor.zero_()
    return valid_inputs(toy.inputs, counts)


@pytest.mark.parametrize("config", [{}, {"window": 9, "head_norms": True, "weight_format": "F32"}])
def test_a_token_does_not_see_its_batch(config, make_toy, make_chunk):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 80, n).tolist() for n in (33, 1, 7, 16, 40, 18)]
    blocks = rng.permutation(np.arange(1, 100)).tolist()
    tables = [blocks[4 * i : 4 * i + 4] for i in range(len(prompts))]
    toy = make_toy(ReferenceBackend(), **config)
    alone = [toy.logits(p, t, len(p)) for p, t in zip(prompts, tables, strict=True)]
    for chunk in (1, 7):
        np.testing.assert_array_equal(toy.logits(prompts[0], tables[3] + tables[4], chunk), alone[0])
    together = toy.step([make_chunk(p, 0, len(p), t) for p, t in zip(prompts, tables, strict=True)])
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_step_larger_than_its_buffers_is_refused(make_toy):
    toy = make_toy(ReferenceBackend(), max_tokens=8)
    with pytest.raises(Internal, match="9 tokens does not fit buffers for 8"):
        toy.run(Counts(9, 1, 1))
    with pytest.raises(Internal, match="at least one token"):
        toy.run(Counts(0, 1, 1))


def test_cache_and_workspace_sizes():
    backend = ReferenceBackend()
    assert backend.cache_block_bytes(16, 3, 64) == 2 * 16 * 3 * 64 * 4
    assert ReferenceBackend("float16").cache_block_bytes(16, 3, 64) == 2 * 16 * 3 * 64 * 2
    cache = ReferenceBackend("float16").allocate_cache(5, 16, 3, 64)
    assert cache.tensor.nbytes == 5 * 2 * 16 * 3 * 64 * 2
    assert not cache.tensor.any()
    assert backend.workspaces(Limits(8, 4, 2, 16), Widths(100, 1000)).total_bytes >= 4 * (4 * 1000 + 8 * 100)


def test_embed_dequantises_rows(make_matrix):
    table = make_matrix(np.random.default_rng(0), "Q4_0", 20, 64)
    backend = ReferenceBackend()
    ids = torch.tensor([3, 3, 19], dtype=torch.int32)
    got = backend.embed(ids, backend.embedding(table)).numpy()
    np.testing.assert_array_equal(got, BY_NAME["Q4_0"].dequantize_rows(table.data)[[3, 3, 19]])
