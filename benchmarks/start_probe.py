"""
A worker's command line, with the times of its start written down: for `gpu_start.py`.

    python benchmarks/start_probe.py LOG serve MODEL …

LOG gets a line of JSON for each import and call that is watched, when it ends: what, when it began and ended
(seconds of the system's clock), and seconds of a core that its thread took meanwhile. What is imported here
is what the command imports first in any case.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO

BEGAN = time.time()

# Imports, with all that they import in turn, and calls: module, name, and what it is called in the log.
MODULES = {
    "worker_orcd.cli.app": "command line imported",
    "worker_orcd.worker.process": "HTTP imported",
    "worker_orcd.worker.loading": "backend imported",
    "torch": "torch imported",
    "triton": "triton imported",
}
CALLS = {
    ("worker_orcd.worker.ahead", "load_libraries"): "torch's libraries (ahead)",
    ("worker_orcd.worker.ahead", "make_context"): "device context (ahead)",
    ("worker_orcd.worker.ahead", "read_ahead"): "pages of the file (ahead)",
    ("worker_orcd.gguf.reader", "GGUFFile.__init__"): "header of the file",
    ("worker_orcd.kernels.select", "select_backend"): "device chosen",
    ("worker_orcd.worker.words", "_load"): "tokenizer",
    ("worker_orcd.model.weights", "load_weights"): "weights on the device",
    ("worker_orcd.kernels.cuda.compiler", "prepare_triton"): "compiler prepared",
    ("worker_orcd.kernels.cuda.compiler", "Kernels.collect"): "kernels known",
    ("worker_orcd.kernels.cuda.compiler", "Kernels.compile_all"): "kernels read",
    ("worker_orcd.kernels.cuda.executor", "Executor.warm"): "kernels and graphs",
    ("worker_orcd.kernels.cuda.executor", "Executor._graph"): "a graph",
    ("worker_orcd.kernels.cuda.step", "DrawingStep.warm"): "and graphs of many rounds",
    ("worker_orcd.runner.measure", "settled"): "memory planned again",
    ("worker_orcd.runner.measure", "seal"): "memory sealed",
    ("worker_orcd.runner.runner", "ModelRunner.__init__"): "model ready to compute",
}
SOURCES = "modules without bytecode"


class Probe:
    """A finder of modules that watches, and leaves the finding to Python's own."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._modules = self._sources = 0
        self.note("interpreter", BEGAN, 0.0)

    def note(self, what: str, began: float, cpu: float, ended: float | None = None) -> None:
        ended = time.time() if ended is None else ended
        self._log.write(
            f'{{"what": "{what}", "began": {began:.6f}, "ended": {ended:.6f}, "cpu": {cpu:.6f}}}\n'
        )

    def count(self) -> None:
        """As the worker ends: how many modules there were, in `ended`, and without bytecode, in `began`."""
        self.note(SOURCES, self._sources, 0.0, self._modules)

    def timed(self, what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began, cpu = time.time(), time.thread_time()
            try:
                return work(*args, **options)
            finally:
                self.note(what, began, time.thread_time() - cpu)

        return call

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.cached:
            return spec
        self._modules += 1
        self._sources += not os.path.exists(spec.cached)  # noqa: PTH110  # of a start, as little as can be
        calls = {what: called for (module, what), called in CALLS.items() if module == name}
        if name in MODULES or calls:
            loader: Any = spec.loader
            loader.exec_module = self._watched(name, loader.exec_module, calls)
        return spec

    def _watched(
        self, name: str, execute: Callable[[ModuleType], None], calls: dict[str, str]
    ) -> Callable[[ModuleType], None]:
        if name in MODULES:
            execute = self.timed(MODULES[name], execute)

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for path, called in calls.items():
                *of, last = path.split(".")
                owner = getattr(module, of[0], None) if of else module
                if hasattr(owner, last):
                    setattr(owner, last, self.timed(called, getattr(owner, last)))

        return exec_module


def main() -> None:
    path, *arguments = sys.argv[1:]
    del sys.path[0]  # this directory, which no command has there
    probe = Probe(open(path, "w", buffering=1))  # noqa: PTH123, SIM115  # as long as the process
    sys.meta_path.insert(0, probe)
    sys.argv = ["worker-orcd", *arguments]
    from worker_orcd.cli import main

    try:
        main()
    finally:
        probe.count()


if __name__ == "__main__":
    main()
