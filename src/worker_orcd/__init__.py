"""An LLM inference worker: one GGUF model, one device, a crowd of requests, reproducible answers."""

from worker_orcd.version import VERSION as __version__

__all__ = ["__version__"]
