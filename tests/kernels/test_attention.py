"""Paged attention of the native backend: against the reference, and bit for bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from worker_orcd.errors import Internal, InvalidConfiguration
from worker_orcd.kernels.backend import AttentionParams, Counts, Limits, Matrix
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.quant import BY_NAME

BLOCK = 16


@dataclass
class Context:
    """q, k and v of one sequence, as an embedding table: token t of the sequence is row t."""

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    window: int | None = None
    block_size: int = BLOCK
    sinks: tuple[float, ...] = ()  # repeated for all heads
    seed: int = 0

    @property
    def widths(self):
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]

    @property
    def num_blocks(self):
        return -(-self.length // self.block_size) + 8

    def table(self):
        rng = np.random.default_rng(self.seed)
        data = rng.standard_normal((self.length, sum(self.widths)), dtype=np.float32)
        return Matrix("t", BY_NAME["F32"], *data.shape, data.view(np.uint8))

    def blocks(self, seed=0):
        return 1 + np.random.default_rng(seed).permutation(self.num_blocks - 1)


class Attention:
    """A forward pass of nothing but store_kv and attention over one cache."""

    def __init__(self, backend, context, *, max_tokens=256, max_rows=32, garbage=None, groups=(0, 1)):
        self.context = context
        c = context
        self.group, num_groups = groups
        self.limits = Limits(max_tokens, max_rows, c.num_blocks, c.block_size, num_groups)
        table = backend.embedding(c.table())
        cache = backend.allocate_cache(c.num_blocks, c.block_size, c.kv_heads, c.head_dim)
        self.cache = replace(cache, group=self.group)
        if garbage is not None:
            self.cache.tensor.data[:] = garbage
        params = AttentionParams(
            num_heads=c.heads,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            window=c.window,
        )
        sinks = backend.vector(np.resize(np.array(c.sinks, np.float32), c.heads)) if c.sinks else None

        def forward(inputs):
            q, k, v = backend.split(backend.embed(inputs.token_ids, table), c.widths)
            backend.store_kv(k, v, self.cache, inputs)
            attended = backend.attention(q, self.cache, inputs, params, sinks)
            return backend.take(attended, inputs.logit_tokens)

        self.inputs = backend.allocate_inputs(self.limits)
        self.run = backend.compile(forward, self.inputs, self.limits)

    def step(self, rows, wanted=None):
        """`rows`: (start, count, blocks), chunks of the sequence. Attention of the step's wanted tokens."""
        inputs, token = self.inputs, 0
        for index, (start, count, blocks) in enumerate(rows):
            positions = np.arange(start, start + count)
            where = slice(token, token + count)
            inputs.token_ids[where] = torch.tensor(positions)
            inputs.positions[where] = torch.tensor(positions)
            size = self.context.block_size
            inputs.slots[self.group, where] = torch.tensor(
                blocks[positions // size] * size + positions % size
            )
            token += count
            inputs.query_start[index + 1] = token
            inputs.context_lens[index] = start + count
            inputs.block_tables[self.group, index, : len(blocks)] = torch.tensor(blocks)
        wanted = range(max(0, token - self.limits.max_rows), token) if wanted is None else wanted
        inputs.logit_tokens[: len(wanted)] = torch.tensor(list(wanted), dtype=torch.int32)
        return self.run(Counts(token, len(rows), len(wanted))).numpy().copy()

    def last(self, count, chunk, blocks):
        """Attention of the sequence's last `count` tokens, computed `chunk` tokens a step."""
        length, out = self.context.length, []
        for start in range(0, length, chunk):
            size = min(chunk, length - start)
            wanted = [i for i in range(size) if start + i >= length - count]
            out.append(self.step([(start, size, blocks)], wanted))
        return np.concatenate(out)


SHAPES = [
    Context(9, 3, 64, 40),
    Context(4, 4, 32, 100),
    Context(8, 2, 128, 70),
    Context(8, 1, 80, 50),
    Context(6, 2, 40, 33),
    Context(2, 1, 256, 20),
    Context(40, 1, 16, 20),
    Context(3, 1, 96, 90, window=17),
    Context(3, 3, 64, 90, window=1),
    Context(4, 2, 64, 100, block_size=48),
    Context(8, 2, 64, 70, sinks=(0.5, -3.0, 8.0)),
    Context(6, 3, 96, 40, window=5, sinks=(2.0, 40.0)),
    Context(4, 1, 256, 20, sinks=(-1.0,)),
    Context(9, 3, 40, 33, window=1, sinks=(0.0, 1.0)),
]


@pytest.mark.parametrize("kv", ["float32", "float16"])
@pytest.mark.parametrize("context", SHAPES, ids=str)
def test_native_agrees_with_the_reference(context, kv, make_native):
    blocks = context.blocks()
    got = Attention(make_native(kv_cache_dtype=kv), context).last(32, 256, blocks)
    same = Attention(ReferenceBackend(kv), context).last(32, 256, blocks)
    np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-5)
    exact = Attention(ReferenceBackend(), context).last(32, 256, blocks)
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-3)


LONG = [
    Context(6, 2, 64, 1600),
    Context(3, 1, 32, 1300, window=600),
    Context(4, 4, 48, 1100, window=100, block_size=32),
    Context(6, 2, 64, 1500, sinks=(1.0, 30.0, -2.0)),
]


@pytest.mark.parametrize("context", LONG, ids=str)
def test_contexts_of_several_splits(context, make_native):
    blocks = context.blocks()
    want = Attention(ReferenceBackend(), context, max_tokens=2048).last(8, 2048, blocks)
    got = Attention(make_native(), context, max_tokens=2048).last(8, 2048, blocks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv", ["float32", "float16"])
@pytest.mark.parametrize("context", [*LONG, SHAPES[2], SHAPES[4], SHAPES[7], SHAPES[10]], ids=str)
def test_bits_depend_on_nothing_but_the_prefix(context, kv, make_native, isas, library):
    want = Attention(make_native(kv_cache_dtype=kv), context).last(30, 256, context.blocks())
    for isa in isas if context.length < 200 else [isas[-1]]:
        library.force_isa(isa)
        for threads, chunk, seed in ((1, 7, 1), (2, 256, 2), (2, 61, 3), (3, 19, 4)):
            got = Attention(make_native(threads, kv_cache_dtype=kv), context).last(
                30, chunk, context.blocks(seed)
            )
            np.testing.assert_array_equal(
                got, want, err_msg=f"{isa}, {threads} threads, {chunk} tokens a step"
            )


@pytest.mark.parametrize("sinks", [(), (1.0, -2.0)])
@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_alone_and_among_others_is_prefill(threads, sinks, make_native):
    context = Context(6, 2, 64, 1400, sinks=sinks)
    attention = Attention(make_native(threads), context, garbage=0xFF)
    blocks = context.blocks()
    want = attention.last(32, 256, blocks)  # of 1368 … 1399
    alone = attention.step([(1390, 1, blocks)])
    np.testing.assert_array_equal(alone[0], want[1390 - 1368])
    rows = [(1368, 3, blocks), (1380, 1, blocks), (1381, 1, blocks), (1390, 10, blocks)]
    together = attention.step(rows)
    positions = [1368, 1369, 1370, 1380, 1381, *range(1390, 1400)]
    np.testing.assert_array_equal(together, want[np.array(positions) - 1368])
    many = attention.step([(1368 + i, 1, blocks) for i in range(32)])
    np.testing.assert_array_equal(many, want)


@pytest.mark.parametrize("length", [20, 1100])
def test_a_sink_may_be_far_above_or_below_all_scores(length, make_native, isas, library):
    """Far below it changes nothing; far above it takes all the weight, and nothing overflows."""
    blocks = Context(4, 2, 64, length).blocks()
    for isa in isas:
        library.force_isa(isa)
        backend = make_native(2)
        plain = Attention(backend, Context(4, 2, 64, length)).last(4, 256, blocks).reshape(4, 4, 64)
        sinks = (-1e30, 300.0, -np.inf, 3e38)
        found = Attention(backend, Context(4, 2, 64, length, sinks=sinks)).last(4, 256, blocks)
        found = found.reshape(4, 4, 64)
        np.testing.assert_array_equal(found[:, 0], plain[:, 0])
        np.testing.assert_array_equal(found[:, 2], plain[:, 2])
        np.testing.assert_array_equal(found[:, [1, 3]], 0)


def test_a_sink_is_one_more_score(make_native):
    """With one token in sight its V counts e^score / (e^score + e^sink)."""
    context = Context(2, 1, 16, 5, window=1, sinks=(0.25, -0.75))
    q, k, v = np.split(context.table().data.view(np.float32).astype(np.float64), [32, 48], axis=1)
    scores = np.einsum("thd,td->th", q.reshape(5, 2, 16), k) / 4
    share = 1 / (1 + np.exp(np.array(context.sinks) - scores))
    found = Attention(make_native(), context).last(5, 5, context.blocks())
    np.testing.assert_allclose(found.reshape(5, 2, 16), share[:, :, None] * v[:, None], rtol=1e-5)


def test_as_many_tokens_as_rows_need_not_be_one_each(make_native):
    context = Context(6, 2, 32, 40)
    attention = Attention(make_native(2), context)
    blocks = context.blocks()
    want = attention.last(4, 64, blocks)
    got = attention.step([(36, 2, blocks), (38, 0, blocks), (38, 2, blocks), (40, 0, blocks)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kv", ["float32", "float16"])
@pytest.mark.parametrize("context", [SHAPES[0], SHAPES[4], SHAPES[7], LONG[1]], ids=str)
def test_what_unused_slots_hold_never_leaks(context, kv, make_native, isas, library):
    """Every byte of the cache is a NaN's before the sequence comes."""
    blocks = context.blocks()
    for isa in isas:
        library.force_isa(isa)
        backend = make_native(2, kv_cache_dtype=kv)
        want = Attention(backend, context).last(32, 64, blocks)
        got = Attention(backend, context, garbage=0xFF).last(32, 64, blocks)
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(got, want)


def test_a_window_forgets_what_is_behind_it(make_native):
    """Freed blocks before the window may be reused: their contents, and their table entries, are not read."""
    context = Context(3, 1, 32, 1300, window=40)
    attention = Attention(make_native(2), context)
    blocks = context.blocks()
    want = attention.last(1, 256, blocks)
    freed = blocks.copy()
    freed[: (1300 - 40 - BLOCK) // BLOCK] = 0
    attention.cache.tensor.data[: attention.cache.tensor.data.size // context.num_blocks] = 0xFF  # block 0
    np.testing.assert_array_equal(attention.step([(1299, 1, freed)]), want)


@pytest.mark.parametrize("group", [1, 2])
def test_a_layer_goes_by_the_blocks_of_its_group(group, make_native):
    context = Context(3, 1, 32, 300, window=40)
    for backend in (make_native(2), ReferenceBackend()):
        want = Attention(backend, context).last(20, 64, context.blocks())
        other = Attention(backend, context, groups=(group, 3))
        np.testing.assert_array_equal(other.last(20, 64, context.blocks(seed=1)), want)
    with pytest.raises(Internal, match=f"a layer of cache group {group}; a step has 1 of them"):
        Attention(make_native(), context, groups=(group, 1))


def test_float16_is_rounded_to_nearest_even_on_every_isa(make_native, isas, library):
    rng = np.random.default_rng(5)
    random = rng.integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    random[np.isnan(random)] = 1.0
    special = np.array(
        [0.0, -0.0, 65504, 65519, 65520, 1e9, -np.inf, np.inf, 2**-24, 2**-25, 2**-25 * 1.01, 6e-8]
    )
    small = rng.standard_normal(4084) * 10.0 ** rng.uniform(-9, 5, 4084)
    values = np.concatenate([random, np.concatenate([special, small]).astype(np.float32)]).reshape(-1, 16)
    table = Matrix("t", BY_NAME["F32"], *values.shape, values.view(np.uint8))
    with np.errstate(over="ignore"):
        want = values.astype(np.float16).view(np.uint16)
    for isa in isas:
        library.force_isa(isa)
        backend = make_native(kv_cache_dtype="float16")
        limits = Limits(512, 1, 64, BLOCK)
        cache = backend.allocate_cache(len(values) // BLOCK + 1, BLOCK, 1, 16)
        packed, inputs = backend.embedding(table), backend.allocate_inputs(limits)

        def forward(symbolic, backend=backend, packed=packed, cache=cache):
            x = backend.embed(symbolic.token_ids, packed)
            backend.store_kv(x, x, cache, symbolic)
            return x

        inputs.token_ids[:] = torch.arange(512)
        inputs.slots[0] = torch.arange(512)
        backend.compile(forward, inputs, limits)(Counts(512, 1, 1))
        tiles = cache.tensor.data.view(np.uint16).reshape(-1, 2, 16, 16)[: 512 // BLOCK]
        np.testing.assert_array_equal(tiles[:, 1].reshape(512, 16), want)
        np.testing.assert_array_equal(tiles[:, 0].transpose(0, 2, 1).reshape(512, 16), want)


def test_shapes_the_cache_cannot_have_are_refused(make_native):
    backend = make_native()
    with pytest.raises(InvalidConfiguration, match="block_size is 8"):
        backend.allocate_cache(4, 8, 1, 64)
    with pytest.raises(Internal, match="the cache has 2 of 64"):
        wrong = Context(6, 2, 64, 16)
        other = backend.allocate_cache(4, 16, 2, 64)
        params = AttentionParams(num_heads=6, num_kv_heads=3, head_dim=32, scale=1.0)
        table = backend.embedding(wrong.table())
        limits = Limits(16, 16, 4, 16)

        def forward(inputs):
            q, _, _ = backend.split(backend.embed(inputs.token_ids, table), wrong.widths)
            return backend.attention(q, other, inputs, params)

        backend.compile(forward, backend.allocate_inputs(limits), limits)


def test_block_bytes_are_what_is_allocated(make_native):
    for kv, size in (("float32", 4), ("float16", 2)):
        backend = make_native(kv_cache_dtype=kv)
        assert backend.cache_block_bytes(16, 3, 64) == 2 * 16 * 3 * 64 * size
        cache = backend.allocate_cache(7, 32, 3, 64)
        assert cache.tensor.data.nbytes == 7 * backend.cache_block_bytes(32, 3, 64)
        assert not cache.tensor.data.any()
