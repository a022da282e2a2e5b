"""
What fixes the bits of a matrix product: how a weight's K is cut into chunks. It depends on nothing else.

Change anything here and answers change: raise `version.REPRODUCIBILITY_CONTRACT`.
"""

from __future__ import annotations

from worker_orcd.quant.gpu_layout import TILE, GpuLayout

WANTED_PROGRAMS = 256  # enough for the GPUs we know to hide memory's latency
SHORTEST_CHUNK = 256  # columns: adding up more parts would cost more than it brings
SLOTS = 4  # experts that a token goes to at least, in the models we know: their tiles are programs too


def num_chunks(layout: GpuLayout, n: int, k: int) -> int:
    """How many chunks of equal length the columns of an (n, k) matrix are summed in.

    The fewest that make enough programs, powers of two first: measured, see docs/perf/gpu.md.
    """
    tiles = -(-n // TILE)
    step = layout.step(k)
    steps = -(-k // step)
    longest = max(1, k // SHORTEST_CHUNK)
    allowed = [s for s in range(1, min(steps, longest) + 1) if steps % s == 0]
    enough = [s for s in allowed if tiles * s >= WANTED_PROGRAMS]
    powers = [s for s in enough if s & (s - 1) == 0]
    return min(powers or enough, default=max(allowed))


def num_expert_chunks(layout: GpuLayout, n: int, k: int) -> int:
    """How many chunks the columns of an expert's (n, k) matrix are summed in: see `num_chunks`."""
    return num_chunks(layout, SLOTS * -(-n // TILE) * TILE, k)
