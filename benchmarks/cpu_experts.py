"""
Products with experts' matrices beside dense ones over the same memory.

Decoding: a pass goes through a stack of experts `top_k` at a time, one token an operation, routing included,
until every expert was used once; the dense pass reads the same bytes as matrices of top_k * N rows. A prompt:
its tokens are routed at random; the dense pass multiplies the whole stack, as one matrix, by as many tokens
as an expert gets on average. Both take turns. The ratio is dense time / experts' time: 1 is as fast as dense.

    python benchmarks/cpu_experts.py
    python benchmarks/cpu_experts.py --format Q4_K --experts 128 --top-k 8 --shape 768 2048
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cpu_linear import aligned, random_rows
from worker_orcd.kernels.cpu.build import load_library
from worker_orcd.kernels.cpu.library import Batch, Kind, Library, Op
from worker_orcd.kernels.cpu.program import ROUTING_LISTS
from worker_orcd.quant import FORMATS, WeightFormat


class Stack:
    """The packed matrices of all experts, end to end: one of `experts * n` rows too, as n fills panels."""

    def __init__(self, library: Library, fmt: WeightFormat, experts: int, n: int, k: int) -> None:
        if n % 16:
            raise SystemExit("N must be a multiple of 16, so that the stack is a dense matrix too")
        size = library.packed_bytes(fmt.ggml_type, n, k)
        if size is None:
            raise SystemExit(f"no kernel for {fmt.name} of {n} x {k}")
        rows = random_rows(fmt, n, k)
        self.packed = aligned(experts * size).reshape(experts, size)
        library.pack(fmt.ggml_type, (n, k), (0, n), rows.ctypes.data, self.packed.ctypes.data)
        self.packed[1:] = self.packed[0]
        self.format, self.experts, self.n, self.k = fmt, experts, n, k


class Program:
    """Operations on one number of tokens, and the arrays they use."""

    def __init__(self, library: Library, tokens: int) -> None:
        self._library, self._batch = library, Batch(num_tokens=tokens)
        self._operations: list[Op] = []
        self._arrays: list[NDArray[np.float32]] = []

    def array(self, values: NDArray[np.float32]) -> int:
        self._arrays.append(values)
        return values.ctypes.data

    def add(self, **fields: object) -> None:
        self._operations.append(Op(**fields))

    def finish(self) -> Callable[[], None]:
        operations = (Op * len(self._operations))(*self._operations)

        def run() -> None:
            if self._library.run(operations, len(operations), ctypes.byref(self._batch)) != 0:
                raise SystemExit("the program was refused")

        return run


def experts_pass(
    library: Library, stack: Stack, top_k: int, tokens: int, activations: int
) -> Callable[[], None]:
    program, rng = Program(library, tokens), np.random.default_rng(0)
    x = program.array(rng.standard_normal((tokens, stack.k), np.float32))
    out = program.array(np.zeros((tokens, top_k * stack.n), np.float32))
    routing = program.array(np.zeros((tokens, ROUTING_LISTS * top_k), np.float32))
    order = rng.permutation(stack.experts)
    for first in range(0, stack.experts, top_k) if tokens == 1 else (0,):
        logits = rng.standard_normal((tokens, stack.experts), np.float32)
        if tokens == 1:
            logits[0, order[first : first + top_k]] = 9
        program.add(
            kind=Kind.ROUTE, x=program.array(logits), ldx=stack.experts, out=routing, n=stack.experts,
            ldout=ROUTING_LISTS * top_k, top_k=top_k,
        )  # fmt: skip
        program.add(
            kind=Kind.EXPERT_LINEAR, x=x, y=routing, out=out, ldx=stack.k, ldy=ROUTING_LISTS * top_k,
            ldout=top_k * stack.n, n=stack.n, k=stack.k, weight=stack.packed.ctypes.data,
            format=stack.format.ggml_type, activations=activations, num_experts=stack.experts, top_k=top_k,
        )  # fmt: skip
    return program.finish()


def dense_pass(
    library: Library, stack: Stack, top_k: int, tokens: int, activations: int
) -> Callable[[], None]:
    each, step = (1, top_k) if tokens == 1 else (tokens * top_k // stack.experts, stack.experts)
    program, n = Program(library, each), step * stack.n
    x = program.array(np.random.default_rng(0).standard_normal((each, stack.k), np.float32))
    out = program.array(np.zeros((each, n), np.float32))
    for first in range(0, stack.experts, step):
        program.add(
            kind=Kind.LINEAR, x=x, out=out, ldx=stack.k, ldout=n, n=n, k=stack.k,
            weight=stack.packed[first:].ctypes.data, format=stack.format.ggml_type, activations=activations,
        )  # fmt: skip
    return program.finish()


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(library: Library, stack: Stack, tokens: int, args: argparse.Namespace) -> None:
    passes = {
        "experts": experts_pass(library, stack, args.top_k, tokens, args.activations),
        "dense": dense_pass(library, stack, args.top_k, tokens, args.activations),
    }
    for threads in args.threads:
        library.set_threads(threads)
        figures: dict[str, list[float]] = {name: [] for name in passes}
        for turn in range(args.rounds + 1):
            for name, run in passes.items():
                elapsed = timed(run)
                if turn:  # the first is to warm up
                    figures[name].append(elapsed)
                time.sleep(args.gap)
        if tokens == 1:
            amount, unit = stack.packed.nbytes, "GB/s"
        else:
            amount, unit = tokens * args.top_k * stack.n * stack.k, "GMAC/s"
        cells = [f"{stack.format.name:7} {tokens:4} {threads}"]
        cells += [f"{name} {amount / statistics.median(times) / 1e9:6.1f}" for name, times in figures.items()]
        ratios = [dense / own for own, dense in zip(figures["experts"], figures["dense"], strict=True)]
        print(*cells, unit, f"ratio {statistics.median(ratios):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="MXFP4")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument(
        "--shape", nargs=2, type=int, default=[2880, 2880], metavar=("N", "K"), help="of one expert"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--activations", type=int, default=8, choices=(8, 16, 32))
    parser.add_argument("--isa", help="default: what this machine uses")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--gap", type=float, default=0.003, help="seconds between runs")
    args = parser.parse_args()
    library = load_library()
    if args.isa and not library.force_isa(args.isa):
        parser.error(f"this machine has no {args.isa}")
    if args.experts % args.top_k:
        parser.error("--experts must be a multiple of --top-k, so that a pass uses each once")
    if any(tokens != 1 and tokens * args.top_k % args.experts for tokens in args.tokens):
        parser.error("--tokens must be 1, or give every expert the same number on average")
    fmt = next(f for f in FORMATS.values() if f.name == args.format)
    stack = Stack(library, fmt, args.experts, *args.shape)
    print(f"{library.isa}, load {os.getloadavg()}, {args.experts} experts, top {args.top_k}")
    for tokens in args.tokens:
        measure(library, stack, tokens, args)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
