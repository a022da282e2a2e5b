"""Puts the parts together: the only package that knows them all. `serve` runs a worker, `load` is for the
shell."""

from worker_orcd.worker.loading import LoadedModel, Timings, load, start_engine
from worker_orcd.worker.process import serve

__all__ = ["LoadedModel", "Timings", "load", "serve", "start_engine"]
