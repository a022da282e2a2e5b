"""
Puts the parts together: the only package that knows them all. `serve` runs a worker, `load` is for the shell.

Names are imported when they are used: torch takes seconds, and `serve` listens before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker_orcd.worker.loading import LoadedModel, Timings, load, plan_memory, start_engine
    from worker_orcd.worker.process import serve

__all__ = ["LoadedModel", "Timings", "load", "plan_memory", "serve", "start_engine"]


def __getattr__(name: str) -> Any:
    if name == "serve":
        from worker_orcd.worker import process

        return process.serve
    if name in __all__:
        from worker_orcd.worker import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
