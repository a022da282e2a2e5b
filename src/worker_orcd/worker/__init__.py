"""Puts the parts together: the only package that knows them all."""

from worker_orcd.worker.loading import LoadedModel, Timings, load, plan_memory, start_engine
from worker_orcd.worker.process import serve

__all__ = ["LoadedModel", "Timings", "load", "plan_memory", "serve", "start_engine"]
