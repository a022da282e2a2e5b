"""Each operation of the native backend against the reference, and its bits against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from worker_orcd.kernels.backend import Glu, RopeParams
from worker_orcd.kernels.cpu.reference import ReferenceBackend


def _gain(width):
    return np.linspace(0.5, 1.5, width, dtype=np.float32)


def _rms_norm(width):
    def operation(backend, inputs, x):
        return backend.rms_norm(x, backend.vector(_gain(width)), 1e-5)

    return operation


def _rope(rotary_dim, head_dim, base=10000.0):
    frequencies = tuple(base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    params = RopeParams(rotary_dim=rotary_dim, inv_freq=frequencies, attention_factor=1.25)

    def operation(backend, inputs, x):
        return backend.rope(x, inputs.positions, params, head_dim)

    return operation


CASES = {
    "rms_norm": (_rms_norm(576), [576]),
    "rms_norm of an odd width": (_rms_norm(75), [75]),
    "rms_norm of narrow heads": (_rms_norm(8), [40]),
    "rms_norm of heads": (_rms_norm(64), [192]),
    "rope": (_rope(64, 64), [192]),
    "rope of a part of a head": (_rope(24, 40), [120]),
    "swiglu": (lambda b, i, x, y: b.glu(Glu.SWIGLU, x, y), [1536, 1536]),
    "swiglu over several chunks": (lambda b, i, x, y: b.glu(Glu.SWIGLU, x, y), [5003, 5003]),
    "add": (lambda b, i, x, y: b.add(x, y), [577, 577]),
    "add over several chunks": (lambda b, i, x, y: b.add(x, y), [17000, 17000]),
    "scale": (lambda b, i, x: b.scale(x, -1.7), [30]),
    "a chain of all": (
        lambda b, i, x, y: b.scale(b.add(b.glu(Glu.SWIGLU, x, y), _rms_norm(96)(b, i, x)), 0.5),
        [96, 96],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_native_agrees_with_the_reference(name, make_native, run_op):
    operation, widths = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [3 * rng.standard_normal((9, width)) for width in widths]
    positions = [0, 1, 2, 100, 4096, 8191, 40000, 131071, 5]
    want = run_op(ReferenceBackend(), operation, arrays, positions)
    got = run_op(make_native(), operation, arrays, positions)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_bits_depend_on_nothing_but_the_token(name, make_native, run_op, isas, library):
    operation, widths = CASES[name]
    rng = np.random.default_rng(1)
    arrays = [3 * rng.standard_normal((70, width)) for width in widths]
    positions = rng.integers(0, 131072, 70).tolist()
    want = run_op(make_native(), operation, arrays, positions)
    for isa in isas:
        library.force_isa(isa)
        for threads in (1, 2):
            got = run_op(make_native(threads), operation, arrays, positions)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa}, {threads} threads")
    for token in (0, 33, 69):
        alone = run_op(make_native(), operation, [a[token : token + 1] for a in arrays], [positions[token]])
        np.testing.assert_array_equal(alone[0], want[token])


def test_silu_at_the_ends_of_the_range(make_native, run_op, isas, library):
    gate = np.array([[-200, -104, -88.5, -20, -1e-30, 0, 1e-30, 20, 88.5, 104, 200, np.inf, np.nan]])
    for isa in isas:
        library.force_isa(isa)
        got = run_op(make_native(), lambda b, i, x, y: b.glu(Glu.SWIGLU, x, y), [gate, np.ones_like(gate)])[0]
        want = [x / (1 + math.exp(-x)) if math.isfinite(x) else x for x in gate[0]]
        np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-37)


def test_exponential_to_an_ulp(make_native, run_op):
    """Through silu: 1 / (1 + e^-x) for large negative x is e^x to within a rounding or two."""
    x = np.linspace(-80, -18, 4000)[None].astype(np.float32)
    got = run_op(make_native(), lambda b, i, x, y: b.glu(Glu.SWIGLU, x, y), [x, np.ones_like(x)])[0]
    exact = x[0].astype(np.float64) * np.exp(x[0].astype(np.float64))
    assert np.max(np.abs(got / exact - 1)) < 4e-7


def test_angles_are_exact_at_every_position(make_native, run_op):
    rng = np.random.default_rng(2)
    positions = np.concatenate([np.arange(200), rng.integers(0, 1 << 20, 800)])
    frequencies = (1.0, 0.77, 0.01, 1e-5)
    params = RopeParams(rotary_dim=8, inv_freq=frequencies)
    x = np.tile(np.array([1, 1, 1, 1, 0, 0, 0, 0]), (1000, 1))  # low = cos, high = sin
    got = run_op(make_native(), lambda b, i, x: b.rope(x, i.positions, params, 8), [x], positions.tolist())
    angles = positions[:, None].astype(np.float64) * np.array(frequencies)
    np.testing.assert_array_equal(got, np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32))


def test_take_gives_the_wanted_rows_in_order(make_native, run_op):
    x = np.random.default_rng(3).standard_normal((6, 20)).astype(np.float32)
    for backend in (make_native(), ReferenceBackend()):
        got = run_op(backend, lambda b, i, x: b.take(x, i.logit_tokens), [x], logit_tokens=[5, 0, 5])
        np.testing.assert_array_equal(got, x[[5, 0, 5]])


@pytest.mark.parametrize("activations", ["int8", "int16", "float32"])
def test_linear_of_mixed_formats_with_biases(activations, make_native, run_op, make_matrix):
    rng = np.random.default_rng(4)
    parts = [
        make_matrix(rng, name, n, 64) for name, n in (("Q4_0", 32), ("Q4_0", 16), ("Q8_0", 7), ("Q8_0", 16))
    ]
    bias = [
        None,
        rng.standard_normal(16).astype(np.float32),
        None,
        rng.standard_normal(16).astype(np.float32),
    ]
    x = rng.standard_normal((5, 64))

    def operation(backend, inputs, x):
        return backend.linear(x, backend.matrix(parts, bias))

    want = run_op(ReferenceBackend(), operation, [x])
    got = run_op(make_native(cpu_activations=activations), operation, [x])
    np.testing.assert_allclose(got, want, atol={"int8": 5e-2, "int16": 1e-3, "float32": 1e-5}[activations])
