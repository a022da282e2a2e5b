"""The one place that turns settings into a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from worker_orcd.config import DeviceConfig
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.backend import missing_for_cuda, open_cuda


class LoadLibrary(Protocol):
    def __call__(self, *, on_compile: Callable[[], None] | None) -> Library: ...


def select_backend(
    config: DeviceConfig,
    warn: Callable[[str], None],
    load: LoadLibrary = load_library,
    on_compile: Callable[[], None] | None = None,
) -> Backend:
    """The backend for `config.device`. `warn` is called once, with a sentence, if it is a slow substitute.

    `on_compile` is called if the CPU's kernels have to be compiled first, which happens once on a machine.

    "auto" is a GPU where one can be used, else the CPU. Raises InvalidConfiguration for a device that is not
    there, and for settings the backend refuses.
    """
    if config.device == "cuda" or (config.device == "auto" and missing_for_cuda() is None):
        return open_cuda(config)
    try:
        library = load(on_compile=on_compile)
    except LibraryUnavailable as error:
        backend = ReferenceBackend(config.kv_cache_dtype, config.cpu_threads)
        ignored = "" if config.cpu_activations == "float32" else f" instead of {config.cpu_activations}"
        warn(
            "The fast CPU kernels are not available, so the slow reference runs, with float32 activations"
            f"{ignored}: {error}"
        )
        return backend
    return NativeBackend(library, config)
