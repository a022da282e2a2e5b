"""Time on a GPU: whole graphs of launches, medians of replays, and what the machine itself can do."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from worker_orcd.version import REPRODUCIBILITY_CONTRACT

LARGER_THAN_L2 = 256 << 20  # bytes that a pass over rotating weights must touch


def graph_microseconds(
    runs: Sequence[Callable[[], object]], milliseconds: float = 4.0, repeats: int = 5
) -> float:
    """Median time of one of `runs`, captured in order in one graph that is replayed."""
    runs[0]()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    graph.replay()
    torch.cuda.synchronize()

    def timed(replays: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / replays

    replays = max(1, min(50, int(milliseconds / repeats / max(timed(1), 1e-3))))
    return 1000 * statistics.median(timed(replays) for _ in range(repeats)) / len(runs)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of a gibibyte, read and written."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1000 / graph_microseconds([lambda: target.copy_(source)], 60.0, 7)


def matmul_teraflops(n: int, k: int, tokens: int) -> float:
    """Of torch's float16 matmul of the same shape."""
    weight = torch.randn(n, k, device="cuda").half() * 0.02
    x = torch.randn(tokens, k, device="cuda").half()
    out = torch.empty(tokens, n, dtype=torch.float16, device="cuda")
    micro = graph_microseconds([lambda: torch.matmul(x, weight.T, out=out)] * 4, 12.0)
    return 2 * n * k * tokens / micro / 1e6


def stamp(commit: str | None, device: str = "cuda") -> dict[str, Any]:
    """What a result must say of where it comes from. `device`: cuda or cpu."""
    if commit is None:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = asked.stdout.strip() or "unknown"
    machine = _gpu() if device == "cuda" else {"device": f"CPU, {platform.machine()}"}
    return {
        "commit": commit,
        "contract": REPRODUCIBILITY_CONTRACT,
        **machine,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _gpu() -> dict[str, Any]:
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver.stdout.strip(),
        "triton": triton.__version__,
    }
