"""
Products of many tokens by `linear_wide`: the bits of the kernel for any number, and how fast beside it.

    python benchmarks/gpu_wide.py                 # checks and figures, about two minutes
    python benchmarks/gpu_wide.py --only same     # checks alone
    python benchmarks/gpu_wide.py --compile       # only look at the machine code; needs no GPU

Needs a GPU of compute capability 9.0, torch, Triton 3.6 and numpy, and no network. `same`: every format, sums
of one chunk and of several, ragged numbers of rows and tokens, weights that are unpacked in slabs, and all
that is done to a sum on its way out; outputs, and what goes to a KV cache, are compared byte by byte with
those of
`linear`. `fast`: microseconds of both by number of tokens, and the share of torch's float16 matmul in the
same run. All of it goes to a JSON file as it comes. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gpu_codegen import SHARED_BYTES, assembled
from gpu_hazards import overwritten
from gpu_session import Session, parser_of, run_parts
from gpu_timing import LARGER_THAN_L2, matmul_teraflops
from gpu_weights import packed_tiles
from worker_orcd.kernels.backend import AttentionParams, Glu, RopeParams
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import Kernel, compile_kernel
from worker_orcd.kernels.cuda.launch import HeadsTo, Products
from worker_orcd.kernels.cuda.operations import rope_table
from worker_orcd.kernels.cuda.streaming import tile_for
from worker_orcd.kernels.cuda.variants import FORMATS, Epilogue, Shape, Store, shape_of
from worker_orcd.kernels.cuda.weights import PackedMatrix, upload
from worker_orcd.kernels.cuda.wide import NARROW, WIDE, Cut, can_be_wide, cut_for, unpack_kernel, wide_kernel

CAPABILITY = 90
CHECKED = tuple(name for name in FORMATS if name != "F32")  # which `linear` alone multiplies by
CHECKED_SHAPES = ((1216, 2048), (144, 768))  # rows are no whole tiles
CHECKED_TOKENS = (512, 999, 1537)
SLAB = 1 << 20  # bytes of scratch memory, so that weights do not fit
END_TOKENS, HEAD_TOKENS = (600, 1024), 777
HEAD_SHAPES = ((12, 4, 64, 768), (8, 2, 96, 1024))  # q heads, KV heads, their width, columns
BLOCK, POSITIONS = 16, 4096  # of a KV cache
FAST = (
    ("Q4_K", 16384, 3072), ("Q4_K", 9216, 3072), ("Q4_K", 3072, 3072), ("Q4_K", 3072, 8192),
    ("Q6_K", 3072, 8192),
    ("Q5_0", 9728, 896), ("Q5_0", 896, 896), ("Q8_0", 1152, 896), ("Q4_K", 896, 4864), ("Q6_K", 896, 4864),
    ("Q8_0", 5120, 2880), ("Q8_0", 2880, 4096), ("F16", 16384, 3072), ("Q4_0", 16384, 3072),
    ("MXFP4", 16384, 3072),
)  # fmt: skip
FAST_TOKENS = (128, 256, 512, 1024, 2048, 4096)


def weight_of(session: Session, shape: Shape, n: int, **flags: Any) -> PackedMatrix:
    def make() -> torch.Tensor:
        return torch.from_numpy(packed_tiles(shape.format, n, shape.k, shape.step)).to(session.device)

    packed = session.once((shape.format, n, shape.k), make)
    return upload(shape, n, packed, **flags)


def several_chunks(shape: Shape) -> Shape:
    """The same weight, summed in the fewest chunks above one that both kernels can have."""
    for chunks in range(2, 65):
        other = replace(shape, chunks=chunks)
        if -(-shape.k // shape.step) % chunks == 0 and can_be_wide(other, CAPABILITY):
            return other
    return shape


# -- the same bits -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product, but for how it is cut."""

    weight: PackedMatrix
    tokens: int
    bias: bool = False
    residual: bool = False
    glu: Glu | None = None
    heads: HeadsTo | None = None
    out: torch.dtype = torch.float32
    gap: int = 0  # columns between a token's outputs and the next one's

    @property
    def width(self) -> int:
        if self.heads is not None:
            return self.heads.params.num_heads * self.heads.params.head_dim
        return self.weight.n // 2 if self.glu is not None else self.weight.n

    def __str__(self) -> str:
        shape = self.weight.shape
        ends = [name for name in ("bias", "residual") if getattr(self, name)]
        ends += [self.glu.value] if self.glu else []
        ends += ["heads"] if self.heads else []
        return f"{shape.format} {self.weight.n}x{shape.k} S {shape.chunks} T {self.tokens} {' '.join(ends)}"


def cases(session: Session) -> Iterator[Case]:
    for name in CHECKED:
        for n, k in CHECKED_SHAPES:
            whole = replace(shape_of(name, n, k), chunks=1)
            for shape in {whole, several_chunks(whole)}:
                for tokens in CHECKED_TOKENS:
                    yield Case(weight=weight_of(session, shape, n), tokens=tokens)
    for name in ("Q4_K", "Q8_0", "MXFP4"):
        whole = replace(shape_of(name, 1216, 2048), chunks=1)
        for shape in (whole, several_chunks(whole)):
            yield from ends(session, shape)
    for heads, kv_heads, width, k in HEAD_SHAPES:
        for dtype in (torch.float16, FP8):
            for rotated in (True, False):
                params = AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=width, scale=1.0)
                yield with_heads(session, params, k, dtype, rotated)


def ends(session: Session, shape: Shape) -> Iterator[Case]:
    """What is done to a sum, of a weight whose rows alternate and one whose do not."""
    n = 1216
    plain, paired = weight_of(session, shape, n), weight_of(session, shape, n, paired=True)
    for tokens in END_TOKENS:
        yield Case(weight=plain, tokens=tokens, bias=True, residual=True)
        yield Case(weight=plain, tokens=tokens, out=plain.operand, gap=8)
        yield Case(weight=paired, tokens=tokens, bias=True)
        for glu in Glu:
            yield Case(weight=paired, tokens=tokens, bias=tokens == END_TOKENS[0], glu=glu, out=plain.operand)


def with_heads(session: Session, params: AttentionParams, k: int, dtype: torch.dtype, rotated: bool) -> Case:
    width, tokens = params.head_dim, HEAD_TOKENS
    n = (params.num_heads + 2 * params.num_kv_heads) * width
    weight = weight_of(session, shape_of("Q4_K", n, k), n, head=width)
    blocks = -(-tokens // BLOCK) + 1
    shape = 2, blocks, params.num_kv_heads, BLOCK, width
    generator = torch.Generator().manual_seed(width)
    slots = BLOCK + torch.randperm(tokens, generator=generator)
    positions = torch.randint(0, POSITIONS, (tokens,), generator=generator)
    rope = RopeParams(
        rotary_dim=width, inv_freq=tuple(10000.0 ** (-2 * i / width) for i in range(width // 2))
    )
    heads = HeadsTo(
        params,
        torch.zeros(shape, dtype=dtype, device=session.device),
        positions.to(session.device, torch.int32),
        slots.to(session.device, torch.int32),
        rope_table(rope, POSITIONS, session.device) if rotated else None,
    )
    return Case(weight=weight, tokens=tokens, bias=rotated, heads=heads, out=torch.float16)


def run(products: Products, case: Case, session: Session, cut: Cut | None) -> list[torch.Tensor]:
    """Everything that the product writes, as integers; by `linear` where there is no cut."""
    weight, tokens = case.weight, case.tokens
    x = session.random(tokens, weight.shape.k, seed=3).to(weight.operand)
    room = case.width + case.gap
    lines = torch.full((tokens, room), torch.nan, dtype=case.out, device=session.device)
    out = lines[:, : case.width]
    if case.heads is not None and not session.recording:
        case.heads.cache.view(torch.uint8).zero_()
    products.linear(
        x, weight, out,
        bias=session.random(weight.n, seed=4) if case.bias else None,
        residual=session.random(tokens, room, seed=5)[:, : case.width] if case.residual else None,
        glu=case.glu,
        heads=case.heads,
        tile=cut or tile_for(weight.shape, weight.n, tokens, session.capability),
    )  # fmt: skip
    written = [lines] if case.heads is None else [lines, case.heads.cache]
    return [one.view(torch.uint8).clone() for one in written]


def check_same(session: Session) -> None:
    """Bytes compared and bytes that differ, by way."""
    counts: dict[str, list[int]] = {}
    whole, slabs = Products(session.kernels), Products(session.kernels, SLAB)
    for case in cases(session):
        for products in (whole, slabs):
            products.reserve(case.weight)
            products.wide.make_room(case.weight)
        wanted = run(whole, case, session, None)
        ways = {"narrow": (whole, NARROW), "narrow, slabs": (slabs, NARROW)}
        if case.weight.shape.chunks == 1:
            ways |= {"wide": (whole, WIDE), "wide, slabs": (slabs, WIDE)}
        for label, (products, cut) in ways.items():
            found = run(products, case, session, cut)
            if session.recording:
                continue
            differing = sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
            count = counts.setdefault(label, [0, 0])
            count[0] += sum(one.numel() for one in found)
            count[1] += differing
            if differing:
                session.fail(f"DIFFERS {case} {label}: {differing} bytes")
        if case.heads is None and not session.recording and not finite(wanted[0], case):
            session.fail(f"{case}: not finite")
    session.save("same", counts)
    for label, (compared, differing) in counts.items():
        session.say(f"{label}: {compared:.1e} bytes compared, {differing} differ")


def finite(written: torch.Tensor, case: Case) -> bool:
    return bool(torch.isfinite(written.view(case.out)[:, : case.width].float()).all())


# -- fast --------------------------------------------------------------------------------------------------


def measure(session: Session) -> None:
    products = Products(session.kernels)
    rows: list[dict[str, Any]] = []
    rates: dict[tuple[int, int, int], float] = {}
    for name, n, k in FAST:
        shape = shape_of(name, n, k)
        packed = session.once((name, n, k), partial(packed_tiles, name, n, k))
        copies = max(2, min(16, -(-LARGER_THAN_L2 // len(packed))))
        weights = [upload(shape, n, torch.from_numpy(packed).to(session.device)) for _ in range(copies)]
        products.reserve(weights[0])
        products.wide.make_room(weights[0])
        for tokens in FAST_TOKENS:
            if not session.recording and (n, k, tokens) not in rates:
                rates[n, k, tokens] = matmul_teraflops(n, k, tokens)
            times = {label: time(session, products, weights, tokens, cut) for label, cut in ways_of(shape)}
            rows.append({"format": name, "n": n, "k": k, "tokens": tokens, "microseconds": times})
            session.save("fast", rows)
            flops = 2 * n * k * tokens / 1e6
            share = flops / min(times.values()) / rates.get((n, k, tokens), 1.0)
            told = ", ".join(f"{label} {micro:.1f}" for label, micro in times.items())
            chosen = cut_for(shape, n, tokens, session.capability)
            label = "linear" if chosen is None else f"{chosen.tokens} wide"
            session.say(
                f"{name} {n}x{k} S {shape.chunks} T {tokens}: {told} us ({label}); {share:.0%} of torch"
            )


def ways_of(shape: Shape) -> list[tuple[str, Cut | None]]:
    wide: list[tuple[str, Cut | None]] = [("256 wide", WIDE)] if shape.chunks == 1 else []
    return [("linear", None), *wide, ("128 wide", NARROW)]


def time(
    session: Session, products: Products, weights: Sequence[PackedMatrix], tokens: int, cut: Cut | None
) -> float:
    shape, n = weights[0].shape, weights[0].n
    x = session.random(tokens, shape.k).to(weights[0].operand)
    out = torch.empty(tokens, n, dtype=weights[0].operand, device=session.device)
    tile = cut or tile_for(shape, n, tokens, session.capability)
    return session.microseconds([partial(products.linear, x, one, out, tile=tile) for one in weights])


# -- without a GPU -----------------------------------------------------------------------------------------


def shipped() -> Iterator[Kernel]:
    """A kernel of every kind."""
    for name in CHECKED:
        shape = shape_of(name, 3072, 3072)
        if shape.format not in ("F16", "BF16"):
            yield unpack_kernel(shape)
    store = Store(num_heads=32, num_kv_heads=32, cache_block=BLOCK, rotated=True, fp8=False)
    for name in ("Q4_K", "MXFP4"):
        whole = replace(shape_of(name, 3072, 3072), chunks=1)
        for shape, cut in ((whole, WIDE), (replace(whole, chunks=2), NARROW)):
            for epilogue in (
                Epilogue(out="fp16"), Epilogue(bias=True, residual=True), Epilogue(paired=True),
                Epilogue(paired=True, glu=Glu.SWIGLU, bias=True, out=shape.operand),
                Epilogue(head=96, store=store, bias=True, out="fp16"),
                Epilogue(head=96, store=replace(store, fp8=True), out="fp16"),
            ):  # fmt: skip
                yield wide_kernel(shape, cut, epilogue)


def inspect(kernel: Kernel) -> str:
    """What is wrong with the machine code."""
    try:
        made = compile_kernel(kernel, CAPABILITY)
    except Exception as error:
        return f"{label_of(kernel)}: {type(error).__name__} {error}"
    log, sass = assembled(made, CAPABILITY)
    wrong: list[str] = []
    if re.search(r"\b(?:LDL|STL)\b", sass) or re.search(r"[1-9]\d* bytes spill", log):
        wrong.append("spills")
    if found := set(re.findall(r"C75\d\d", log)):
        wrong.append(f"ptxas warns {sorted(found)}")
    wrong += overwritten(sass)
    if kernel.function == "wide" and "HGMMA" not in sass:
        wrong.append("no wgmma")
    if made.metadata.shared > SHARED_BYTES[CAPABILITY]:
        wrong.append(f"{made.metadata.shared} bytes of shared memory")
    return f"{label_of(kernel)}: {', '.join(wrong)}" if wrong else ""


def label_of(kernel: Kernel) -> str:
    told = ("FORMAT", "CHUNKS", "TOKENS", "STAGES", "GLU", "BIAS", "RESIDUAL", "PAIRED", "HEAD")
    return (
        f"{kernel.function} {' '.join(f'{name} {value}' for name, value in kernel.constants if name in told)}"
    )


def inspect_all() -> int:
    kernels = list(dict.fromkeys(shipped()))
    wrong = [text for text in map(inspect, kernels) if text]
    print(*wrong, f"{len(kernels)} kernels, {len(wrong)} faults", sep="\n")
    return len(wrong)


PARTS = {"same": check_same, "fast": measure}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, PARTS, "gpu_wide.json")
    parser.add_argument("--compile", action="store_true", help="only compile, and look at the machine code")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    if args.compile:
        sys.exit(inspect_all() > 0)
    run_parts(args, PARTS)


if __name__ == "__main__":
    main()
