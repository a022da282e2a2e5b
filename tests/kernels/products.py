"""Matrix products through the native library, as one-operation programs, and random weights to feed them."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worker_orcd.kernels.cpu.library import Batch, Kind, Library, Op
from worker_orcd.quant import BY_NAME, WeightFormat

HALVES = {  # where a block keeps float16 scales and minima, in bytes
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
CANARY = np.float32(-7.25)


def random_rows(rng: np.random.Generator, name: str, n: int, k: int) -> np.ndarray:
    """(n, row_bytes) uint8: every bit random, but for scales of sensible size."""
    weight_format = BY_NAME[name]
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((n, k)).astype(np.float32)
        if name == "F16":
            values = values.astype(np.float16)
        if name == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8)
    shape = (n, k // weight_format.block_size, weight_format.type_size)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    for at in HALVES.get(name, ()):
        scales = rng.uniform(-0.02, 0.02, (*shape[:2], 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    if name == "MXFP4":
        blocks[:, :, 0] = rng.integers(118, 124, shape[:2])
    return blocks.reshape(n, -1)


def random_activations(rng: np.random.Generator, tokens: int, k: int) -> np.ndarray:
    """(tokens, k) float32, normal with some values twenty times as large."""
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    x[:, 5::97] *= 20
    return x


@dataclass(frozen=True)
class Product:
    """A packed matrix of one library, and its dequantised weights by the numpy reference."""

    library: Library
    format: WeightFormat
    n: int
    k: int
    packed: np.ndarray
    weights: np.ndarray  # (n, k) float32

    def operation(
        self, x: np.ndarray, out: np.ndarray, activations: int, bias: np.ndarray | None = None
    ) -> Op:
        return Op(
            kind=Kind.LINEAR,
            x=x.ctypes.data,
            out=out.ctypes.data,
            ldx=x.strides[0] // 4,
            ldout=out.strides[0] // 4,
            n=self.n,
            k=self.k,
            weight=self.packed.ctypes.data,
            format=self.format.ggml_type,
            activations=activations,
            vector=None if bias is None else bias.ctypes.data,
        )

    def __call__(self, x: np.ndarray, activations: int, bias: np.ndarray | None = None) -> np.ndarray:
        """(tokens, n). Also sees to it that nothing beside the output is written."""
        tokens = len(x)
        out = np.full((tokens + 1, self.n + 19), CANARY)
        assert run(self.library, [self.operation(x, out[:, 3:], activations, bias)], tokens) == 0
        result = out[:tokens, 3 : 3 + self.n].copy()
        out[:tokens, 3 : 3 + self.n] = CANARY
        assert (out == CANARY).all()
        return result


@dataclass(frozen=True)
class ExpertProduct:
    """A stack of matrices, an expert's after the other's, packed and dequantised."""

    library: Library
    format: WeightFormat
    n: int
    k: int
    packed: np.ndarray  # (num_experts, bytes)
    weights: np.ndarray  # (num_experts, n, k) float32

    def operations(
        self,
        arrays: ExpertArrays,
        activations: int,
        bias: np.ndarray | None = None,
    ) -> list[Op]:
        """Route by the logits, then multiply."""
        logits, routing, x, out = arrays.logits, arrays.routing, arrays.x, arrays.out
        num_experts, top_k = len(self.packed), arrays.top_k
        route = Op(
            kind=Kind.ROUTE, x=logits.ctypes.data, ldx=logits.strides[0] // 4, out=routing.ctypes.data,
            ldout=routing.strides[0] // 4, n=num_experts, top_k=top_k,
        )  # fmt: skip
        multiply = Op(
            kind=Kind.EXPERT_LINEAR,
            x=x.ctypes.data,
            y=routing.ctypes.data,
            out=out.ctypes.data,
            ldx=x.strides[0] // 4,
            ldy=routing.strides[0] // 4,
            ldout=out.strides[0] // 4,
            n=self.n,
            k=self.k,
            weight=self.packed.ctypes.data,
            format=self.format.ggml_type,
            activations=activations,
            vector=None if bias is None else bias.ctypes.data,
            width=0 if x.shape[1] == self.k else self.k,
            num_experts=num_experts,
            top_k=top_k,
        )
        return [route, multiply]

    def __call__(
        self,
        x: np.ndarray,
        logits: np.ndarray,
        top_k: int,
        activations: int,
        bias: np.ndarray | None = None,
    ) -> np.ndarray:
        """(tokens, top_k, n). `x` is (tokens, k) or (tokens, top_k * k). Nothing else is written."""
        tokens, width = len(x), top_k * self.n
        whole = np.full((tokens + 1, width + 19), CANARY)
        routing = np.full((tokens + 1, 5 * top_k + 3), CANARY)
        arrays = ExpertArrays(x, logits, routing, whole[:, 3:], top_k)
        assert run(self.library, self.operations(arrays, activations, bias), tokens) == 0
        result = whole[:tokens, 3 : 3 + width].copy()
        whole[:tokens, 3 : 3 + width] = routing[:tokens, : 5 * top_k] = CANARY
        assert (whole == CANARY).all()
        assert (routing == CANARY).all()
        return result.reshape(tokens, top_k, self.n)

    def exactly(self, x: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """(tokens, top_k, n) in float64."""
        tokens, top_k = experts.shape
        slots = np.broadcast_to(x[:, None], (tokens, top_k, self.k)) if x.shape[1] == self.k else x
        inputs = slots.reshape(tokens, top_k, self.k).astype(np.float64)
        return np.einsum("tsnk,tsk->tsn", self.weights[experts].astype(np.float64), inputs)


@dataclass(frozen=True)
class ExpertArrays:
    x: np.ndarray
    logits: np.ndarray
    routing: np.ndarray
    out: np.ndarray
    top_k: int


def highest(logits: np.ndarray, top_k: int) -> np.ndarray:
    """(tokens, top_k): the experts a routing must name; logits without NaN."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def make_experts(library: Library, name: str, num_experts: int, n: int, k: int) -> ExpertProduct:
    products = [make_product(library, name, n, k, seed) for seed in range(num_experts)]
    size = products[0].packed.nbytes
    buffer = np.zeros(num_experts * size + 64, np.uint8)
    packed = buffer[-buffer.ctypes.data % 64 :][: num_experts * size].reshape(num_experts, size)
    packed[:] = [product.packed for product in products]
    weights = np.stack([product.weights for product in products])
    return ExpertProduct(library, BY_NAME[name], n, k, packed, weights)


def run(library: Library, operations: Sequence[Op], tokens: int, token_ids: np.ndarray | None = None) -> int:
    program = (Op * len(operations))(*operations)
    batch = Batch(num_tokens=tokens, token_ids=None if token_ids is None else token_ids.ctypes.data)
    return library.run(program, len(operations), ctypes.byref(batch))


def pack(library: Library, weight_format: WeightFormat, rows: np.ndarray, k: int) -> np.ndarray:
    """64-byte aligned."""
    n = len(rows)
    size = library.packed_bytes(weight_format.ggml_type, n, k)
    assert size is not None
    buffer = np.zeros(size + 64, np.uint8)
    packed = buffer[-buffer.ctypes.data % 64 :][:size]
    source = np.ascontiguousarray(rows)
    assert library.pack(weight_format.ggml_type, (n, k), (0, n), source.ctypes.data, packed.ctypes.data)
    return packed


def make_product(library: Library, name: str, n: int, k: int, seed: int = 0) -> Product:
    rows = random_rows(np.random.default_rng([seed, n, k]), name, n, k)
    weight_format = BY_NAME[name]
    weights = weight_format.dequantize_rows(rows)
    return Product(library, weight_format, n, k, pack(library, weight_format, rows, k), weights)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


_guarded: list[mmap.mmap] = []


def before_a_guard_page(data: np.ndarray) -> np.ndarray:
    """A copy that ends where a page begins that may not be touched. For processes that may crash."""
    size = -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _guarded.append(memory)
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    moved = np.frombuffer(memory, data.dtype, data.size, size - data.nbytes).reshape(data.shape)
    moved[:] = data
    return moved


def in_a_fresh_process(script: str) -> str:
    """Run Python that may fork, crash or leave threads behind; returns what it prints."""
    root = Path(__file__).parents[2]
    path = f"import sys; sys.path[:0] = [{str(root / 'src')!r}, {str(root / 'tests')!r}]\n"
    command = [sys.executable, "-W", "ignore", "-c", path + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout
