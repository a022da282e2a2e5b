"""
The CUDA backend's products with the matrices of experts: right, the same bits whatever the batch and the way
a step goes, and how fast.

    python benchmarks/gpu_experts.py                      # checks and figures, about a minute and a half
    python benchmarks/gpu_experts.py --only correct same
    python benchmarks/gpu_experts.py --only tune          # which tile is fastest for few and for many tokens
    python benchmarks/gpu_experts.py --only variants streams   # many more of them, GPT-OSS-20B's

Needs a GPU, torch, triton and numpy, and no network. Each part is run twice: first without launching, to
know its kernels, which are then compiled by many processes. Checks are against float64 on the same weights;
then tokens alone, a program a pair, against the same tokens at random places of batches, sorted into tiles of
every width, bit for bit. Then times of gpt-oss-20b's and Qwen3-30B-A3B's experts: for few tokens beside the
bandwidth of a device copy in the same run (bytes are of the experts that are chosen, which change from launch
to launch), for many beside a dense product of the same size. All of it goes to a JSON file as it comes; the
lines are printed again last. Ends with 1 if a check failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from gpu_expert_times import WIDTHS, measure, random_experts, tune
from gpu_expert_tune import streams, variants
from gpu_session import Session, parser_of, run_parts
from gpu_weights import random_rows
from worker_orcd.kernels.backend import CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT, Glu, Matrix
from worker_orcd.kernels.cuda.expert_products import (
    MAX_PAIR_TOKENS,
    ExpertProducts,
    choose_expert_tile,
    choose_width,
)
from worker_orcd.kernels.cuda.expert_weights import PackedExperts, pack_experts
from worker_orcd.kernels.cuda.streaming import can_stream
from worker_orcd.kernels.cuda.variants import FORMATS, Tile
from worker_orcd.kernels.cuda.weights import Uploader
from worker_orcd.quant import BY_NAME

FORMATS_CHECKED = ("MXFP4", "Q4_K", "Q6_K", "Q3_K", "Q5_0", "Q8_0", "F16")
CHECKED_TOKENS = (1, 5, 40, 200)
BATCHES = (1, 2, 7, 16, 33, 64, 200, 512, 1024)
KNOWN = 32  # tokens that are also run alone


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def blank(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows that are parts of wider ones, full of NaN."""
    return torch.full((rows, columns + 16), torch.nan, dtype=dtype, device=device)[:, :columns]


# -- right -------------------------------------------------------------------------------------------------


def make(
    session: Session, name: str, num_experts: int, n: int, k: int, parts: int, bias: bool
) -> tuple[PackedExperts, list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights on the device, each part's values (num_experts, n, k), and biases."""
    fmt = BY_NAME[name]
    rows = [random_rows(fmt, num_experts * n, k, index) for index in range(parts)]
    exact = [torch.from_numpy(fmt.dequantize_rows(one)).view(num_experts, n, k) for one in rows]
    generator = np.random.default_rng(n)
    biases = [generator.standard_normal((num_experts, n)).astype(np.float32) for _ in rows] if bias else []
    matrices = [Matrix(name, fmt, n, k, one) for one in rows]
    uploader = Uploader(session.device)
    (weight,) = pack_experts(matrices, num_experts, biases, uploader)
    uploader.close()
    on_device = [torch.from_numpy(values).to(session.device) for values in biases]
    return weight, [one.to(session.device) for one in exact], [*on_device, *[None] * (parts - len(biases))]


def exactly(
    x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor
) -> torch.Tensor:
    """(tokens, slots, n) float64."""
    tokens, slots = experts.shape
    num_experts, n, k = exact.shape
    of_slots = x.double().view(tokens, -1, k).expand(tokens, slots, k)
    out = torch.zeros(tokens, slots, n, dtype=torch.float64, device=x.device)
    for expert in range(num_experts):
        chosen = experts == expert
        own = of_slots[chosen] @ exact[expert].double().T
        out[chosen] = own if bias is None else own + bias[expert].double()
    return out


def gated(kind: Glu, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if kind is Glu.SWIGLU:
        return torch.nn.functional.silu(gate) * up
    if kind is Glu.GEGLU:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=CLAMPED_SWIGLU_LIMIT)
    up = up.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
    return gate * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * gate) * (up + 1)


def check_sorting(session: Session) -> None:
    """Against torch's stable sort; tiles must be every expert's pairs, in order."""
    products = ExpertProducts(session.kernels)
    weight = make(session, "F16", 128, 8, 16, 1, False)[0]
    for tokens, slots, num_experts in ((1, 1, 4), (9, 4, 32), (200, 8, 128), (1024, 2, 3), (4096, 8, 128)):
        experts = random_experts(tokens, slots, num_experts, 0, session.device)
        experts[tokens // 2 :, 0] = int(experts[0, 0])  # one expert has many
        products.reserve(weight, tokens, slots)
        for width in WIDTHS:
            order = products.sort(experts, num_experts, width)
            if session.recording or order is None:
                continue
            flat = experts.reshape(-1)
            wrong = int((order.entries[: len(flat)] != torch.argsort(flat, stable=True)).sum())
            tiles = order.tiles[: 4 * order.num_tiles].view(-1, 4)[:, :3].tolist()
            if wrong or [tile for tile in tiles if tile[2]] != list(wanted_tiles(flat, num_experts, width)):
                session.fail(f"WRONG order of {tokens}x{slots}, width {width}: {wrong} entries, or tiles")


def wanted_tiles(experts: torch.Tensor, num_experts: int, width: int) -> Iterator[list[int]]:
    first = 0
    for expert, count in enumerate(torch.bincount(experts, minlength=num_experts).tolist()):
        for start in range(0, count, width):
            yield [expert, first + start, min(width, count - start)]
        first += count


def check_correct(session: Session) -> None:
    """Relative error of both ways, as a root of mean squares: with a gated unit and a bias, and without."""
    check_sorting(session)
    products = ExpertProducts(session.kernels)
    worst: dict[str, float] = {}
    kinds = list(Glu)
    for index, name in enumerate(session.args.formats):
        kind = kinds[index % len(kinds)]
        shapes = ((2, 72, 512, 3), (1, 200, 768, 2))
        if name == "MXFP4":  # in steps of 64, which may go to registers
            shapes += (2, 72, 2880, 3), (1, 200, 320, 2)
        for parts, n, k, slots in shapes:
            weight, exact, bias = session.once(
                (name, parts, k), partial(make, session, name, 6, n, k, parts, parts == 2)
            )
            for tokens in CHECKED_TOKENS:
                experts = random_experts(tokens, slots, 6, 0, session.device)
                products.reserve(weight, tokens, slots)
                x = session.random(tokens, k if parts == 2 else slots * k).to(weight.operand)
                for glu in (kind, None) if parts == 2 else (None,):
                    error = error_of(products, weight, exact, bias, x, experts, glu)
                    key = f"{name} {glu.value}" if glu else name
                    worst[key] = max(worst.get(key, 0.0), error)
                    allowed = 4e-3 if glu and weight.operand is torch.bfloat16 else 1e-3
                    if error > allowed and not session.recording:
                        session.fail(f"WRONG {key} {n}x{k} {tokens} tokens: {error:.1e}")
    session.save("correct", worst)
    session.say("relative error: " + ", ".join(f"{key} {error:.1e}" for key, error in worst.items()))


def error_of(
    products: ExpertProducts, weight: PackedExperts, exact: list[torch.Tensor],
    bias: list[torch.Tensor | None], x: torch.Tensor, experts: torch.Tensor, glu: Glu | None,
) -> float:  # fmt: skip
    """The larger of the two ways' errors. Of a paired weight without unit, gates come first."""
    tokens = len(x)
    sums = [
        exactly(x, own, values, experts).view(tokens, -1) for own, values in zip(exact, bias, strict=True)
    ]
    wanted = torch.cat(sums, dim=1) if glu is None else gated(glu, *sums)
    dtype = torch.float32 if glu is None else weight.operand
    errors: list[float] = []
    for width in (None, choose_width(experts.numel(), weight.num_experts)):
        if width is None and tokens > MAX_PAIR_TOKENS:
            continue
        order = None if width is None else products.sort(experts, weight.num_experts, width)
        out = blank(*wanted.shape, dtype=dtype, device=x.device)
        products.linear(x, weight, experts, out, order=order, glu=glu)
        error = float((out.double() - wanted).norm() / wanted.norm())
        errors.append(error if error == error else 1.0)
    return max(errors, default=0.0)


# -- the same bits -----------------------------------------------------------------------------------------


def tiles(weight: PackedExperts, width: int, capability: int) -> list[Tile | None]:
    """The tile that is chosen, and others: those that only some weights and GPUs can have last."""
    made: list[Tile | None] = [None]
    few = ((64, 16, 4, 3), (128, 16, 8, 4))
    many = {16: few, 32: ((64, 32, 4, 2),), 64: ((128, 32, 4, 3),), 128: ((128, 64, 4, 3), (64, 128, 4, 2))}
    for rows, tokens, warps, stages in many[width] if width else few:
        split = not width and weight.shape.chunks > 1
        made.append(Tile(rows=rows, tokens=tokens, warps=warps, stages=stages, split=split))
    steps = weight.shape.steps_of_chunk
    if width and weight.shape.format == "MXFP4" and steps % 3 == 0:
        made.append(Tile(rows=128, tokens=min(width, 64), warps=4, stages=3, unroll=3))
    if (
        not width
        and can_stream(capability)
        and choose_expert_tile(weight.shape, 64, 1, 0, streamed=True).ahead
    ):
        for rows, warps in ((64, 4), (128, 4)):
            made += [
                Tile(rows=rows, tokens=8, warps=warps, stages=1, ahead=ahead)
                for ahead in (1, 3, 5, 9, 15)
                if steps % ahead == 0
            ]
    return made


def check_same(session: Session) -> None:
    """Words compared and words that differ, by weight."""
    counts: dict[str, dict[str, int]] = {}
    for name, num_experts, n, k, slots, parts in (
        ("MXFP4", 8, 576, 2880, 4, 2), ("MXFP4", 8, 200, 2880, 4, 1),
        ("MXFP4", 4, 2880, 2880, 4, 1), ("MXFP4", 4, 200, 320, 2, 1), ("Q4_K", 16, 768, 2048, 8, 2),
        ("Q6_K", 16, 2048, 768, 8, 1), ("Q8_0", 6, 320, 512, 2, 1),
    ):  # fmt: skip
        build = partial(make, session, name, num_experts, n, k, parts, parts == 2)
        weight = session.once((name, n, k), build)[0]
        for chunks in (1, weight.shape.chunks) if n == 768 else (weight.shape.chunks,):
            shape = dataclasses.replace(weight.shape, chunks=chunks)
            one = dataclasses.replace(weight, matrix=dataclasses.replace(weight.matrix, shape=shape))
            key = f"{name} {num_experts}x{n}x{k} in {chunks}"
            glu = Glu.CLAMPED_SWIGLU if parts == 2 and chunks == weight.shape.chunks else None
            counts[key] = compare(session, key, one, slots, glu)
    session.save("same", counts)
    compared, differing = (sum(one[what] for one in counts.values()) for what in ("compared", "differing"))
    session.say(f"{compared:.1e} outputs compared, {differing} differ")


def compare(session: Session, key: str, weight: PackedExperts, slots: int, glu: Glu | None) -> dict[str, int]:
    """Known tokens alone, and at random places of batches, whose other tokens go anywhere."""
    products, num_experts, k = ExpertProducts(session.kernels), weight.num_experts, weight.shape.k
    capability = session.kernels.capability
    shared = weight.paired
    products.reserve(weight, 4 * 64, 4 * slots)  # room for 32 tokens' pairs, and more entries than needed
    products.reserve(weight, max(BATCHES), slots)
    pool = session.random(max(BATCHES), k if shared else slots * k, seed=7).to(weight.operand)
    routed = random_experts(max(BATCHES), slots, num_experts, 7, session.device)
    columns = slots * weight.n // (2 if glu else 1)
    dtype = torch.float32 if glu is None else weight.operand
    alone = blank(KNOWN, columns, dtype=dtype, device=session.device)
    for i in range(KNOWN):
        products.linear(pool[i : i + 1], weight, routed[i : i + 1], alone[i : i + 1], glu=glu)
    compared = differing = 0
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        picked = torch.randperm(max(BATCHES), generator=generator)[:batch]
        known = min(batch, KNOWN)
        places = torch.randperm(batch, generator=generator)[:known]
        picked[places] = torch.arange(known)
        x, experts = pool[picked.to(session.device)], routed[picked.to(session.device)]
        for width in (0, *WIDTHS):
            if width == 0 and batch > 4 * MAX_PAIR_TOKENS:
                continue
            order = products.sort(experts, num_experts, width) if width else None
            for tile in tiles(weight, width, capability) if batch in (1, 16, 512) else [None]:
                out = blank(batch, columns, dtype=dtype, device=session.device)
                for _ in range(50 if width == 0 and batch <= 7 else 1):  # whoever arrives last
                    products.linear(x, weight, experts, out, order=order, glu=glu, tile=tile)
                if session.recording:
                    continue
                found = bits(out[places.to(session.device)])
                bad = int((found != bits(alone[:known])).sum())
                compared, differing = compared + found.numel(), differing + bad
                if bad:
                    session.fail(f"DIFFERS {key} {glu} batch {batch} width {width} {tile}: {bad} words")
    return {"compared": compared, "differing": differing}


PARTS: dict[str, Callable[[Session], None]] = {
    "correct": check_correct,
    "same": check_same,
    "fast": measure,
    "tune": tune,
    "variants": variants,
    "streams": streams,
}


def main() -> None:
    parser = parser_of(__doc__, PARTS, "gpu_experts.json", default=("correct", "same", "fast"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS_CHECKED))
    run_parts(parser.parse_args(), PARTS)


if __name__ == "__main__":
    main()
