"""Matrix products through the native library, as one-operation programs, and random weights to feed them."""

from __future__ import annotations

import ctypes
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


def in_a_fresh_process(script: str) -> str:
    """Run Python that may fork, crash or leave threads behind; returns what it prints."""
    root = Path(__file__).parents[2]
    path = f"import sys; sys.path[:0] = [{str(root / 'src')!r}, {str(root / 'tests')!r}]\n"
    command = [sys.executable, "-W", "ignore", "-c", path + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout
