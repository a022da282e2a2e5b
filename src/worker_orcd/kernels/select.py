"""The one place that turns settings into a backend."""

from __future__ import annotations

from collections.abc import Callable

from worker_orcd.config import DeviceConfig
from worker_orcd.errors import InvalidConfiguration
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.reference import ReferenceBackend


def select_backend(
    config: DeviceConfig, warn: Callable[[str], None], load: Callable[[], Library] = load_library
) -> Backend:
    """The backend for `config.device`. `warn` is called once, with a sentence, if it is a slow substitute.

    "auto" is the CPU: this version has no other backend. Raises InvalidConfiguration for a device there is no
    backend for, and for settings the backend refuses.
    """
    if config.device == "cuda":
        raise InvalidConfiguration("device is cuda; this version has no CUDA backend, available is: cpu")
    try:
        library = load()
    except LibraryUnavailable as error:
        warn(f"The fast CPU kernels are not available, so the slow reference runs instead: {error}")
        return ReferenceBackend(config.kv_cache_dtype)
    return NativeBackend(library, config)
