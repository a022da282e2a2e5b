"""A small random decoder that runs on any backend, and steps to feed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from worker_orcd.config import DeviceConfig
from worker_orcd.kernels.backend import (
    AttentionParams,
    Backend,
    BatchInputs,
    Counts,
    Glu,
    Limits,
    Matrix,
    RopeParams,
)
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.quant import BY_NAME


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library() -> Library:
    """The native library, compiled once a machine; its tests are skipped where no compiler exists."""
    try:
        return load_library()
    except LibraryUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def isas(library: Library) -> Iterator[list[str]]:
    """Every instruction set of this machine. Whatever a test forces is undone."""
    best = library.isa
    yield [name for name in ("scalar", "avx2", "avx512vnni", "neon") if library.force_isa(name)]
    library.force_isa(best)


@pytest.fixture
def same_threads_afterwards(library: Library) -> Iterator[None]:
    """Whatever size a test gives the pool is undone."""
    threads = library.num_threads
    yield
    library.set_threads(threads)


@pytest.fixture
def make_native(library: Library) -> Iterator[Callable[..., NativeBackend]]:
    """A native backend; the pool's size is undone. Float32 throughout unless told."""
    threads = library.num_threads

    def make(cpu_threads: int = 1, **config: Any) -> NativeBackend:
        config = {"cpu_activations": "float32", **config}
        return NativeBackend(library, DeviceConfig(device="cpu", cpu_threads=cpu_threads, **config))

    yield make
    library.set_threads(threads)


def random_matrix(rng: np.random.Generator, name: str, n: int, k: int) -> Matrix:
    """Random weights of about unit gain, in a format that needs no quantiser: Q8_0, Q4_0 or F32."""
    weight_format = BY_NAME[name]
    if name == "F32":
        data = (rng.standard_normal((n, k)) / math.sqrt(k)).astype(np.float32).view(np.uint8)
        return Matrix("w", weight_format, n, k, data)
    blocks = rng.integers(0, 256, (n * k // 32, weight_format.type_size), dtype=np.uint8)
    deviation = {"Q8_0": 74.0, "Q4_0": 4.6}[name]
    scale = np.full(len(blocks), 1 / (deviation * math.sqrt(k)), dtype=np.float16)
    blocks[:, :2] = scale.view(np.uint8).reshape(-1, 2)
    return Matrix("w", weight_format, n, k, blocks.reshape(n, -1))


@dataclass(frozen=True)
class ToyConfig:
    layers: int = 2
    dim: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 96
    vocab: int = 80
    window: int | None = None
    weight_format: str = "Q4_0"
    head_norms: bool = False
    num_experts: int = 0  # 0: a dense feed-forward
    top_k: int = 2
    glu: Glu = Glu.SWIGLU
    sinks: bool = False
    layer_norms: bool = False  # and learned positions, and their GELU: GPT-2's ways
    seed: int = 0


@dataclass
class Chunk:
    """`count` tokens of `token_ids` from `start` on, in blocks `blocks`."""

    token_ids: Sequence[int]
    start: int
    count: int
    blocks: Sequence[int]


@dataclass
class Toy:
    """A decoder with random weights, compiled on one backend."""

    backend: Backend
    config: ToyConfig
    limits: Limits
    num_blocks: int = 256
    caches: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        c, backend = self.config, self.backend
        rng = np.random.default_rng(c.seed)

        def matrix(n: int, k: int) -> Matrix:
            return random_matrix(rng, c.weight_format, n, k)

        def gain(n: int) -> Any:
            return backend.vector((1 + 0.1 * rng.standard_normal(n)).astype(np.float32))

        def norm(n: int) -> Any:
            bias = backend.vector(0.1 * rng.standard_normal(n).astype(np.float32)) if c.layer_norms else None
            return gain(n), bias

        def experts(n: int, k: int, parts: int) -> Any:
            bias = rng.standard_normal((c.num_experts, n)).astype(np.float32)
            stacks = [replace(matrix(c.num_experts * n, k), n=n) for _ in range(parts)]
            return backend.experts(stacks, c.num_experts, [bias, *[None] * (parts - 1)])

        self.table = backend.embedding(matrix(c.vocab, c.dim))
        self.positions = backend.embedding(matrix(1024, c.dim)) if c.layer_norms else None
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.layers = [
            {
                "attn_norm": norm(c.dim),
                "q_norm": gain(c.head_dim),
                "qkv": backend.matrix(
                    [matrix(q, c.dim), matrix(kv, c.dim), matrix(kv, c.dim)],
                    [None, rng.standard_normal(kv).astype(np.float32), None],
                ),
                "o": backend.matrix([matrix(c.dim, q)]),
                "ffn_norm": norm(c.dim),
                "sinks": backend.vector(rng.standard_normal(c.num_heads).astype(np.float32))
                if c.sinks
                else None,
            }
            for _ in range(c.layers)
        ]
        for layer in self.layers:
            if c.num_experts:
                layer["router"] = backend.matrix([matrix(c.num_experts, c.dim)])
                layer["gate_up"] = experts(c.ffn, c.dim, 2)
                layer["down"] = experts(c.dim, c.ffn, 1)
            else:
                layer["gate_up"] = backend.matrix([matrix(c.ffn, c.dim), matrix(c.ffn, c.dim)])
                layer["down"] = backend.matrix([matrix(c.dim, c.ffn)])
        self.norm = norm(c.dim)
        self.caches = [
            backend.allocate_cache(self.num_blocks, self.limits.block_size, c.num_kv_heads, c.head_dim)
            for _ in range(c.layers)
        ]
        frequencies = tuple(10000.0 ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2))
        self.rope = RopeParams(rotary_dim=c.head_dim, inv_freq=frequencies)
        self.attention = AttentionParams(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            window=c.window,
        )
        self.inputs = backend.allocate_inputs(self.limits)
        self.run = backend.compile(self.forward, self.inputs, self.limits)

    def forward(self, inputs: BatchInputs) -> Any:
        b, c = self.backend, self.config
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        x = b.scale(b.embed(inputs.token_ids, self.table), math.sqrt(c.dim))
        if self.positions is not None:
            x = b.add(x, b.embed(inputs.positions, self.positions))
        for weights, cache in zip(self.layers, self.caches, strict=True):
            normed = self._norm(x, weights["attn_norm"])
            q, k, v = b.split(b.linear(normed, weights["qkv"]), [q_width, kv_width, kv_width])
            if c.head_norms:
                q, k = (b.rms_norm(part, weights["q_norm"], 1e-5) for part in (q, k))
            q = b.rope(q, inputs.positions, self.rope, c.head_dim)
            k = b.rope(k, inputs.positions, self.rope, c.head_dim)
            b.store_kv(k, v, cache, inputs)
            attended = b.attention(q, cache, inputs, self.attention, weights["sinks"])
            x = b.add(x, b.linear(attended, weights["o"]))
            if weights is self.layers[-1]:
                x = b.take(x, inputs.logit_tokens)
            x = b.add(x, self._ffn(self._norm(x, weights["ffn_norm"]), weights))
        return b.linear(self._norm(x, self.norm), self.table)

    def _norm(self, x: Any, norm: tuple[Any, Any]) -> Any:
        gain, bias = norm
        if bias is None:
            return self.backend.rms_norm(x, gain, 1e-5)
        return self.backend.layer_norm(x, gain, bias, 1e-5)

    def _ffn(self, x: Any, weights: dict[str, Any]) -> Any:
        b, c = self.backend, self.config
        if c.num_experts:
            routing = b.route(b.linear(x, weights["router"]), c.top_k)
            gate, up = b.expert_linear(x, weights["gate_up"], routing)
            (out,) = b.expert_linear(b.glu(c.glu, gate, up), weights["down"], routing)
            return b.combine(out, routing)
        gate, up = b.split(b.linear(x, weights["gate_up"]), [c.ffn, c.ffn])
        hidden = b.gelu(gate) if c.layer_norms else b.glu(c.glu, gate, up)
        return b.linear(hidden, weights["down"])

    def step(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """One step; logits of every token of every chunk (max_rows equals max_tokens in a toy)."""
        counts = fill(self.inputs, chunks, self.limits)
        logits = self.run(counts).numpy().copy()
        ends = np.cumsum([chunk.count for chunk in chunks])
        return np.split(logits, ends[:-1])

    def logits(self, token_ids: Sequence[int], blocks: Sequence[int], chunk: int) -> np.ndarray:
        """(len(token_ids), vocab): the sequence alone, `chunk` tokens a step."""
        parts = [
            self.step([Chunk(token_ids, start, min(chunk, len(token_ids) - start), blocks)])[0]
            for start in range(0, len(token_ids), chunk)
        ]
        return np.concatenate(parts)


def fill(inputs: BatchInputs, chunks: Sequence[Chunk], limits: Limits) -> Counts:
    """Write a step into the buffers; every token gives logits."""
    token = 0
    inputs.query_start[0] = 0
    inputs.block_tables.zero_()
    for row, chunk in enumerate(chunks):
        end = chunk.start + chunk.count
        positions = np.arange(chunk.start, end)
        where = slice(token, token + chunk.count)
        blocks = np.array(chunk.blocks)
        inputs.token_ids[where] = torch.tensor(list(chunk.token_ids[chunk.start : end]))
        inputs.positions[where] = torch.tensor(positions)
        slots = blocks[positions // limits.block_size] * limits.block_size + positions % limits.block_size
        inputs.slots[0, where] = torch.tensor(slots)
        token += chunk.count
        inputs.query_start[row + 1] = token
        inputs.context_lens[row] = end
        used = -(-end // limits.block_size)
        inputs.block_tables[0, row, :used] = torch.tensor(blocks[:used])
    inputs.logit_tokens[:token] = torch.arange(token)
    return Counts(token, len(chunks), token)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    def make(backend: Backend, *, max_tokens: int = 256, block_size: int = 16, **config: Any) -> Toy:
        return Toy(backend, ToyConfig(**config), Limits(max_tokens, max_tokens, 64, block_size))

    return make


@pytest.fixture
def make_chunk() -> type[Chunk]:
    return Chunk


@pytest.fixture
def make_matrix() -> Callable[..., Matrix]:
    return random_matrix


@pytest.fixture
def run_op() -> Callable[..., np.ndarray]:
    """Run `operation(backend, inputs, *tensors)` on arrays of shape (tokens, width), on any backend.

    The arrays arrive as columns of an F32 embedding table, row t for token t, which is exact.
    """

    def run(
        backend: Backend,
        operation: Callable[..., Any],
        arrays: Sequence[np.ndarray],
        positions: Sequence[int] | None = None,
        logit_tokens: Sequence[int] = (),
    ) -> np.ndarray:
        joined = np.concatenate(arrays, axis=1).astype(np.float32)
        tokens, width = joined.shape
        table = backend.embedding(Matrix("t", BY_NAME["F32"], tokens, width, joined.view(np.uint8)))
        limits = Limits(tokens, tokens, 1, 16)
        inputs = backend.allocate_inputs(limits)

        def forward(symbolic: BatchInputs) -> Any:
            x = backend.embed(symbolic.token_ids, table)
            return operation(backend, symbolic, *backend.split(x, [array.shape[1] for array in arrays]))

        step = backend.compile(forward, inputs, limits)
        inputs.token_ids.copy_(torch.arange(tokens))
        inputs.positions.copy_(torch.tensor(list(positions or range(tokens))))
        inputs.query_start.copy_(torch.arange(tokens + 1))
        inputs.logit_tokens[: len(logit_tokens)] = torch.tensor(list(logit_tokens), dtype=torch.int32)
        return step(Counts(tokens, tokens, len(logit_tokens))).numpy().copy()

    return run
