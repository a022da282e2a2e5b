"""Tracing, the arena, and what a traced program refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.config import DeviceConfig
from worker_orcd.errors import InsufficientMemory, Internal, InvalidConfiguration, UnsupportedFormat
from worker_orcd.kernels.backend import Counts, Glu, Limits, Matrix, RopeParams
from worker_orcd.kernels.cpu.library import Kind, Rows
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.program import Recorded, aligned_zeros, fresh, place
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.memory import Widths
from worker_orcd.quant import BY_NAME
from worker_orcd.quant.format import WeightFormat

LIMITS = Limits(8, 4, 1, 16)

# A program: each step is (operation, which earlier tensors it reads, counted back from the newest).
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "scale", "swiglu", "rms_norm", "low", "high", "join"]),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    min_size=1,
    max_size=40,
)


def _forward(program, table, weight):
    """Run `program` on 32-column tensors of any backend, starting from the embedding."""

    def forward(backend, inputs):
        tensors = [backend.embed(inputs.token_ids, table)]
        for operation, first, second in program:
            x, y = (tensors[-1 - back % len(tensors)] for back in (first, second))
            if operation == "add":
                tensors.append(backend.scale(backend.add(x, y), 0.5))
            elif operation == "swiglu":
                tensors.append(backend.glu(Glu.SWIGLU, x, y))
            elif operation == "scale":
                tensors.append(backend.scale(x, -0.75))
            elif operation == "rms_norm":
                tensors.append(backend.rms_norm(x, backend.vector(np.ones(8, np.float32)), 1e-5))
            else:  # 48 columns, of which a view of 32 goes on: the buffer must outlive the view
                low, _ = backend.split(backend.linear(x, weight), [32, 16])
                _, high = backend.split(backend.linear(y, weight), [16, 32])
                tensors.append({"low": low, "high": high, "join": backend.add(low, high)}[operation])
        return backend.take(tensors[-1], inputs.logit_tokens)

    return forward


@settings(max_examples=60, deadline=None)
@given(program=steps)
def test_any_program_computes_what_it_computes_eagerly(program, library_backends):
    rng = np.random.default_rng(0)
    data = rng.standard_normal((8, 32)).astype(np.float32)
    table = Matrix("t", BY_NAME["F32"], 8, 32, data.view(np.uint8))
    matrix = (rng.standard_normal((48, 32)) / 6).astype(np.float32)
    results = []
    for backend in library_backends:
        weight = backend.matrix([Matrix("w", BY_NAME["F32"], 48, 32, matrix.view(np.uint8))])
        forward = _forward(program, backend.embedding(table), weight)
        inputs = backend.allocate_inputs(LIMITS)
        step = backend.compile(lambda i, b=backend, f=forward: f(b, i), inputs, LIMITS)
        inputs.token_ids.copy_(torch.arange(8))
        inputs.query_start[:2] = torch.tensor([0, 8])
        inputs.logit_tokens.copy_(torch.tensor([0, 2, 5, 7]))
        results.append(step(Counts(8, 1, 4)).numpy().copy())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def library_backends(library):
    return NativeBackend(library, DeviceConfig(cpu_threads=1, cpu_activations="float32")), ReferenceBackend()


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30)
)
def test_buffers_alive_together_never_overlap(shapes):
    values = [fresh(shapes[0][0], Rows.TOKENS)]
    operations = [Recorded(Kind.EMBED, None, None, values[0], {})]
    for width, first, second in shapes[1:]:
        reads = [values[-1 - back % len(values)] for back in (first, second)]
        values.append(fresh(width, Rows.LOGITS if width % 3 == 0 else Rows.TOKENS))
        operations.append(Recorded(Kind.ADD, *reads, values[-1], {}))
    places, total = place(operations, values[0], LIMITS)
    spans = []
    for value in values:
        uses = [i for i, operation in enumerate(operations) if value in operation.values]
        end = len(operations) if value is values[0] else uses[-1]
        rows = LIMITS.max_tokens if value.rows is Rows.TOKENS else LIMITS.max_rows
        offset = places[value.buffer]
        spans.append((uses[0], end, offset, offset + rows * value.buffer.stride))
        assert offset % 16 == 0
        assert offset + rows * value.buffer.stride <= total
    for i, (born, dies, low, high) in enumerate(spans):
        for other_born, other_dies, other_low, other_high in spans[:i]:
            together = born <= other_dies and other_born <= dies
            assert not (together and low < other_high and other_low < high)


def test_a_chain_needs_two_buffers():
    values = [fresh(64, Rows.TOKENS) for _ in range(50)]
    operations = [Recorded(Kind.EMBED, None, None, values[0], {})]
    operations += [Recorded(Kind.SCALE, a, None, b, {}) for a, b in itertools.pairwise(values)]
    assert place(operations, values[-1], LIMITS)[1] == 2 * 64 * LIMITS.max_tokens


def test_the_result_of_a_step_is_only_the_rows_asked_for(make_native, make_toy):
    toy = make_toy(make_native())
    assert toy.run(Counts(3, 1, 2)).shape == (2, 80)
    assert toy.run(Counts(3, 1, 0)).shape == (0, 80)


def test_a_step_larger_than_its_buffers_is_refused(make_native, make_toy):
    toy = make_toy(make_native(), max_tokens=8)
    with pytest.raises(Internal, match="9 tokens does not fit buffers for 8"):
        toy.run(Counts(9, 1, 1))


def test_operations_run_only_in_a_program(make_native):
    backend = make_native()
    with pytest.raises(Internal, match="scale outside compile"):
        backend.scale(fresh(4, Rows.TOKENS), 2.0)


def _experts(backend, k):
    """Four of 2 x k."""
    data = np.zeros((8, k), np.float32).view(np.uint8)
    return backend.experts([Matrix("w", BY_NAME["F32"], 2, k, data)], 4)


ROPE = RopeParams(rotary_dim=8, inv_freq=(1.0,) * 4)
REFUSED = {
    "add: 32 columns of TOKENS, 16 of TOKENS": lambda b, i, x: b.add(x, b.split(x, [16, 16])[0]),
    "add: 32 columns of TOKENS, 32 of LOGITS": lambda b, i, x: b.add(x, b.take(x, i.logit_tokens)),
    "split: the tensor has 32 columns, not 33": lambda b, i, x: b.split(x, [16, 17]),
    "rms_norm: 32 columns are not runs of 5": lambda b, i, x: b.rms_norm(x, np.ones(5, np.float32), 0.1),
    "rope: 32 columns, heads of 12": lambda b, i, x: b.rope(x, i.positions, ROPE, 12),
    "expected the step's own positions": lambda b, i, x: b.rope(x, i.token_ids, ROPE, 16),
    "the tensor has a row for each logit": lambda b, i, x: b.take(b.take(x, i.logit_tokens), i.logit_tokens),
    "layer_norm: the tensor has 32 columns, not 31": lambda b, i, x: b.layer_norm(
        x, np.ones(32, np.float32), np.ones(31, np.float32), 0.1
    ),
    "route: 33 of 32 experts": lambda b, i, x: b.route(x, 33),
    "route: 0 of 32 experts": lambda b, i, x: b.route(x, 0),
    "add: a RoutingValue is no tensor": lambda b, i, x: b.add(x, b.route(x, 2)),
    "gelu: a RoutingValue is no tensor": lambda b, i, x: b.gelu(b.route(x, 2)),
    "rms_norm: a RoutingValue is no tensor": lambda b, i, x: b.rms_norm(b.route(x, 2), np.ones(2), 0.1),
    "take: a RoutingValue is no tensor": lambda b, i, x: b.take(b.route(x, 2), i.logit_tokens),
    "combine: a Value is no routing": lambda b, i, x: b.combine(x, x),
    "combine: 32 columns are not 3 slots": lambda b, i, x: b.combine(x, b.route(x, 3)),
    "x has a row for each of LOGITS, the routing of TOKENS": lambda b, i, x: b.combine(
        b.take(x, i.logit_tokens), b.route(x, 2)
    ),
    "expert_linear: 4 experts, a routing to 32": lambda b, i, x: b.expert_linear(
        x, _experts(b, 32), b.route(x, 2)
    ),
    "expert_linear: the tensor has 32 columns, not 96": lambda b, i, x: b.expert_linear(
        x, _experts(b, 48), b.route(b.split(x, [4, 28])[0], 2)
    ),
    "no operation wrote": lambda b, i, x: fresh(3, Rows.LOGITS),
}


@pytest.mark.parametrize("message", REFUSED)
def test_shapes_that_do_not_fit_are_named(message, make_native, run_op):
    with pytest.raises(Internal, match=message):
        run_op(make_native(), REFUSED[message], [np.zeros((2, 32))])


def test_an_operation_the_kernels_refuse_is_named(make_native, make_toy):
    toy = make_toy(make_native())
    toy.run._linked.ops[4].n = 0
    with pytest.raises(Internal, match=r"operation 4 \(rope_angles\) cannot be planned"):
        toy.run(Counts(1, 1, 1))


def test_a_format_without_a_kernel_is_named(make_native):
    odd = WeightFormat(
        name="Q9_9", ggml_type=99, block_size=32, type_size=4, dequantize=lambda blocks: blocks
    )
    with pytest.raises(UnsupportedFormat, match=r"tensor blk.0.x is Q9_9 of 16 x 64; .* no kernel"):
        make_native().matrix([Matrix("blk.0.x", odd, 16, 64, np.zeros((16, 8), np.uint8))])


def test_experts_without_a_kernel_or_of_another_number_are_named(make_native, make_matrix):
    odd = WeightFormat(
        name="Q9_9", ggml_type=99, block_size=32, type_size=4, dequantize=lambda blocks: blocks
    )
    with pytest.raises(UnsupportedFormat, match=r"tensor blk.0.x is Q9_9 of 16 x 64; .* no kernel"):
        make_native().experts([Matrix("blk.0.x", odd, 16, 64, np.zeros((32, 8), np.uint8))], 2)
    stack = Matrix("blk.0.x", BY_NAME["F32"], 4, 32, np.zeros((12, 128), np.uint8))
    with pytest.raises(Internal, match=r"tensor blk.0.x or its bias is not of 2 experts of 4 rows"):
        make_native().experts([stack], 2)
    with pytest.raises(Internal, match="is not of 3 experts of 4 rows"):
        make_native().experts([stack], 3, [np.zeros((3, 5), np.float32)])
    with pytest.raises(Internal, match="1 biases for 2 stacks"):
        make_native().experts([stack, stack], 3, [None])


def test_matrices_side_by_side_share_k(make_native, make_matrix):
    rng = np.random.default_rng(0)
    with pytest.raises(Internal, match=r"\[32, 64\]"):
        make_native().matrix([make_matrix(rng, "F32", 4, 32), make_matrix(rng, "F32", 4, 64)])


def test_packed_weights_are_not_a_view_of_the_file(make_native, make_matrix, run_op):
    backend, part = make_native(), make_matrix(np.random.default_rng(0), "Q4_0", 40, 64)
    weight = backend.matrix([part])
    x = np.random.default_rng(1).standard_normal((3, 64))
    want = run_op(backend, lambda b, i, x: b.linear(x, weight), [x])
    part.data[:] = 0
    np.testing.assert_array_equal(run_op(backend, lambda b, i, x: b.linear(x, weight), [x]), want)


def test_packed_experts_are_not_a_view_of_the_file(make_native, make_matrix, run_op):
    backend, stack = make_native(), make_matrix(np.random.default_rng(0), "Q4_0", 3 * 40, 64)
    bias = np.ones((3, 40), np.float32)
    weight = backend.experts([Matrix("w", stack.format, 40, 64, stack.data)], 3, [bias])
    arrays = [np.random.default_rng(1).standard_normal((3, width)) for width in (3, 64)]

    def operation(b, inputs, logits, x):
        return b.expert_linear(x, weight, b.route(logits, 2))[0]

    want = run_op(backend, operation, arrays)
    stack.data[:] = 0
    bias[:] = 0
    np.testing.assert_array_equal(run_op(backend, operation, arrays), want)


def test_memory_that_is_not_there(make_native):
    with pytest.raises(InsufficientMemory, match="the activations need"):
        aligned_zeros(1 << 60, "the activations")
    with pytest.raises(InsufficientMemory, match="the KV blocks of one layer need"):
        make_native().allocate_cache(1 << 45, 16, 8, 128)
    with pytest.raises(InvalidConfiguration, match="multiple of 16"):
        make_native().cache_block_bytes(20, 8, 128)


def test_the_arena_is_aligned():
    for size in (1, 63, 64, 100000):
        memory = aligned_zeros(size, "x")
        assert memory.ctypes.data % 64 == 0
        assert memory.shape == (size,)


MOE = {"num_experts": 16, "top_k": 6, "ffn": 32, "dim": 32, "vocab": 32, "weight_format": "Q8_0"}


def test_workspace_is_an_upper_bound(make_native, make_toy):
    for config in ({}, {"ffn": 512, "vocab": 3000}, {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}, MOE):
        backend = make_native()
        toy = make_toy(backend, **config)
        c = toy.config
        slots = c.top_k if c.num_experts else 1
        widest = max(slots * max(c.dim, 2 * c.ffn), (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        assert (
            toy.run._linked.arena.nbytes
            <= backend.workspaces(toy.limits, Widths(widest, c.vocab)).total_bytes
        )
