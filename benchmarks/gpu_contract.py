"""
What the contract costs: a model's matrix products as they are, beside the fastest there are without it.

    python benchmarks/gpu_contract.py
    python benchmarks/gpu_contract.py --models Phi-3-mini --tokens 1 64

Needs a GPU, torch, triton and numpy, no network. Under the contract the number of chunks that a weight's
columns are summed in is the same for any number of tokens (`kernels.cuda.contract`). Here each product is
timed with other numbers too, with every tile that is worth trying, split and walked; the fastest is what one
would run if answers might depend on the batch. Printed is the time of all products of a step and by how much
the contract makes them longer. Attention is not in it: where its splits begin is fixed, but how it is cut
into programs is not (see `gpu_attention.py --only tune`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_linear import Rotation, Session
from worker_orcd.kernels.cuda.variants import Shape, Tile, Variant, choose_tile, shape_of

# Format, rows, columns and how many of them a step has.
MODELS: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "Qwen2.5-0.5B": (
        ("Q5_0", 1152, 896, 24), ("Q5_0", 896, 896, 24), ("Q5_0", 9728, 896, 24), ("Q4_K", 896, 4864, 12),
        ("Q6_K", 896, 4864, 12),
    ),
    "Phi-3-mini": (
        ("Q4_K", 9216, 3072, 32), ("Q4_K", 3072, 3072, 32), ("Q4_K", 16384, 3072, 32),
        ("Q4_K", 3072, 8192, 16), ("Q6_K", 3072, 8192, 16),
    ),
}  # fmt: skip
TOKENS = (1, 16, 64, 256)
MOST_CHUNKS = 24
MOST_PARTS = 64 << 20  # bytes of a split product's parts, beyond which nothing is gained


def tiles(tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows, tokens, warps and stages."""
    if tokens <= 16:
        yield from ((64, 16, 4, 3), (64, 16, 4, 4))
    elif tokens <= 64:
        yield from ((64, 16, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3))
    else:
        yield from ((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2))


def free_ways(shape: Shape, n: int, tokens: int) -> Iterator[tuple[Shape, Tile]]:
    """Other numbers of chunks, which divide the steps of a row, and how to sum them."""
    steps = -(-shape.k // shape.step)
    for chunks in [one for one in range(1, MOST_CHUNKS + 1) if steps % one == 0]:
        free = dataclasses.replace(shape, chunks=chunks)
        fits = 4 * chunks * tokens * n <= MOST_PARTS
        for rows, width, warps, stages in tiles(tokens):
            for split in [True] * (chunks > 1 and fits) + [False] * (chunks == 1 or tokens > 16):
                yield free, Tile(rows=rows, tokens=width, warps=warps, stages=stages, split=split)


def fastest(rotation: Rotation, n: int, tokens: int) -> tuple[float, str]:
    """Microseconds without the contract, and how."""
    shape = rotation.weights[0].shape
    found: list[tuple[float, str]] = []
    for free, tile in free_ways(shape, n, tokens):
        label = f"{free.chunks} {'split' if tile.split else 'walked'} {tile.rows}x{tile.tokens}"
        try:
            found.append((rotation.microseconds(tokens, tile, free), label))
        except Exception as error:  # too much shared memory: Triton's own error type
            rotation.session.say(f"  {label}: {type(error).__name__}")
    return min(found)


def measure(session: Session, model: str) -> None:
    shapes = [(shape_of(name, n, k), n, count) for name, n, k, count in MODELS[model]]
    session.compile(
        Variant(shape=free, tile=tile)
        for shape, n, _ in shapes
        for tokens in session.args.tokens
        for free, tile in [*free_ways(shape, n, tokens), (shape, choose_tile(shape, n, tokens))]
    )
    sums = {tokens: [0.0, 0.0] for tokens in session.args.tokens}
    for shape, n, count in shapes:
        rotation = Rotation(session, shape.format, n, shape.k)
        session.products.make_room(MOST_PARTS // 4)
        for tokens in session.args.tokens:
            ours = rotation.microseconds(tokens)
            free, label = fastest(rotation, n, tokens)
            free = min(free, ours)  # the same way, timed again
            sums[tokens][0] += count * ours
            sums[tokens][1] += count * free
            session.say(
                f"  {shape.format} {n}x{shape.k}, {tokens} tokens: {ours:.1f} us in {shape.chunks} chunks,"
                f" {free:.1f} without the contract ({label})"
            )
        del rotation
        torch.cuda.empty_cache()
    session.save(model, {str(tokens): pair for tokens, pair in sums.items()})
    for tokens, (ours, free) in sums.items():
        session.say(
            f"{model}: products of {tokens} tokens: {ours:.0f} us, {free:.0f} without the contract:"
            f" {ours / free - 1:+.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--jobs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_contract.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    for model in session.args.models:
        measure(session, model)
    print("\n" + "\n".join(session.lines))
    sys.exit(bool(session.failures))


if __name__ == "__main__":
    main()
