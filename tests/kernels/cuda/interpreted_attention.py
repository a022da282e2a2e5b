"""
Attention under Triton's interpreter, compared with float64. Run in a process of its own, which
`TRITON_INTERPRET=1` must be set for before Triton is imported; see test_attention.py.

Prints a line of JSON: for each case how far off it is, into how many units its rows were cut, how many of
them have nothing to do, and what is left in the counters; then whether split rows have the bits of whole
ones.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from triton.runtime import interpreter

from gpu_attention_steps import Step, exact, random_step
from worker_orcd.kernels.backend import AttentionParams
from worker_orcd.kernels.cuda.attend import _RECORD, Attention
from worker_orcd.kernels.cuda.cache_type import FP8
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels

CPU = torch.device("cpu")
PROGRAMS = 3  # multiprocessors, that is

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """Bounds of loops that were loaded: numpy from 2.4 on makes no integer of an array of one."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched


class Interpreter(Kernels):
    """Runs what would be launched on a GPU without instructions for fp8."""

    def __init__(self) -> None:
        super().__init__(CPU, 80)

    @property
    def multiprocessors(self) -> int:
        return PROGRAMS

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        module = importlib.import_module(f"worker_orcd.kernels.cuda.{kernel.module}")
        given = [
            one.view(torch.uint8) if isinstance(one, torch.Tensor) and one.dtype == FP8 else one
            for one in arguments
        ]
        getattr(module, kernel.function)[grid](*given, **dict(kernel.constants))


def attended(
    step: Step, *, sinks: bool = False, splitting: float = 0.0, start: float = 0.0
) -> tuple[torch.Tensor, Attention]:
    cache = step.cache.tensor.dtype
    attention = Attention(Interpreter(), step.limits, cache=cache, start=start, splitting=splitting)
    attention.reserve(step.params)
    return step.run(attention, step.limits, sinks=sinks), attention


def units(work: torch.Tensor) -> torch.Tensor:
    """(units, integers of one): what was planned; the columns are `plan`'s."""
    return work.view(-1, _RECORD)[1:][: int(work[0])]


def case(
    params: AttentionParams,
    rows: list[tuple[int, int]],
    *,
    sinks: bool = False,
    block_size: int = 16,
    fp8: bool = False,
    **how: Any,
) -> dict[str, float]:
    step = random_step(params, rows, CPU, block_size=block_size, fp8=fp8)
    out, attention = attended(step, sinks=sinks, **how)
    wanted = exact(step, sinks=sinks)
    tokens = len(wanted)
    return {
        "error": float((out[:tokens].double() - wanted).norm() / wanted.norm()),
        "units": sum(len(units(work)) for work in attention._work.values()),
        "empty": sum(int((of[:, 4] >= of[:, 5]).sum()) for of in map(units, attention._work.values())),
        "counters": int(attention._counters.abs().sum()),
        "touched": int((~out[tokens:].isnan()).sum()),
    }


def params(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionParams:
    return AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.3, window=window)


def splits_change_nothing() -> int:
    """Words in which a row that was split differs from the same row whole."""
    kind = params(2, 1, 16)
    step = random_step(kind, [(700, 1), (300, 1)], CPU, block_size=32)
    split, attention = attended(step)
    whole, _ = attended(step, splitting=1e9)
    assert any(len(units(work)) > 2 for work in attention._work.values())
    return int((split[:2].view(torch.int32) != whole[:2].view(torch.int32)).sum())


CASES = {
    "mixed": lambda: case(params(6, 2, 16), [(0, 70), (200, 1), (5, 3), (0, 1), (300, 9)]),
    "whole": lambda: case(params(3, 1, 32), [(400, 1), (10, 2)], splitting=1e9),
    "nothing left": lambda: case(params(2, 1, 16, 60), [(160, 64)]),
    "pieces": lambda: case(params(2, 2, 96), [(150, 2), (0, 40)], block_size=64),
    "wide": lambda: case(params(2, 1, 256), [(300, 1)], block_size=48),
    "window": lambda: case(params(4, 1, 16, 100), [(500, 1), (0, 150), (60, 30)], sinks=True),
    "long window": lambda: case(params(2, 1, 16, 300), [(900, 1), (350, 40)], sinks=True, block_size=128),
    "fp8": lambda: case(params(4, 2, 96), [(300, 2), (0, 70)], fp8=True),
    "fp8 window": lambda: case(params(2, 1, 16, 60), [(200, 1), (0, 20)], sinks=True, fp8=True),
    "fp8 parts": lambda: case(params(2, 1, 192), [(300, 1)], block_size=32, fp8=True),
    "fp8 split": lambda: case(params(2, 1, 80), [(300, 1), (0, 70)], sinks=True, fp8=True),
    "many heads": lambda: case(params(70, 1, 16), [(130, 1)]),
}

if __name__ == "__main__":
    found: dict[str, Any] = {name: run() for name, run in CASES.items()}
    print(json.dumps(found | {"differ": splits_change_nothing()}))
