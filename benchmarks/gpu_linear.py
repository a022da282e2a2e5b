"""
The CUDA backend's matrix products: right, the same bits whatever the batch, and how fast.

    python benchmarks/gpu_linear.py                                # everything, about five minutes
    python benchmarks/gpu_linear.py --only correct same --formats Q4_K Q8_0
    python benchmarks/gpu_linear.py --only tune --formats Q4_K     # which tile is fastest where

Needs a GPU, torch, triton and numpy, and no network. Checks come first: every format against float64 over
ragged shapes and epilogues; then a token's outputs alone against the same token's in batches of 2 … 1024 at
random places, under every tile that is shipped and some that are not, bit for bit. Then figures: GB/s of
packed weights for few tokens (rotating through more memory than the L2 cache holds) beside the bandwidth of a
device copy in the same run, and TFLOP/s for many tokens beside torch's float16 matmul. All of it goes to a
JSON file as it comes; a short table is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu_timing import LARGER_THAN_L2, copy_bandwidth, graph_microseconds, matmul_teraflops, stamp
from gpu_weights import packed_tiles, random_rows
from worker_orcd.kernels.backend import Matrix
from worker_orcd.kernels.cuda.compiler import Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.streaming import tile_for
from worker_orcd.kernels.cuda.variants import (
    FORMATS,
    Shape,
    Tile,
    Variant,
    compile_variant,
    most_split_tokens,
    shape_of,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix, pack, upload
from worker_orcd.quant import BY_NAME

MAIN_FORMATS = ("Q8_0", "Q4_K", "Q6_K", "Q5_0", "Q4_0", "MXFP4")
RAGGED = ((64, 256), (72, 512), (130, 768), (1, 256), (3072, 1024), (200, 2816))
RAGGED_OF_32 = ((100, 96), (576, 576), (96, 1536), (320, 4864), (192, 2880))
CHECKED_TOKENS = (1, 3, 16, 17, 40, 64, 65, 130)
BATCHES = (1, 2, 7, 16, 17, 32, 33, 64, 65, 100, 128, 200, 256, 512, 1024)
SAME_SHAPES = ((1024, 3072), (12288, 256))  # chunks that are split or walked; a single one
FAST_SHAPES = (
    (151936, 896),
    (16384, 3072),
    (9216, 3072),
    (3072, 8192),
    (3072, 3072),
    (9728, 896),
    (896, 4864),
)
WIDE_SHAPES = ((16384, 3072), (3072, 8192))
TUNED_SHAPES = (*WIDE_SHAPES, (9728, 896), (896, 4864), (896, 896))
FEW, MANY = (1, 4, 16), (256, 1024, 4096)
CHUNK_SHAPES = (
    (9216, 3072), (3072, 8192), (3072, 3072), (9728, 896), (896, 4864), (1152, 896), (896, 896), (5120, 2880),
    (2880, 4096), (16384, 3072),
)  # fmt: skip
MXFP4_SHAPES = ((201088, 2880), (5760, 2880))


class Session:
    """Results on their way to the file, and kernels compiled ahead by many processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, Any] = {"stamp": stamp(args.commit)}
        self.capability: int = self.results["stamp"]["capability"]
        self.device = torch.device("cuda")
        self.products = Products(Kernels(self.device, self.capability))
        self.lines: list[str] = []
        self.failures = 0
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {line}", flush=True)
        self.lines.append(line)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self._start)

    def save(self, part: str, value: object) -> None:
        self.results[part] = value
        self.args.out.write_text(json.dumps(self.results, indent=1, default=str))

    def compile(self, variants: Iterable[Variant]) -> None:
        wanted = list(dict.fromkeys(variants))
        start = time.monotonic()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
            list(pool.map(_compile, wanted, [self.capability] * len(wanted)))
        self.say(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s")

    def matrix(self, name: str, n: int, k: int, seed: int = 0) -> tuple[PackedMatrix, torch.Tensor]:
        """A random matrix on the device, and its weights as float64."""
        fmt = BY_NAME[name]
        rows = random_rows(fmt, n, k, seed)
        shape, packed = pack(Matrix(name, fmt, n, k, rows))
        weight = upload(shape, n, torch.from_numpy(packed).to(self.device))
        self.products.reserve(weight)
        exact = torch.from_numpy(fmt.dequantize_rows(rows)).to(self.device).double()
        return weight, exact


def _compile(variant: Variant, capability: int) -> None:
    compile_variant(variant, capability)


def activations(weight: PackedMatrix, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(tokens, weight.shape.k, generator=generator, device="cuda")
    return x.to(weight.operand)


# -- right -------------------------------------------------------------------------------------------------


def ragged(name: str) -> tuple[tuple[int, int], ...]:
    return RAGGED if BY_NAME[name].block_size == 256 else RAGGED + RAGGED_OF_32


def correct_variants(session: Session) -> Iterator[Variant]:
    for name in session.args.formats:
        for n, k in ragged(name):
            shape = shape_of(name, n, k)
            for tokens in CHECKED_TOKENS:
                yield Variant(shape=shape, tile=tile_for(shape, n, tokens, session.capability))


def check_correct(session: Session) -> None:
    """Relative error, as the root of mean squares, of every format, shape and number of tokens."""
    session.compile(correct_variants(session))
    worst: dict[str, float] = {}
    for name in session.args.formats:
        allowed = 4e-3 if name in ("BF16", "F32") else 1e-3
        for n, k in ragged(name):
            weight, exact = session.matrix(name, n, k, n + k)
            for tokens in CHECKED_TOKENS:
                x = activations(weight, tokens, tokens)
                out = torch.full((tokens, n), torch.nan, device=session.device)
                session.products.linear(x, weight, out)
                error, bound = relative_error(out, x.double(), exact)
                worst[name] = error if error != error else max(worst.get(name, 0.0), error)
                if not (error <= allowed and bound <= 1):
                    session.failures += 1
                    session.say(
                        f"WRONG {name} {n}x{k} {tokens} tokens: {error:.1e}, allowed {allowed:.0e}; the"
                        f" largest is {bound:.2f} of the bound"
                    )
    for name in session.args.formats[:3]:
        session.failures += check_epilogues(session, name)
    session.save("correct", worst)
    session.say("relative error: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))


def relative_error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Root mean square of the error, relative to what random signs would give, and the largest error over
    8 * 2**-11 * sum |w x| / sqrt(k): a dozen standard deviations. (An output itself may be near zero.)
    """
    error = found.double() - x @ weight.T
    size = ((x * x) @ (weight * weight).T).sqrt()
    bound = 8 * 2**-11 * (x.abs() @ weight.abs().T) / x.shape[1] ** 0.5
    return float(error.norm() / size.norm()), float((error.abs() / bound).max())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check_epilogues(session: Session, name: str) -> int:
    """Bias and residual, split and whole. Gated units are for `gpu_gated.py`."""
    failures = 0
    for n, k in ((1024, 1024), (13312, 256)):
        weight, exact = session.matrix(name, n, k)
        bias = torch.randn(n, device=session.device)
        for tokens in (3, 100):
            x = activations(weight, tokens, 1)
            residual = torch.randn(tokens, n, device=session.device)
            y = x.double() @ exact.T + bias
            out = session.products.linear(
                x, weight, torch.full_like(residual, torch.nan), bias=bias, residual=residual
            )
            error = relative(out, y + residual)
            if not error <= 2e-3:
                failures += 1
                session.say(f"WRONG {name} residual {n}x{k} {tokens} tokens: {error:.1e}")
    return failures


# -- the same bits -----------------------------------------------------------------------------------------


def tiles(shape: Shape) -> Iterator[Tile]:
    """Tiles that must all give the same bits."""
    for rows, tokens, warps, stages in (
        (64, 16, 4, 4), (128, 16, 4, 3), (64, 16, 4, 2), (128, 16, 8, 3), (64, 32, 4, 3), (128, 32, 8, 3),
        (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 2),
    ):  # fmt: skip
        yield Tile(rows=rows, tokens=tokens, warps=warps, stages=stages)
        if shape.chunks > 1 and tokens <= 64:
            yield Tile(rows=rows, tokens=tokens, warps=warps, stages=stages, split=True)


def same_variants(session: Session) -> Iterator[Variant]:
    for name in session.args.formats:
        for n, k in SAME_SHAPES:
            shape = shape_of(name, n, k)
            for tile in tiles(shape):
                yield Variant(shape=shape, tile=tile)
            for tokens in BATCHES:
                yield Variant(shape=shape, tile=tile_for(shape, n, tokens, session.capability))


def check_same(session: Session) -> None:
    """Outputs compared and how many words differ, by format."""
    session.compile(same_variants(session))
    counts: dict[str, dict[str, int]] = {}
    for name in session.args.formats:
        compared = differing = 0
        for n, k in SAME_SHAPES:
            weight, _ = session.matrix(name, n, k, 5)
            pool = activations(weight, 1024, 7)
            alone = torch.full((64, n), torch.nan, device=session.device)
            for i in range(64):
                session.products.linear(pool[i : i + 1], weight, alone[i : i + 1])
            for batch in BATCHES:
                picks = [None, *tiles(weight.shape)] if batch in (1, 33, 256) else [None]
                for tile in picks:
                    if tile is not None and tile.split and batch > most_split_tokens(weight.shape):
                        continue  # more scratch memory than there is
                    words, bad = compare_batch(session, weight, pool, alone, batch, tile)
                    compared, differing = compared + words, differing + bad
                    if bad:
                        session.failures += 1
                        session.say(f"DIFFERS {name} {n}x{k} batch {batch} {tile}: {bad} of {words}")
        counts[name] = {"compared": compared, "differing": differing}
    session.save("same", counts)
    total = sum(count["compared"] for count in counts.values())
    session.say(f"{total:.1e} outputs compared, {sum(c['differing'] for c in counts.values())} differ")


def compare_batch(
    session: Session,
    weight: PackedMatrix,
    pool: torch.Tensor,
    alone: torch.Tensor,
    batch: int,
    tile: Tile | None,
) -> tuple[int, int]:
    """Words compared and words that differ, of known tokens at random places of a batch."""
    generator = torch.Generator().manual_seed(batch)
    order = torch.randperm(1024, generator=generator)[:batch]
    known = min(batch, len(alone))
    places = torch.randperm(batch, generator=generator)[:known]
    order[places] = torch.arange(known)
    x = pool[order.to(session.device)]
    out = torch.full((batch, weight.n), torch.nan, device=session.device)
    session.products.linear(x, weight, out, tile=tile)
    found = out[places.to(session.device)].view(torch.int32)
    return found.numel(), int((found != alone[:known].view(torch.int32)).sum())


# -- fast --------------------------------------------------------------------------------------------------


def shapes_of(name: str, shapes: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    all_shapes = shapes + (MXFP4_SHAPES if name in ("MXFP4", "Q8_0") and shapes is FAST_SHAPES else ())
    return [(n, k) for n, k in all_shapes if k % max(32, BY_NAME[name].block_size) == 0]


def speed_variants(session: Session) -> Iterator[Variant]:
    for name in session.args.formats:
        for shapes, counts in ((FAST_SHAPES, FEW), (WIDE_SHAPES, MANY)):
            for n, k in shapes_of(name, shapes):
                shape = shape_of(name, n, k)
                for tokens in counts:
                    yield Variant(shape=shape, tile=tile_for(shape, n, tokens, session.capability))


class Rotation:
    """Copies of a matrix that together are larger than the L2 cache."""

    def __init__(self, session: Session, name: str, n: int, k: int, step: int = 0) -> None:
        self.session = session
        packed = torch.from_numpy(packed_tiles(name, n, k, step)).to(session.device)
        shape = shape_of(name, n, k, step)
        self.bytes = len(packed)
        self.weights = [
            upload(shape, n, packed.clone() if i else packed)
            for i in range(max(1, min(64, -(-LARGER_THAN_L2 // len(packed)))))
        ]
        session.products.reserve(self.weights[0])

    def microseconds(self, tokens: int, tile: Tile | None = None, shape: Shape | None = None) -> float:
        weights = self.weights
        if shape is not None:
            weights = [dataclasses.replace(weight, shape=shape) for weight in weights]
            self.session.products.reserve(weights[0])
        x = activations(weights[0], tokens, 0)
        out = torch.empty(tokens, weights[0].n, device="cuda")
        linear = self.session.products.linear
        many = weights if tokens <= 64 else weights[:4]
        many = many * (1 if len(many) > 1 else 4)
        return graph_microseconds([lambda w=w: linear(x, w, out, tile=tile) for w in many], 3.0)


def measure_speed(session: Session) -> None:
    session.compile(speed_variants(session))
    copy = copy_bandwidth()
    session.save("copy_gb_per_s", copy)
    session.say(f"device copy {copy:.0f} GB/s; GB/s of packed weights at T = {FEW}, µs at the first:")
    rows: list[dict[str, Any]] = []
    for name in session.args.formats:
        for n, k in shapes_of(name, FAST_SHAPES):
            if session.left() < 20:
                return session.say("out of time")
            rotation = Rotation(session, name, n, k)
            times = [rotation.microseconds(tokens) for tokens in FEW]
            rates = [rotation.bytes / 1000 / micro for micro in times]
            rows.append({"format": name, "n": n, "k": k, "bytes": rotation.bytes, "microseconds": times})
            session.save("few_tokens", rows)
            session.say(
                f"  {name:6} {n:6}x{k:<5}{rotation.bytes / 1e6:6.1f} MB"
                f" S={rotation.weights[0].shape.chunks:<2} {' '.join(f'{rate:5.0f}' for rate in rates)}"
                f" {times[0]:6.1f} µs {rates[0] / copy:4.0%} of copy"
            )
            del rotation
    return measure_many(session)


def measure_many(session: Session) -> None:
    torch_rates = {f"{n}x{k}": {t: matmul_teraflops(n, k, t) for t in MANY} for n, k in WIDE_SHAPES}
    session.save("torch_tflop_per_s", torch_rates)
    session.say(f"TFLOP/s at T = {MANY} (torch float16)")
    rows: list[dict[str, Any]] = []
    for name in session.args.formats:
        for n, k in shapes_of(name, WIDE_SHAPES):
            if session.left() < 20:
                return session.say("out of time")
            rotation = Rotation(session, name, n, k)
            rates = {t: 2 * n * k * t / rotation.microseconds(t) / 1e6 for t in MANY}
            rows.append({"format": name, "n": n, "k": k, "tflop_per_s": rates})
            session.save("many_tokens", rows)
            against = torch_rates[f"{n}x{k}"]
            session.say(
                f"  {name:6} {n:6}x{k:<5} "
                + " ".join(f"{rates[t]:4.0f} ({against[t]:3.0f}, {rates[t] / against[t]:3.0%})" for t in MANY)
            )
    return None


# -- which tile is fastest ---------------------------------------------------------------------------------


def tune_tiles(shape: Shape, tokens: int) -> Iterator[Tile]:
    few = ((64, 16, 4, 3), (64, 16, 4, 4), (64, 16, 4, 6), (128, 16, 4, 3), (128, 16, 4, 4), (128, 16, 8, 3))
    many = (
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 256, 8, 2), (64, 128, 4, 3), (64, 256, 4, 2),
        (128, 64, 4, 3), (128, 64, 8, 3), (256, 128, 8, 2),
    )  # fmt: skip
    middle = (
        (64, 16, 4, 3), (64, 32, 4, 3), (128, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3),
        (128, 128, 8, 3),
    )  # fmt: skip
    for rows, width, warps, stages in few if tokens <= 16 else middle if tokens <= 256 else many:
        if not (shape.step >= 256 and width >= 256):
            for split in [True] * (tokens <= most_split_tokens(shape)) + [False] * (tokens > 16):
                yield Tile(rows=rows, tokens=width, warps=warps, stages=stages, split=split)


def tuned(session: Session) -> Iterator[tuple[Shape, int, int]]:
    """Every shape with every step that its format has, and some rows and tokens."""
    for name in session.args.formats:
        for n, k in shapes_of(name, TUNED_SHAPES):
            for step in BY_NAME[name].gpu.steps if BY_NAME[name].gpu else ():
                for tokens in (1, 32, 64, 128, 256, 4096):
                    if step >= 128:
                        yield shape_of(name, n, k, step), n, tokens


def tune(session: Session) -> None:
    """For each shape and number of tokens the times of all tiles, fastest first."""
    session.compile(
        Variant(shape=shape, tile=tile)
        for shape, _, tokens in tuned(session)
        for tile in tune_tiles(shape, tokens)
    )
    found: dict[str, Any] = {}
    rotations: dict[tuple[Shape, int], Rotation] = {}
    for shape, n, tokens in tuned(session):
        if session.left() < 20:
            return session.say("out of time")
        if (shape, n) not in rotations:
            rotations.clear()
            rotations[shape, n] = Rotation(session, shape.format, n, shape.k, shape.step)
        times: list[tuple[float, str]] = []
        for tile in tune_tiles(shape, tokens):
            label = f"{tile.rows}x{tile.tokens} w{tile.warps} s{tile.stages}"
            try:
                times.append((rotations[shape, n].microseconds(tokens, tile), label))
            except Exception as error:  # too much shared memory: Triton's own error type
                times.append((float("inf"), f"{label} {type(error).__name__}"))
        times.sort()
        found[f"{shape.format} {n}x{shape.k} step {shape.step} {tokens}"] = times
        session.save("tune", found)
        best = ", ".join(f"{micro:.1f} {label}" for micro, label in times[:4])
        session.say(f"  {shape.format:6} {n}x{shape.k} step {shape.step} T={tokens}: {best}")
    return None


def sweep_chunks(session: Session) -> None:
    """For each shape the time of one token by the number of chunks: what `contract` was chosen by."""
    tile = Tile(rows=64, tokens=16, warps=4, stages=4, split=True)
    wanted: list[tuple[str, int, int, Shape]] = []
    for name in session.args.formats:
        for n, k in shapes_of(name, CHUNK_SHAPES):
            shape = shape_of(name, n, k)
            for step in [step for step in shape.layout.steps if step >= 128 and k % step == 0] or [
                shape.step
            ]:
                steps = k // step
                for chunks in range(1, min(steps, 48) + 1):
                    if steps % chunks == 0 and n // 64 * chunks < 2000:
                        wanted.append((name, n, k, dataclasses.replace(shape, step=step, chunks=chunks)))
    session.compile(
        Variant(shape=shape, tile=dataclasses.replace(tile, split=shape.chunks > 1))
        for _, _, _, shape in wanted
    )
    found: dict[str, dict[int, float]] = {}
    rotations: dict[str, Rotation] = {}
    for name, n, k, shape in wanted:
        if session.left() < 20:
            break
        key = f"{name} {n}x{k} step {shape.step}"
        if key not in rotations:
            rotations.clear()
            rotations[key] = Rotation(session, name, n, k, shape.step)
        one = dataclasses.replace(tile, split=shape.chunks > 1)
        found.setdefault(key, {})[shape.chunks] = rotations[key].microseconds(1, one, shape)
    session.save("chunks", found)
    for key, times in found.items():
        session.say(f"  {key}: " + ", ".join(f"{s}: {micro:.2f}" for s, micro in times.items()))


PARTS = {
    "chunks": sweep_chunks,
    "correct": check_correct,
    "same": check_same,
    "speed": measure_speed,
    "tune": tune,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["correct", "same", "speed"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("gpu_linear.json"))
    parser.add_argument("--commit", help="default: ask git")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop before")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args()


def main() -> None:
    session = Session(arguments())
    session.say(str(session.results["stamp"]))
    for part in session.args.only:
        PARTS[part](session)
    print("\n" + "\n".join(session.lines))
    print(f"{session.failures} failures; {session.args.out}")
    sys.exit(1 if session.failures else 0)


if __name__ == "__main__":
    main()
