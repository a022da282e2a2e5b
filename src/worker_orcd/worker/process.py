"""The life of a worker process: listen, load, announce, serve, drain, exit. Interface."""

from __future__ import annotations

from worker_orcd.config import WorkerConfig


def serve(config: WorkerConfig) -> int:
    """Serve until told to stop; the exit code. Must be called on the main thread: it takes SIGTERM and SIGINT."""
    raise NotImplementedError
