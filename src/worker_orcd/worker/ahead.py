"""
What a start can do beside importing modules, which an interpreter does one at a time.

torch's libraries are loaded, the GPU's context is made and the file's pages are asked for on threads of their
own, in calls that let go of the interpreter's lock, while the main thread imports what HTTP needs. Whatever
fails here fails again, and is told, where it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from worker_orcd.config import DeviceConfig

# In the order in which they need one another. One call for all would keep the loader's lock, and with it
# every other thread that imports an extension, until the last one is there.
_LIBRARIES = ("libtorch_global_deps", "libc10", "libtorch_cpu", "libc10_cuda", "libtorch_cuda")
# What the worker needs in any case and has extensions, which cannot be loaded while torch's libraries are.
_WITH_EXTENSIONS = ("numpy", "tokenizers", "msgspec", "uvicorn", "httptools", "multiprocessing.synchronize")
_DRIVER = "libcuda.so.1"
_END_SECONDS = 5.0  # that the end of the process waits for what is under way
# How torch's operations behave on tensors without memory: for its compiler, which the worker does not use. A
# fourth of what `import torch` takes.
_NOT_NEEDED = "torch._meta_registrations"


def begin(device: DeviceConfig, model: Path | None) -> None:
    """Start all of it; nothing waits for it. `model`: the file, if it is here already."""
    gc.disable()  # what is imported stays: walking it again and again takes a tenth of the time
    for name in _WITH_EXTENSIONS:
        with contextlib.suppress(ImportError):  # told where it is needed
            importlib.import_module(name)
    work: list[Callable[[], None]] = [load_libraries]
    if device.device != "cpu":
        work.append(lambda: make_context(device.gpu_index))
    if model is not None:
        work.append(lambda: read_ahead(model))
    threads = [threading.Thread(target=one, name="ahead", daemon=True) for one in work]
    for thread in threads:
        thread.start()
    # A library or a driver that is half loaded does not like the process to end; a driver that hangs must not
    # keep it from ending.
    atexit.register(_wait, threads)


def _wait(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(_END_SECONDS)


def load_libraries() -> None:
    """Those of torch that know nothing of Python."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations or sys.platform != "linux":
        return
    directory = Path(found.submodule_search_locations[0], "lib")
    # `ctypes.CDLL` keeps the interpreter's lock while it loads; a call of the function does not.
    load = ctypes.CDLL(None).dlopen
    load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for name in _LIBRARIES:
        path = directory / f"{name}.so"
        visibility = os.RTLD_GLOBAL if name == _LIBRARIES[0] else os.RTLD_LOCAL  # as torch does
        if path.exists() and not load(os.fsencode(path), os.RTLD_NOW | visibility):
            return


def make_context(index: int, driver: str = _DRIVER) -> None:
    """The context of a GPU that all in this process share; torch finds it made."""
    with contextlib.suppress(OSError, AttributeError):  # no driver
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, before the driver reads it
        cuda = ctypes.CDLL(driver)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def read_ahead(path: Path) -> None:
    """Ask for the file's pages, if they leave room for others."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if 2 * size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)


def imported() -> None:
    """All is there that lives as long as the process: the collector is back, and does not walk that."""
    if not gc.isenabled():  # else a model is loaded once more: nothing has been imported
        gc.freeze()
        gc.enable()


def import_torch() -> None:
    """`import torch`, without what is not needed until somebody asks for something of it."""
    if "torch" in sys.modules:
        return
    sys.meta_path.insert(0, _Postponing)
    try:
        importlib.import_module("torch")
    finally:
        sys.meta_path.remove(_Postponing)


class _Postponed(ModuleType):
    """A module that is executed when something that it defines is asked for: nothing that is used is missing.

    Not when somebody looks at what every module has, as one by `importlib.util.LazyLoader` would be: torch
    walks through all modules for their files.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or not isinstance(spec.loader, _Later):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        object.__setattr__(self, "__class__", ModuleType)
        self.__loader__ = spec.loader = spec.loader.loader
        spec.loader.exec_module(self)
        return getattr(self, name)


class _Later(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Postponed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing, yet."""


class _Postponing:
    """A finder of one module."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _NOT_NEEDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec
