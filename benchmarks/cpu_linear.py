"""
The CPU backend's matrix products against ggml's, from the same bytes, interleaved in one run.

    python benchmarks/cpu_linear.py                          # the table of docs/perf/cpu-kernels.md
    python benchmarks/cpu_linear.py --formats Q4_K --tokens 1 8 512 --threads 1 --isa avx2

ggml is reached through the C functions that the xllamacpp wheel exports (`pip install xllamacpp`); without
it only our own figures are printed. One token is measured cold: copies of the matrix, together larger than
the last level cache, one after the other in one program (ggml: one graph). Every round runs all contenders
once, in turn; figures are medians over rounds, a ratio is the median of the ratios within rounds, against
the better of ggml's plain and repacked forms.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker_orcd.kernels.cpu.build import SOURCES, load_library
from worker_orcd.kernels.cpu.library import Batch, Kind, Library, Op
from worker_orcd.quant import FORMATS, WeightFormat

DEFAULT_FORMATS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "Q5_0", "Q5_1", "Q5_K", "IQ4_NL")
FEW_TOKENS = 16  # up to here reading the weights is what takes the time
READING_BYTES = 256 << 20
HALF_SCALES = {  # where a block keeps float16 scales, in bytes
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_rows(fmt: WeightFormat, n: int, k: int) -> NDArray[np.uint8]:
    """(n, row_bytes) of random weights with small scales."""
    rng = np.random.default_rng(0)
    if fmt.name == "F32":
        return rng.standard_normal((n, k), np.float32).view(np.uint8)
    if fmt.block_size == 1:
        values = rng.standard_normal((n, k), np.float32)
        return (
            values.astype(np.float16) if fmt.name == "F16" else values.view(np.uint16)[:, 1::2].copy()
        ).view(np.uint8)
    blocks = rng.integers(0, 256, (n, k // fmt.block_size, fmt.type_size), dtype=np.uint8)
    for at in HALF_SCALES.get(fmt.name, ()):
        scales = rng.uniform(-0.02, 0.02, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    if fmt.name == "MXFP4":
        blocks[:, :, 0] = rng.integers(118, 124, blocks.shape[:2])
    return blocks.reshape(n, -1)


def aligned(size: int) -> NDArray[np.uint8]:
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size]


class Ours:
    """`copies` products as one program."""

    def __init__(
        self, library: Library, fmt: WeightFormat, rows: NDArray[np.uint8], k: int, copies: int, tokens: int
    ) -> None:
        n = rows.shape[0]
        size = library.packed_bytes(fmt.ggml_type, n, k)
        if size is None:
            raise SystemExit(f"no kernel for {fmt.name}")
        packed = aligned(size)
        library.pack(fmt.ggml_type, (n, k), (0, n), rows.ctypes.data, packed.ctypes.data)
        self._library = library
        self._weights = [packed]
        for _ in range(copies - 1):
            self._weights.append(aligned(size))
            self._weights[-1][:] = packed
        self.x = np.zeros((tokens, k), np.float32)
        self.out = np.zeros((tokens, n), np.float32)
        self._ops = (Op * copies)(*(self._op(fmt, w, n, k) for w in self._weights))
        self._batch = Batch(num_tokens=tokens)

    def _op(self, fmt: WeightFormat, weight: NDArray[np.uint8], n: int, k: int) -> Op:
        return Op(
            kind=Kind.LINEAR, x=self.x.ctypes.data, out=self.out.ctypes.data, ldx=k, ldout=n, n=n, k=k,
            weight=weight.ctypes.data, format=fmt.ggml_type, activations=8,
        )  # fmt: skip

    def run(self) -> None:
        if self._library.run(self._ops, len(self._ops), ctypes.byref(self._batch)) != 0:
            raise SystemExit("the program was refused")


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """ggml's C interface, as far as a graph of matrix products needs it."""

    def __init__(self) -> None:
        spec = find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise ImportError("xllamacpp")
        self._library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        self.backend = self("ggml_backend_cpu_init", c_void_p)()

    def __call__(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self._library[name]
        function.restype = result
        function.argtypes = list(arguments)
        return function

    def set_threads(self, threads: int) -> None:
        self("ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)(self.backend, threads)

    def features(self) -> str:
        names = ("avx2", "avx512", "avx512_vnni", "avx_vnni", "llamafile")
        return ", ".join(name for name in names if self(f"ggml_cpu_has_{name}", c_int)())

    def buffer_type(self, repack: bool) -> Any:
        name = "_Z35ggml_backend_cpu_repack_buffer_typev" if repack else "ggml_backend_cpu_buffer_type"
        return self(name, c_void_p)()


class GgmlProducts:
    """`copies` products as one graph."""

    def __init__(
        self,
        ggml: Ggml,
        fmt: WeightFormat,
        rows: NDArray[np.uint8],
        k: int,
        copies: int,
        tokens: int,
        repack: bool,
    ) -> None:
        self._ggml = ggml
        n = rows.shape[0]
        new = ggml("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
        multiply = ggml("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
        write = ggml("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
        expand = ggml("ggml_build_forward_expand", None, c_void_p, c_void_p)
        self._contexts = [
            ggml("ggml_init", c_void_p, _InitParams)(_InitParams(16 << 20, None, True)) for _ in range(2)
        ]
        weights = [new(self._contexts[0], fmt.ggml_type, k, n) for _ in range(copies)]
        self._buffers = [self._allocate(self._contexts[0], ggml.buffer_type(repack))]
        if repack and not self._is_repacked(weights[0]):
            raise NotImplementedError
        for weight in weights:
            write(weight, rows.ctypes.data, 0, rows.nbytes)
        self._x = new(self._contexts[1], 0, k, tokens)
        self._outs = [multiply(self._contexts[1], weight, self._x) for weight in weights]
        self._graph = ggml("ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool)(
            self._contexts[1], 4096, False
        )
        for out in self._outs:
            expand(self._graph, out)
        self._buffers.append(self._allocate(self._contexts[1], ggml.buffer_type(False)))
        self._compute = ggml("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
        self._shape = (tokens, n)

    def _is_repacked(self, tensor: Any) -> bool:
        """Whether the repacking buffer took the tensor: `extra`, the field after the name, is set."""
        name_at = self._ggml("ggml_get_name", c_void_p, c_void_p)(tensor)
        return bool(c_void_p.from_address(name_at + 64).value)

    def _allocate(self, context: Any, buffer_type: Any) -> Any:
        allocate = self._ggml("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
        buffer = allocate(context, buffer_type)
        if buffer is None:
            raise MemoryError
        return buffer

    def set_x(self, x: NDArray[np.float32]) -> None:
        self._ggml("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)(
            self._x, x.ctypes.data, 0, x.nbytes
        )

    def run(self) -> None:
        self._compute(self._ggml.backend, self._graph)

    def out(self) -> NDArray[np.float32]:
        out = np.empty(self._shape, np.float32)
        read = self._ggml("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
        read(self._outs[0], out.ctypes.data, 0, out.nbytes)
        return out

    def close(self) -> None:
        for buffer in self._buffers:
            self._ggml("ggml_backend_buffer_free", None, c_void_p)(buffer)
        for context in self._contexts:
            self._ggml("ggml_free", None, c_void_p)(context)


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def reading(library: Library) -> Ours:
    """256 MiB of float32 weights times one token: so few operations a byte that only reading takes time."""
    fmt = next(f for f in FORMATS.values() if f.name == "F32")
    n, k = READING_BYTES // 16384, 4096
    return Ours(library, fmt, np.zeros((n, 4 * k), np.uint8), k, 1, 1)


def measure(
    library: Library,
    ggml: Ggml | None,
    limit: Ours,
    fmt: WeightFormat,
    tokens: int,
    args: argparse.Namespace,
) -> None:
    n, k = args.shape
    rows = random_rows(fmt, n, k)
    copies = max(1, (args.megabytes << 20) // rows.nbytes) if tokens <= FEW_TOKENS else 1
    x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
    ours = Ours(library, fmt, rows, k, copies, tokens)
    ours.x[:] = x
    theirs: dict[str, GgmlProducts] = {}
    for name, repack in (("repacked", True), ("plain", False)):
        if ggml is None or fmt.name in args.skip_peer:
            continue
        with contextlib.suppress(NotImplementedError):
            theirs[name] = GgmlProducts(ggml, fmt, rows, k, copies, tokens, repack)
            theirs[name].set_x(x)
    for threads in args.threads:
        library.set_threads(threads)
        if ggml is not None:
            ggml.set_threads(threads)
        figures = run_rounds(library, limit, ours, theirs, args)
        report(figures, fmt, (tokens, threads, rows.nbytes * copies, n * k * tokens * copies))
    for products in theirs.values():
        products.close()


def run_rounds(
    library: Library, limit: Ours, ours: Ours, theirs: dict[str, GgmlProducts], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every round, by contender; "reading" is the pass over memory."""
    contenders: dict[str, Callable[[], None]] = {"reading": limit.run}
    contenders.update((isa, ours.run) for isa in args.isa)
    contenders.update((f"ggml {name}", products.run) for name, products in theirs.items())
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, run in contenders.items():
            library.force_isa(name if name in args.isa else args.isa[0])
            elapsed = timed(run)
            if turn:  # the first is to warm up
                figures[name].append(elapsed)
            time.sleep(args.gap)
    return figures


def report(figures: dict[str, list[float]], fmt: WeightFormat, facts: tuple[int, int, int, int]) -> None:
    """Gigabytes of weights a second for few tokens, multiply-adds for many."""
    tokens, threads, size, macs = facts
    few = tokens <= FEW_TOKENS
    amount, unit = (size, "GB/s") if few else (macs, "GMAC/s")
    limit = READING_BYTES / statistics.median(figures.pop("reading")) / 1e9
    peers = [times for name, times in figures.items() if name.startswith("ggml")]
    best = min(peers, key=statistics.median) if peers else None
    for name, times in figures.items():
        median, fastest = (amount / seconds / 1e9 for seconds in (statistics.median(times), min(times)))
        cells = [f"{fmt.name:7} {tokens:4} {threads} {name:14} {median:7.1f} {fastest:7.1f} {unit:6}"]
        cells.append(f"{median / limit:5.0%}" if few else "     ")
        if best is not None and not name.startswith("ggml"):
            ratios = (theirs / ours for ours, theirs in zip(times, best, strict=True))
            cells.append(f"{statistics.median(ratios):5.2f}")
        print(*cells, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT_FORMATS))
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 3072], metavar=("N", "K"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--isa", nargs="+", help="default: what this machine uses, and avx2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--gap", type=float, default=0.003, help="seconds between runs")
    parser.add_argument("--megabytes", type=int, default=96, help="of weights that a cold pass reads")
    parser.add_argument(
        "--sources", type=Path, default=SOURCES, help="of the native library, to try another version"
    )
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--skip-peer", nargs="*", default=[], help="formats that are not given to ggml")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    library = load_library(args.sources)
    args.isa = args.isa or list(dict.fromkeys((library.isa, "avx2")))
    ggml = None
    if not args.no_peer:
        try:
            ggml = Ggml()
        except ImportError:
            print("xllamacpp is not installed: no comparison", file=sys.stderr)
    print(f"{library.isa}, load {os.getloadavg()}, ggml: {ggml.features() if ggml else 'none'}")
    print("format  tokens threads kernels  median  best  of reading limit  x ggml")
    limit = reading(library)
    for name in args.formats:
        fmt = next(f for f in FORMATS.values() if f.name == name)
        for tokens in args.tokens:
            measure(library, ggml, limit, fmt, tokens, args)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
