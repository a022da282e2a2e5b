"""
Which products go from memory to registers (`linear_stream`, `expert_stream`), where that can be had at all.

It changes how long a product takes, never its bits. Importing this needs neither Triton nor a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from worker_orcd.kernels.cuda.variants import Shape, Tile, choose_tile

STREAM_CAPABILITY, STREAM_TRITON = 90, "3.6."  # what both were checked with
STREAMED = frozenset({"Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
_LARGEST = 24 << 20  # bytes of a weight, beyond which shared memory hides latency as well
_LARGEST_WHOLE = 10 << 20  # likewise of a product in one chunk
_MANY_ROWS = 4096  # whose programs fill the GPU with four warps each
_MOST_WARPS = 32  # of a program
_WORDS_AHEAD = 128  # of a row, in a product that is one chunk


@cache
def can_stream(capability: int) -> bool:
    """Gluon is an experiment of Triton's, which changes with it."""
    try:
        return capability == STREAM_CAPABILITY and version("triton").startswith(STREAM_TRITON)
    except PackageNotFoundError:
        return False


@cache  # layers are alike, and a start asks for all of them
def tile_for(shape: Shape, n: int, tokens: int, capability: int = 90) -> Tile:
    """The tile for a step of `tokens`: `variants.choose_tile`'s, or one that has `ahead`."""
    tile = stream_tile(shape, n) if tokens == 1 and can_stream(capability) else None
    return choose_tile(shape, n, tokens, capability) if tile is None else tile


def stream_tile(shape: Shape, n: int) -> Tile | None:
    """Of `linear_stream`, or None where it is not for this shape, or not faster.

    By what was fastest on an H200: `benchmarks/gpu_linear.py --only stream`.
    """
    chunks, layout = 1 << (shape.chunks - 1).bit_length(), shape.layout
    parts = max(1, len(layout.codes) // shape.step)
    if (
        shape.format not in STREAMED
        or shape.k % shape.step
        or (parts > 1 and shape.format != "Q6_K")
        or shape.steps_of_chunk % parts
        or chunks > _MOST_WARPS
        or (shape.format == "Q8_0" and chunks > 1)  # GPT-OSS's: slower
    ):
        return None
    size = layout.sections(n, shape.k, shape.step).size
    if size > (_LARGEST if chunks > 1 else _LARGEST_WHOLE):
        return None
    whole = chunks == 1
    rows = 64 if whole and n >= _MANY_ROWS else 16
    if whole and rows == 16:
        ahead = _WORDS_AHEAD * 2 // (shape.step // layout.planes)
    elif whole:
        ahead = 2
    else:
        ahead = (512 if chunks == 2 else 256) // shape.step
    return Tile(
        rows=rows,
        tokens=8,
        warps=rows // 16 * chunks,
        stages=1,
        ahead=max(1, min(ahead, shape.steps_of_chunk)),
    )
