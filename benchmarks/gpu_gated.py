"""
The gated unit of a dense feed-forward as the end of its product: right, the same bits whatever the batch, the
bits of a product and a unit launched one after the other, and how fast beside them.

    python benchmarks/gpu_gated.py                        # checks and figures, about a minute
    python benchmarks/gpu_gated.py --only correct same

Needs a GPU, torch, triton and numpy, and no network. Each part is run twice: first without launching, to
know its kernels, which are then compiled by many processes. Checks are against float64 on the same weights,
over ragged shapes, 1 … 130 tokens, float32 and what the next product takes; then tokens alone against the
same tokens at random places of batches under many tiles, bit for bit. All of it goes to a JSON file as it
comes; the lines are printed again last. Ends with 1 if a check failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from gpu_experts import bits, blank, gated
from gpu_linear import tiles
from gpu_session import Session, parser_of, run_parts
from gpu_timing import LARGER_THAN_L2
from gpu_weights import packed_tiles, random_rows
from worker_orcd.kernels.backend import Glu, Matrix
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.operations import Operations
from worker_orcd.kernels.cuda.variants import FORMATS, most_split_tokens, shape_of
from worker_orcd.kernels.cuda.weights import PackedMatrix, Uploader, upload
from worker_orcd.quant import BY_NAME

FORMATS_CHECKED = ("Q4_K", "Q6_K", "Q8_0", "Q5_0", "MXFP4")  # `gpu_linear.py` checks sums of every one
RAGGED = ((8, 256), (72, 1024), (136, 2816), (1544, 512))  # gates, columns
CHECKED_TOKENS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 129, 130)
SAME_SHAPES = ((512, 3072), (6144, 256))  # chunks that are split or walked; a single one
BATCHES = (1, 2, 7, 16, 17, 33, 64, 65, 130, 256, 512)
KNOWN = 32  # tokens that are also run alone
FAST_SHAPES = (("Q4_K", 8192, 3072), ("Q8_0", 8192, 3072), ("Q5_0", 4864, 896), ("Q4_0", 1536, 576))
FAST_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


# -- right -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Made:
    """A weight whose rows alternate, the same in order, and its values."""

    paired: PackedMatrix
    plain: PackedMatrix
    exact: torch.Tensor  # (2 * gates, k), gates first
    biases: tuple[torch.Tensor | None, torch.Tensor | None]  # of the one and of the other


def make(session: Session, name: str, gates: int, k: int, bias: bool) -> Made:
    fmt = BY_NAME[name]
    rows = [random_rows(fmt, gates, k, seed) for seed in (1, 2)]
    values = [np.random.default_rng(gates + one).standard_normal(gates).astype(np.float32) for one in (1, 2)]
    uploader = Uploader(session.device)
    parts = [Matrix(name, fmt, gates, k, one) for one in rows]
    made = [uploader.weight(parts, values if bias else (), gated=one, packed=True) for one in (True, False)]
    uploader.close()
    (paired,), (plain,) = (one.parts for one in made)
    assert isinstance(paired.weight, PackedMatrix) and isinstance(plain.weight, PackedMatrix)
    assert paired.weight.paired and not plain.weight.paired
    exact = torch.from_numpy(np.concatenate([fmt.dequantize_rows(one) for one in rows])).to(session.device)
    return Made(paired.weight, plain.weight, exact.double(), (paired.bias, plain.bias))


def check_correct(session: Session) -> None:
    """Relative error, as a root of mean squares, with the unit and without."""
    products = Products(session.kernels)
    worst: dict[str, float] = {}
    for index, name in enumerate(session.args.formats):
        for at, (gates, k) in enumerate(RAGGED):
            kind = list(Glu)[(index + at) % len(Glu)]
            made = session.once((name, gates, k), partial(make, session, name, gates, k, at % 2 == 0))
            products.reserve(made.paired, max(CHECKED_TOKENS))
            for tokens in CHECKED_TOKENS:
                x = session.random(tokens, k).to(made.paired.operand)
                for glu, dtype in ((kind, made.paired.operand), (kind if at < 2 else None, torch.float32)):
                    error = error_of(products, made, x, glu, dtype)
                    key = f"{name} {'in order' if glu is None else glu.value} {dtype}"
                    worst[key] = max(worst.get(key, 0.0), error)
                    # Of eight numbers one whose factors nearly cancel is enough.
                    few = tokens * gates < 64
                    allowed = 4e-3 if dtype is torch.bfloat16 or few else 1e-3
                    if error > allowed and not session.recording:
                        session.fail(f"WRONG {key} 2x{gates}x{k} {tokens} tokens: {error:.1e}")
    session.save("correct", worst)
    session.say("relative error: " + ", ".join(f"{key} {error:.1e}" for key, error in worst.items()))


def error_of(products: Products, made: Made, x: torch.Tensor, glu: Glu | None, dtype: torch.dtype) -> float:
    wanted = x.double() @ made.exact.T
    paired, plain = made.biases
    wanted = wanted if plain is None else wanted + plain
    if glu is not None:
        wanted = gated(glu, *wanted.chunk(2, dim=1))
    out = blank(*wanted.shape, dtype=dtype, device=x.device)
    products.linear(x, made.paired, out, bias=paired, glu=glu)
    error = float((out.double() - wanted).norm() / wanted.norm())
    return error if error == error else 1.0


# -- the same bits -----------------------------------------------------------------------------------------


def check_same(session: Session) -> None:
    """Words compared and words that differ: alone, in batches, and from two launches."""
    counts: dict[str, dict[str, int]] = {}
    for index, name in enumerate(session.args.formats):
        for gates, k in SAME_SHAPES:
            made = session.once((name, gates, k), partial(make, session, name, gates, k, k == 256))
            kind = list(Glu)[(index + (k == 256)) % len(Glu)]
            counts[f"{name} 2x{gates}x{k} {kind.value}"] = compare(session, made, kind)
    session.save("same", counts)
    compared, differing = (sum(one[what] for one in counts.values()) for what in ("compared", "differing"))
    session.say(f"{compared:.1e} outputs compared, {differing} differ")


def compare(session: Session, made: Made, glu: Glu) -> dict[str, int]:
    """Known tokens alone, launched twice for each; and at random places of batches."""
    products, operations, weight = Products(session.kernels), Operations(session.kernels), made.paired
    products.reserve(weight)
    pool = session.random(max(BATCHES), weight.shape.k, seed=7).to(weight.operand)
    gates = weight.n // 2
    apart = blank(KNOWN, gates, weight.operand, session.device)
    both = torch.empty(1, weight.n, device=session.device)
    for i in range(KNOWN):
        products.linear(pool[i : i + 1], made.plain, both, bias=made.biases[1])
        operations.glu(glu, both[:, :gates], both[:, gates:], apart[i : i + 1])
    compared = differing = 0
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        picked = torch.randperm(len(pool), generator=generator)[:batch]
        known = min(batch, KNOWN)
        places = torch.randperm(batch, generator=generator)[:known]
        picked[places] = torch.arange(known)
        x = pool[picked.to(session.device)]
        for tile in [None, *tiles(weight.shape)] if batch in (1, 33, 64, 256) else [None]:
            if tile is not None and tile.split and batch > most_split_tokens(weight.shape):
                continue
            out = blank(batch, gates, weight.operand, session.device)
            for _ in range(50 if batch <= 7 else 1):  # whoever arrives last
                products.linear(x, weight, out, bias=made.biases[0], glu=glu, tile=tile)
            if session.recording:
                continue
            bad = int((bits(out[places.to(session.device)]) != bits(apart[:known])).sum())
            compared, differing = compared + known * gates, differing + bad
            if bad:
                what = f"{weight.shape.format} 2x{gates}x{weight.shape.k} {glu}"
                session.fail(f"DIFFERS {what} batch {batch} {tile}: {bad} of {known * gates}")
    return {"compared": compared, "differing": differing}


# -- fast --------------------------------------------------------------------------------------------------


def rotation(session: Session, name: str, n: int, k: int) -> list[PackedMatrix]:
    """Copies that together are larger than the L2 cache."""
    packed = torch.from_numpy(packed_tiles(name, n, k)).to(session.device)
    copies = max(2, min(64, -(-LARGER_THAN_L2 // len(packed))))
    return [upload(shape_of(name, n, k), n, packed.clone(), paired=True) for _ in range(copies)]


def measure(session: Session) -> None:
    """Microseconds of the product alone, with the unit after it, and with the unit in it."""
    products, operations = Products(session.kernels), Operations(session.kernels)
    session.copy_bandwidth()
    session.say("µs: product, product and unit, unit in the product (the faster by)")
    rows: list[dict[str, object]] = []
    for name, gates, k in FAST_SHAPES:
        weights = session.once((name, gates, k), partial(rotation, session, name, 2 * gates, k))
        products.reserve(weights[0])
        for tokens in FAST_TOKENS:
            times = speed(session, products, operations, weights if tokens <= 64 else weights[:4], tokens)
            rows.append({"format": name, "gates": gates, "k": k, "tokens": tokens, "microseconds": times})
            session.save("fast", rows)
            alone, after, within = times
            session.say(
                f"  {name:5} 2x{gates}x{k} {tokens:4}: {alone:7.1f} {after:7.1f} {within:7.1f}"
                f" ({after - within:5.1f}, {1 - within / after:4.0%})"
            )


def speed(
    session: Session, products: Products, operations: Operations, weights: list[PackedMatrix], tokens: int
) -> tuple[float, float, float]:
    n = weights[0].n
    x = session.random(tokens, weights[0].shape.k).to(weights[0].operand)
    out = torch.empty(tokens, n, device=session.device)
    half = torch.empty(tokens, n // 2, dtype=weights[0].operand, device=session.device)
    plain = [dataclasses.replace(weight, paired=False) for weight in weights]

    def after(weight: PackedMatrix) -> None:
        products.linear(x, weight, out)
        operations.glu(Glu.SWIGLU, out[:, : n // 2], out[:, n // 2 :], half)

    return (
        session.microseconds([partial(products.linear, x, weight, out) for weight in plain]),
        session.microseconds([partial(after, weight) for weight in plain]),
        session.microseconds([partial(products.linear, x, one, half, glu=Glu.SWIGLU) for one in weights]),
    )


PARTS: dict[str, Callable[[Session], None]] = {
    "correct": check_correct,
    "same": check_same,
    "fast": measure,
}


def main() -> None:
    parser = parser_of(__doc__, PARTS, "gpu_gated.json")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS_CHECKED))
    run_parts(parser.parse_args(), PARTS)


if __name__ == "__main__":
    main()
