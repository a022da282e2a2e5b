"""
Products of many tokens: today's kernel beside others that would have the same bits.

    python benchmarks/gpu_wide.py                       # all of it, about two minutes
    python benchmarks/gpu_wide.py --groups plain apart  # some of the ways
    python benchmarks/gpu_wide.py --compile             # only compile, for sm_90; needs no GPU

Needs a GPU of compute capability 9.0, torch, Triton 3.6 and numpy, and no network. Ways (`wide_ways.py`):

* now: the engine's kernel, which makes operands in registers
* b: weights become float16 in scratch memory, all at once or in slabs that the L2 cache holds; then the
  engine's kernel for float16
* c: likewise, then a kernel with operands from shared memory by TMA: `product`, or `apart` with a warp that
  loads (`wide_hopper.py`)
* d: Q4_K's kernel, a half or a quarter of its step at a time (`wide_kernels.py`)
* e: `fused`: as `apart`, with warps that make operands from packed words; no scratch memory

First outputs are compared with the engine's, word by word; then all are timed, beside torch's float16 matmul
in the same process. Each group is a process of its own that may take so many seconds: a kernel that hangs
costs the others nothing. Results go to JSON files as they come; a table is printed last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_codegen import SHARED_BYTES, assembled
from gpu_report import Session
from gpu_timing import graph_microseconds, matmul_teraflops
from gpu_weights import packed_tiles, random_rows
from wide_ways import SLAB_BYTES, STEP, Cut, Wide, compile_wide
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import Shape, Tile, choose_tile, shape_of
from worker_orcd.kernels.cuda.weights import PackedMatrix, Uploader, upload
from worker_orcd.quant import BY_NAME

CAPABILITY = 90
# Phi-3-mini's: format, rows, columns, how many of them a step has, and what the engine wants out of them.
SHAPES: tuple[tuple[str, int, int, int, torch.dtype], ...] = (
    ("Q4_K", 16384, 3072, 32, torch.float16),
    ("Q4_K", 3072, 8192, 16, torch.float32),
    ("Q6_K", 3072, 8192, 16, torch.float32),
    ("Q4_K", 9216, 3072, 32, torch.float16),
    ("Q4_K", 3072, 3072, 32, torch.float32),
    ("Q6_K", 16384, 3072, 0, torch.float16),
)
TOKENS = (4096, 2048, 1024, 512)
CHECKED_ROWS, CHECKED_TOKENS = 1216, (2048, 1000, 512)  # no whole tiles, the first and the second
COPIES = 4  # of a weight that is timed, in turn
GROUPS = ("plain", "product", "apart", "fused")
SECONDS = {"plain": 40.0, "product": 25.0, "apart": 25.0, "fused": 25.0}  # of each group's process
SHORTEST = 10.0  # seconds that a process is worth starting for

Run = Callable[[torch.Tensor, PackedMatrix, torch.Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    name: str
    run: Run


def cuts(group: str, *, whole: bool) -> Iterator[Cut]:
    """Of a kernel of `wide_hopper`; `whole`: a weight of one chunk, so registers have room for wide tiles."""
    if group == "product" and whole:
        yield Cut(function=group, rows=128, tokens=256, warps=8, stages=4)
        yield Cut(function=group, rows=128, tokens=256, warps=8, stages=4, group=16)
        yield Cut(function=group, rows=128, tokens=128, warps=4, stages=3)  # two programs a multiprocessor
    elif group == "product":
        yield Cut(function=group, rows=128, tokens=128, warps=8, stages=6)
        yield Cut(function=group, rows=64, tokens=128, warps=4, stages=4)  # likewise
    else:
        makers = {"makers": 4, "registers": 184} if group == "fused" else {}
        tokens, stages = (256, 4) if whole else (128, 6)
        for staged, side_by_side in ((False, 8), (True, 8), (True, 16)):
            yield Cut(
                function=group, rows=128, tokens=tokens, warps=8, stages=stages, group=side_by_side,
                staged=staged, **makers,
            )  # fmt: skip


def pieces_tiles(*, whole: bool) -> Iterator[tuple[int, Tile]]:
    """How many pieces a step of Q4_K is cut into, and tiles."""
    if whole:
        yield 2, Tile(rows=64, tokens=128, warps=4, stages=2)
        yield 4, Tile(rows=64, tokens=128, warps=4, stages=3)
        yield 4, Tile(rows=128, tokens=256, warps=8, stages=3)
    else:
        yield 2, Tile(rows=128, tokens=128, warps=8, stages=3)
        yield 4, Tile(rows=64, tokens=128, warps=4, stages=3)
    yield 4, Tile(rows=128, tokens=128, warps=8, stages=3)


def plain_tiles(shape: Shape, n: int, tokens: int) -> Iterator[Tile]:
    """Of the engine's kernel for float16."""
    plain = Shape(format="F16", k=shape.k, step=STEP, chunks=shape.chunks, aligned=shape.aligned)
    yield replace(choose_tile(plain, n, tokens, CAPABILITY), split=False)
    if shape.chunks == 1:
        yield Tile(rows=128, tokens=256, warps=8, stages=3)


def ways(group: str, wide: Wide, shape: Shape, n: int, tokens: int) -> Iterator[Way]:
    """The ways of a group, for a weight of this shape; the engine's is always the first."""
    yield Way(name="now", run=wide.products.linear)
    whole = shape.chunks == 1
    if group == "plain":
        for tile in plain_tiles(shape, n, tokens):
            label = f"{tile.rows}x{tile.tokens}"
            for slab in (SLAB_BYTES, 0):
                yield Way(
                    name=f"b {'slabs' if slab else 'at once'} {label}",
                    run=partial(wide.two_passes, tile=tile, slab_bytes=slab),
                )
        if shape.format == "Q4_K":
            for count, tile in pieces_tiles(whole=whole):
                name = f"d 1/{count} {tile.rows}x{tile.tokens} s{tile.stages}"
                yield Way(name=name, run=partial(wide.pieces, tile=tile, count=count))
        return
    for cut in cuts(group, whole=whole):
        if group == "fused":
            yield Way(name=f"e {cut}", run=partial(wide.fused, cut=cut))
            continue
        for slab in (SLAB_BYTES, 0):
            yield Way(
                name=f"c {cut} {'slabs' if slab else 'at once'}",
                run=partial(wide.by_tma, cut=cut, slab_bytes=slab),
            )


# -- what a run launches -----------------------------------------------------------------------------------


def empty_matrix(shape: Shape, n: int, device: torch.device) -> PackedMatrix:
    size = shape.layout.sections(n, shape.k, shape.step).size
    return upload(shape, n, torch.empty(size, dtype=torch.uint8, device=device))


def launch_all(group: str, wide: Wide) -> None:
    """Everything that a group's process launches, once, on matrices of nothing."""
    device = wide.kernels.device
    for name, n, k, _, dtype in SHAPES:
        shape = shape_of(name, n, k)
        for rows, counts, out in ((CHECKED_ROWS, CHECKED_TOKENS, torch.float32), (n, TOKENS, dtype)):
            weight = empty_matrix(shape, rows, device)
            for tokens in counts:
                x = torch.empty(tokens, k, dtype=torch.float16, device=device)
                y = torch.empty(tokens, rows, dtype=out, device=device)
                for way in ways(group, wide, shape, rows, tokens):
                    way.run(x, weight, y)


def kernels_of(groups: list[str]) -> list[Kernel]:
    """All that the groups launch, by the very code that launches it. No GPU and no memory is needed."""
    kernels = Kernels(torch.device("meta"), CAPABILITY, compile_wide)
    wide = Wide(kernels, Products(kernels))
    found: dict[Kernel, None] = {}
    for group in groups:
        found.update(dict.fromkeys(kernels.collect(partial(launch_all, group, wide))))
    return list(found)


def with_constants(kernel: Kernel, **constants: Any) -> Kernel:
    return replace(kernel, constants=tuple((dict(kernel.constants) | constants).items()))


def label(kernel: Kernel) -> str:
    told = ("FORMAT", "K", "CHUNKS", "ROWS", "TOKENS", "STAGES", "GROUP", "PIECES", "TILED")
    values = [f"{name} {value}" for name, value in kernel.constants if name in told]
    return f"{kernel.function} {' '.join(values)} w{kernel.warps}"


def compiled(kernel: Kernel) -> str:
    """Into Triton's cache. What went wrong."""
    try:
        compile_wide(kernel, CAPABILITY)
    except Exception as error:
        return f"{label(kernel)}: {type(error).__name__} {error}"
    return ""


def inspect(kernel: Kernel) -> str:
    """Likewise, and what is wrong with the machine code."""
    try:
        made = compile_wide(kernel, CAPABILITY)
    except Exception as error:
        return f"{label(kernel)}: {type(error).__name__} {error}"
    log, sass = assembled(made, CAPABILITY)
    wrong: list[str] = []
    if re.search(r"\b(?:LDL|STL)\b", sass) or re.search(r"[1-9]\d* bytes spill", log):
        wrong.append("spills")
    if found := set(re.findall(r"C75\d\d", log)):
        wrong.append(f"ptxas warns {sorted(found)}")
    if kernel.function != "unpack" and "HGMMA" not in sass:
        wrong.append("no wgmma")
    if kernel.function == "pieces" and not re.search(r"HGMMA\S* R\d+, R\d+, gdesc", sass):
        wrong.append("weights take the way through shared memory")
    if made.metadata.shared > SHARED_BYTES[CAPABILITY]:
        wrong.append(f"{made.metadata.shared} bytes of shared memory")
    return f"{label(kernel)}: {', '.join(wrong)}" if wrong else ""


def compile_all(groups: list[str], jobs: int, *, inspected: bool = False) -> list[str]:
    """Into Triton's cache. What went wrong."""
    wanted = kernels_of(groups)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        wrong = [text for text in pool.map(inspect if inspected else compiled, wanted) if text]
    print(
        f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s, {len(wrong)} faults", flush=True
    )
    print(*wrong, sep="\n", flush=True)
    return wrong


# -- a group's process -------------------------------------------------------------------------------------


class Group:
    """Checks and times of one group, on the device."""

    def __init__(self, session: Session, group: str, device: torch.device) -> None:
        self.session, self.group, self.device = session, group, device
        kernels = Kernels(self.device, CAPABILITY, compile_wide)
        self.wide = Wide(kernels, Products(kernels))
        self.bits: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []

    def check(self) -> None:
        """Words that differ from the engine's, of random weights: as many chunks as the large ones have."""
        uploader = Uploader(self.device)
        for name, n, k, _, _ in SHAPES:
            fmt, shape = BY_NAME[name], shape_of(name, n, k)
            rows = random_rows(fmt, CHECKED_ROWS, k, n + k)
            weight = uploader.matrix([Matrix(name, fmt, CHECKED_ROWS, k, rows)])
            weight = replace(weight, shape=replace(weight.shape, chunks=shape.chunks))
            for tokens in CHECKED_TOKENS:
                generator = torch.Generator(self.device).manual_seed(tokens)
                x = torch.randn(tokens, k, generator=generator, device=self.device).half()
                first, *others = ways(self.group, self.wide, weight.shape, CHECKED_ROWS, tokens)
                wanted = self.outputs(first, x, weight)
                if not bool(torch.isfinite(wanted).all()):
                    self.session.say(f"{name} {k} {tokens} tokens: the engine's are not finite", ok=False)
                for way in others:
                    self.session.guarded(
                        f"bits {name} {n}x{k} {tokens} {way.name}",
                        partial(self.compare, way, x, weight, wanted, f"{name} {n}x{k}"),
                    )
        counted = sum(one["words"] for one in self.bits)
        wrong = sum(one["differing"] for one in self.bits)
        self.session.say(f"{self.group}: {counted:.1e} words compared, {wrong} differ", ok=wrong == 0)

    def outputs(self, way: Way, x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
        out = torch.full((len(x), weight.n), torch.nan, device=self.device)
        way.run(x, weight, out)
        torch.cuda.synchronize()
        return out

    def compare(
        self, way: Way, x: torch.Tensor, weight: PackedMatrix, wanted: torch.Tensor, label: str
    ) -> None:
        found = self.outputs(way, x, weight)
        differing = int((found.view(torch.int32) != wanted.view(torch.int32)).sum())
        line = {"shape": label, "tokens": len(x), "way": way.name, "words": found.numel()}
        self.bits.append(line | {"differing": differing})
        self.session.keep("bits", self.bits)
        if differing:
            error = float((found - wanted).norm() / wanted.norm())
            self.session.say(
                f"DIFFERS {label} {len(x)} tokens, {way.name}: {differing} of {found.numel()},"
                f" relative error {error:.1e}",
                ok=False,
            )

    def measure(self, left: Callable[[], float]) -> None:
        for name, n, k, _, dtype in SHAPES:
            shape = shape_of(name, n, k)
            packed = torch.from_numpy(packed_tiles(name, n, k)).to(self.device)
            weights = [upload(shape, n, packed.clone() if i else packed) for i in range(COPIES)]
            for tokens in TOKENS:
                if left() < 2:
                    return self.session.say("out of time")
                x = torch.randn(tokens, k, device=self.device).half()
                out = torch.empty(tokens, n, dtype=dtype, device=self.device)
                line = {"format": name, "n": n, "k": k, "tokens": tokens}
                line["torch"] = matmul_teraflops(n, k, tokens)
                for way in ways(self.group, self.wide, shape, n, tokens):
                    self.session.guarded(
                        f"time {name} {n}x{k} {tokens} {way.name}",
                        partial(self.time, way, x, weights, out, line),
                    )
            del weights, packed
        return None

    def time(
        self, way: Way, x: torch.Tensor, weights: list[PackedMatrix], out: torch.Tensor, line: dict[str, Any]
    ) -> None:
        micro = graph_microseconds([partial(way.run, x, weight, out) for weight in weights], 3.0)
        rate = 2 * line["n"] * line["k"] * line["tokens"] / micro / 1e6
        self.times.append(line | {"way": way.name, "microseconds": micro, "tflop_per_s": rate})
        self.session.keep("times", self.times)


def run_group(args: argparse.Namespace) -> int:
    start = time.monotonic()
    session = Session(args)
    if session.results["stamp"]["capability"] != CAPABILITY:
        session.say("these kernels are for compute capability 9.0", ok=False)
        return 1
    group = Group(session, args.child, torch.device("cuda"))
    session.guarded("bits", group.check)
    session.guarded("times", lambda: group.measure(lambda: args.seconds - (time.monotonic() - start)))
    return min(session.failed, 100)


# -- all of it ---------------------------------------------------------------------------------------------


def child_command(args: argparse.Namespace, group: str, seconds: float) -> list[str]:
    command = [
        sys.executable, str(Path(__file__).resolve()), "--child", group, "--seconds", str(seconds - 5),
        "--out", str(result_file(args.out, group)),
    ]  # fmt: skip
    return command + (["--commit", args.commit] if args.commit else [])


def result_file(out: Path, group: str) -> Path:
    return out.with_name(f"{out.stem}_{group}.json")


def run_groups(args: argparse.Namespace) -> dict[str, Any]:
    """The groups' results; what a group left behind counts even if it was ended."""
    results: dict[str, Any] = {"failed": 0}
    start = time.monotonic()
    for group in args.groups:
        seconds = min(SECONDS[group], args.seconds - (time.monotonic() - start))
        if seconds < SHORTEST:
            print(f"{group}: no time left", flush=True)
            results["failed"] += 1
            continue
        result_file(args.out, group).unlink(missing_ok=True)
        try:
            code = subprocess.run(child_command(args, group, seconds), timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = -1
            print(f"{group}: ended after {seconds:.0f} s", flush=True)
        results["failed"] += code != 0
        found = result_file(args.out, group)
        results[group] = {"exit": code} | (json.loads(found.read_text()) if found.exists() else {})
        args.out.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, Any]) -> list[str]:
    """A line a way, fastest first, for each shape and number of tokens; then a step of Phi-3-mini."""
    lines = [line for group in GROUPS for line in results.get(group, {}).get("times", [])]
    wrong = {
        (one["shape"], one["way"])
        for group in GROUPS
        for one in results.get(group, {}).get("bits", [])
        if one["differing"]
    }
    text: list[str] = []
    for name, n, k, _, _ in SHAPES:
        for tokens in TOKENS:
            some = [
                one
                for one in lines
                if (one["format"], one["n"], one["k"], one["tokens"]) == (name, n, k, tokens)
            ]
            text += [f"{name} {n}x{k}, {tokens} tokens"] * bool(some)
            for one in sorted(some, key=lambda one: float(one["microseconds"])):
                differs = "   BITS DIFFER" if (f"{name} {n}x{k}", one["way"]) in wrong else ""
                text.append(
                    f"  {one['way']:34} {one['microseconds']:8.1f} us {one['tflop_per_s']:4.0f} TFLOP/s"
                    f" {one['tflop_per_s'] / one['torch']:4.0%} of torch{differs}"
                )
    return text + [line for tokens in TOKENS for line in of_a_step(lines, tokens)]


def of_a_step(lines: list[dict[str, Any]], tokens: int) -> list[str]:
    """Microseconds of all products of Phi-3-mini's layers, now and by each kind of way's best."""
    best: dict[str, float] = {}
    for kind in ("now", "b", "c product", "c apart", "d", "e"):
        total = 0.0
        for name, n, k, count, _ in SHAPES:
            of = [
                float(one["microseconds"])
                for one in lines
                if (one["format"], one["n"], one["k"], one["tokens"]) == (name, n, k, tokens)
                and (one["way"].startswith(kind) or (kind == "d" and name != "Q4_K" and one["way"] == "now"))
            ]
            total += count * min(of, default=float("inf")) if count else 0.0
        best[kind] = total
    if best["now"] == float("inf"):
        return []
    return [
        f"Phi-3-mini's products, {tokens} tokens: "
        + ", ".join(f"{kind} {total / 1000:.1f} ms" for kind, total in best.items() if total < float("inf"))
    ]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--compile", action="store_true", help="only compile, and look at the machine code")
    parser.add_argument("--child", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seconds", type=float, default=120.0, help="for all groups, without compiling")
    parser.add_argument("--out", type=Path, default=Path("gpu_wide.json"))
    parser.add_argument("--commit", help="default: ask git")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    if args.child:
        sys.exit(run_group(args))
    wrong = compile_all(args.groups, args.jobs, inspected=args.compile)
    if args.compile:
        sys.exit(bool(wrong))
    results = run_groups(args)
    print(*table(results), sep="\n")
    print(f"{results['failed']} groups failed; {args.out}")
    sys.exit(bool(wrong) or results["failed"] > 0)


if __name__ == "__main__":
    main()
