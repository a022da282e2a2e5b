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


OnCompile = Callable[[str, int, int], None]


def _nobody_watches(_whose: str, _done: int, _all: int) -> None:
    """Kernels are compiled."""


def select_backend(
    config: DeviceConfig,
    warn: Callable[[str], None],
    load: LoadLibrary = load_library,
    on_compile: OnCompile = _nobody_watches,
) -> Backend:
    """The backend for `config.device`. `warn` is called once, with a sentence, if it is a slow substitute.

    `on_compile(whose, done, all)` is told of kernels that have to be compiled first, which happens once on a
    machine: here the CPU's, as a whole; a GPU's one by one when the backend compiles a model's step.

    "auto" is a GPU where one can be used, else the CPU. Raises InvalidConfiguration for a device that is not
    there, and for settings the backend refuses.
    """
    if config.device == "cuda" or (config.device == "auto" and missing_for_cuda() is None):
        return open_cuda(config, lambda done, total: on_compile("GPU", done, total))
    try:
        library = load(on_compile=lambda: on_compile("CPU", 0, 1))
    except LibraryUnavailable as error:
        backend = ReferenceBackend(config.kv_cache_dtype, config.cpu_threads)
        ignored = "" if config.cpu_activations == "float32" else f" instead of {config.cpu_activations}"
        warn(
            "The fast CPU kernels are not available, so the slow reference runs, with float32 activations"
            f"{ignored}: {error}"
        )
        return backend
    return NativeBackend(library, config)
