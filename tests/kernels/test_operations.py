"""Each operation of the native backend against the reference, and its bits against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels.products import in_a_fresh_process
from worker_orcd.kernels.backend import Glu, RopeParams
from worker_orcd.kernels.cpu.reference import ReferenceBackend


def _gain(width):
    return np.linspace(0.5, 1.5, width, dtype=np.float32)


def _rms_norm(width):
    def operation(backend, inputs, x):
        return backend.rms_norm(x, backend.vector(_gain(width)), 1e-5)

    return operation


def _layer_norm(width):
    def operation(backend, inputs, x):
        bias = np.linspace(-1, 2, width, dtype=np.float32)
        return backend.layer_norm(x, backend.vector(_gain(width)), backend.vector(bias), 1e-5)

    return operation


def _combine(num_experts, top_k):
    def operation(backend, inputs, logits, x):
        return backend.combine(x, backend.route(logits, top_k))

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
    "layer_norm": (_layer_norm(768), [768]),
    "layer_norm of an odd width": (_layer_norm(75), [75]),
    "layer_norm of less than a register": (_layer_norm(5), [5]),
    "gelu": (lambda b, i, x: b.gelu(x), [1000]),
    "gelu over several chunks": (lambda b, i, x: b.gelu(x), [5003]),
    "geglu": (lambda b, i, x, y: b.glu(Glu.GEGLU, x, y), [500, 500]),
    "clamped swiglu": (lambda b, i, x, y: b.glu(Glu.CLAMPED_SWIGLU, x, y), [777, 777]),
    "combine": (_combine(8, 2), [8, 2 * 576]),
    "combine of an odd width": (_combine(5, 3), [5, 3 * 75]),
    "combine of one slot over several chunks": (_combine(5, 1), [5, 17000]),
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


WIDE = [-np.inf, -3e38, -1e20, -200, -88.5, -12, -1e-30, 0, 1e-30, 12, 88.5, 200, 1e20, 3e38, np.inf, np.nan]
GATED = {
    "gelu": lambda b, i, x, y: b.gelu(x),
    "geglu": lambda b, i, x, y: b.glu(Glu.GEGLU, x, y),
    "clamped swiglu": lambda b, i, x, y: b.glu(Glu.CLAMPED_SWIGLU, x, y),
}


@pytest.mark.parametrize("name", GATED)
def test_activations_at_the_ends_of_the_range(name, make_native, run_op, isas, library):
    """Finite where the reference is, NaN where it is, and one bad column harms no other."""
    x, y = (values.reshape(1, -1) for values in np.meshgrid(WIDE, [0.5, -0.5, 200, -np.inf, np.nan]))
    want = run_op(ReferenceBackend(), GATED[name], [x, y])
    for isa in isas:
        library.force_isa(isa)
        got = run_op(make_native(), GATED[name], [x, y])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_gelu_is_exact_where_tanh_cancels(make_native, run_op):
    x = np.linspace(-9, -1, 4000)[None].astype(np.float32)
    wide = x[0].astype(np.float64)
    exact = wide / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    got = run_op(make_native(), lambda b, i, x: b.gelu(x), [x])[0]
    assert np.max(np.abs(got / exact - 1)) < 2e-5  # an exponent of 64 is rounded to 4e-6


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "layer_norm of an odd width", "combine"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_poisoned_token_harms_no_other(name, poison, make_native, run_op, isas, library):
    operation, widths = CASES[name]
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal((6, width)).astype(np.float32) for width in widths]
    clean = run_op(make_native(), operation, arrays)
    arrays[0][2, widths[0] // 2] = poison
    for isa in isas:
        library.force_isa(isa)
        got = run_op(make_native(), operation, arrays)
        assert np.isnan(got[2]).any() or poison == 3e38 or name == "combine"
        others = np.arange(6) != 2
        np.testing.assert_array_equal(got[others], clean[others])


def test_layer_norm_takes_the_mean_off_before_it_squares(make_native, run_op):
    """A large mean costs no more than rounding it: mean(x²) - mean² would be left with nothing."""
    x = np.random.default_rng(6).standard_normal((3, 768)) + 1000
    exact = x.astype(np.float32).astype(np.float64)
    exact -= exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    got = run_op(make_native(), _layer_norm(768), [x])
    np.testing.assert_allclose(got, exact * _gain(768) + np.linspace(-1, 2, 768), atol=2e-4)


def test_learned_positions_are_rows_of_their_table(make_native, run_op, make_matrix):
    table = make_matrix(np.random.default_rng(7), "Q8_0", 40, 64)
    positions = [39, 0, 7, 7, 12]

    def operation(backend, inputs, x):
        return backend.add(x, backend.embed(inputs.positions, backend.embedding(table)))

    want = table.format.dequantize_rows(table.data)[positions]
    for backend in (make_native(2), ReferenceBackend()):
        got = run_op(backend, operation, [np.zeros((5, 64))], positions)
        np.testing.assert_array_equal(got, want)


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


GUARDED = """
    import numpy as np
    from kernels.products import before_a_guard_page, run, same_bits
    from worker_orcd.kernels.cpu.build import load_library
    from worker_orcd.kernels.cpu.library import Kind, Op

    library = load_library()
    rng = np.random.default_rng(0)

    def guarded(*shape):
        return before_a_guard_page(rng.standard_normal(shape).astype(np.float32))

    def values(kind, n, **fields):
        x, out = guarded(3, fields.pop("columns", n)), guarded(3, n)
        arrays = {name: fields.pop(name) for name in ("y", "vector", "weight") if name in fields}
        pointers = {name: array.ctypes.data for name, array in arrays.items()}
        strides = {"ldx": x.shape[1], "ldout": n}
        if "y" in arrays:
            strides["ldy"] = arrays["y"].shape[1]
        operation = Op(kind=kind, x=x.ctypes.data, out=out.ctypes.data, n=n, **strides, **pointers, **fields)
        assert run(library, [operation], 3) == 0
        return x, out

    for isa in ("scalar", "avx2", "avx512vnni", "neon"):
        if not library.force_isa(isa):
            continue
        for n in (1, 15, 16, 37, 4100):
            gain, bias = guarded(n), guarded(n)
            values(Kind.RMS_NORM, n, vector=gain, width=n, f0=1e-5)
            _, out = values(Kind.LAYER_NORM, n, vector=gain, weight=bias, f0=1e-5)
            assert np.isfinite(out).all()
            values(Kind.GELU, n)
            values(Kind.SCALE, n, f0=2.0)
            for kind in (Kind.ADD, Kind.SWIGLU, Kind.GEGLU, Kind.CLAMPED_SWIGLU):
                values(kind, n, y=guarded(3, n), f0=7.0, f1=1.7)
            for top_k in (1, 3):
                routing = guarded(3, 5 * top_k)
                x, out = values(Kind.COMBINE, n, y=routing, columns=top_k * n, top_k=top_k)
                weights = routing[:, top_k : 2 * top_k, None]
                assert np.allclose(out, (x.reshape(3, top_k, n) * weights).sum(axis=1), rtol=1e-4, atol=1e-4)
    print("within bounds")
"""


def test_nothing_is_read_or_written_beyond_the_end():
    """Inputs, gains, biases and results end where a page begins that may not be touched."""
    assert in_a_fresh_process(GUARDED) == "within bounds\n"
