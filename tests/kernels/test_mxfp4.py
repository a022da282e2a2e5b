"""MXFP4 from its bytes to attention: exact where it is decoded, within 1 % of float64 in products.

The bounds are those of float32 and of two int8 planes; one plane (the default) rounds each activation to one
part in 254 of the largest of its 32, which alone is 5e-3 of a normal one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from worker_orcd.kernels.backend import AttentionParams, Backend, BatchInputs, Counts, Limits, Matrix
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.quant import BY_NAME

MXFP4 = BY_NAME["MXFP4"]
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
RMS = {"float32": 1e-5, "int16": 4e-3, "int8": 8e-3}
BACKENDS = ["reference", *RMS]


@pytest.fixture(params=BACKENDS)
def named_backend(request: pytest.FixtureRequest, make_native: Callable[..., Backend]) -> tuple[str, Backend]:
    if request.param == "reference":
        return "float32", ReferenceBackend()
    return request.param, make_native(cpu_activations=request.param, kv_cache_dtype="float32")


def matrix(rng: np.random.Generator, n: int, k: int) -> Matrix:
    """Random codes with scales of a few octaves; about unit gain."""
    blocks = rng.integers(0, 256, (n * k // 32, 17), dtype=np.uint8)
    blocks[:, 0] = rng.integers(119, 124, len(blocks))
    return Matrix("w", MXFP4, n, k, blocks.reshape(n, -1))


def weights_of(part: Matrix) -> np.ndarray:
    return MXFP4.dequantize_rows(part.data).astype(np.float64)


def rms_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


def test_every_scale_and_every_code_is_exact(
    named_backend: tuple[str, Backend], run_op: Callable[..., np.ndarray]
):
    """256 scales times 16 codes, by numpy and as each backend decodes its packed copy."""
    codes = np.arange(16, dtype=np.uint8) | (15 - np.arange(16, dtype=np.uint8)) << 4
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0], blocks[:, 1:] = np.arange(256), codes
    values = np.array(MAGNITUDES + [-magnitude for magnitude in MAGNITUDES])
    exact = np.ldexp(
        np.concatenate((values, values[::-1])), np.arange(256)[:, None] - 127
    )  # (256, 32) float64
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    np.testing.assert_array_equal(MXFP4.dequantize_rows(blocks), expected)

    _name, backend = named_backend
    table = backend.embedding(Matrix("t", MXFP4, 256, 32, blocks))
    found = run_op(backend, lambda b, inputs, x: b.embed(inputs.token_ids, table), [np.zeros((256, 1))])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("n", "k"), [(37, 2880), (64, 96), (5, 32)])
def test_products(named_backend: tuple[str, Backend], run_op: Callable[..., np.ndarray], n: int, k: int):
    name, backend = named_backend
    rng = np.random.default_rng(n)
    part = matrix(rng, n, k)
    x = rng.standard_normal((19, k)).astype(np.float32)
    weight = backend.matrix([part])
    found = run_op(backend, lambda b, inputs, y: b.linear(y, weight), [x])
    exact = x.astype(np.float64) @ weights_of(part).T
    assert rms_error(found, exact) < RMS[name]
    assert np.abs(found - exact).max() < 0.01 * np.ptp(exact)


def test_attention(named_backend: tuple[str, Backend]):
    """q, k and v from MXFP4 weights, causal attention over 40 tokens, the output by MXFP4 again."""
    name, backend = named_backend
    tokens, dim, heads, kv_heads, head_dim = 40, 96, 4, 2, 32
    rng = np.random.default_rng(5)
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = [matrix(rng, width, dim) for width in widths]
    last = matrix(rng, dim, heads * head_dim)
    x = rng.standard_normal((tokens, dim)).astype(np.float32)
    params = AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5)
    limits = Limits(64, 64, 4, 16)
    cache = backend.allocate_cache(5, 16, kv_heads, head_dim)
    qkv, output = backend.matrix(parts), backend.matrix([last])
    table = backend.embedding(Matrix("t", BY_NAME["F32"], tokens, dim, x.view(np.uint8)))
    inputs = backend.allocate_inputs(limits)

    def forward(symbolic: BatchInputs):
        q, k, v = backend.split(backend.linear(backend.embed(symbolic.token_ids, table), qkv), widths)
        backend.store_kv(k, v, cache, symbolic)
        return backend.linear(backend.attention(q, cache, symbolic, params), output)

    step = backend.compile(forward, inputs, limits)
    inputs.token_ids[:tokens] = inputs.positions[:tokens] = torch.arange(tokens)
    inputs.slots[..., :tokens] = 16 + torch.arange(tokens)
    inputs.query_start[1] = inputs.context_lens[0] = tokens
    inputs.block_tables[..., 0, :] = torch.tensor([1, 2, 3, 4])
    found = step(Counts(tokens, 1, 0)).numpy()
    exact = attended(x.astype(np.float64), parts, heads, kv_heads) @ weights_of(last).T
    assert found.shape == exact.shape
    assert rms_error(found, exact) < 2 * RMS[name]
    assert np.abs(found - exact).max() < 0.01 * np.ptp(exact)


def attended(x: np.ndarray, parts: list[Matrix], heads: int, kv_heads: int) -> np.ndarray:
    """(tokens, heads * head_dim) in float64."""
    q, k, v = (
        (x @ weights_of(part).T).reshape(len(x), count, -1)
        for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    out = np.empty_like(q)
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T * q.shape[2] ** -0.5
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
    return out.reshape(len(x), -1)
