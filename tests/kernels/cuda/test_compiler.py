"""Kernels are known before they are compiled, compiled once, and launched with what they name."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from worker_orcd.kernels.cuda import compiler
from worker_orcd.kernels.cuda.compiler import FEW, Kernel, Kernels

CPU = torch.device("cpu")


def kernel(number: int = 0, **changes: Any) -> Kernel:
    return Kernel(
        module="linear", function="linear", arguments=(("x", "*fp32"), ("n", "i32"), ("y", "*i32")),
        constants=(("NUMBER", number),), **changes,
    )  # fmt: skip


class Compiled:
    """Takes the place of a compiled kernel: keeps what it was launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.calls: list[tuple[Any, ...]] = []

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        assert arguments[:6] == (0, "function", "metadata", None, None, None)
        self.calls.append(((x, y, z), *arguments[6:]))


def test_a_kernel_is_compiled_once_and_launched_with_addresses() -> None:
    kernels = Kernels(CPU, 90, Compiled)
    x = torch.zeros(4)
    for _ in range(2):
        kernels.launch(kernel(), (1, 2, 3), x, 7, x)
    compiled = kernels.compiled(kernel())
    assert compiled.capability == 90
    assert compiled.calls == [((1, 2, 3), x.data_ptr(), 7, x.data_ptr(), None)] * 2
    with pytest.raises(ValueError, match="linear takes 3 arguments, not 2"):
        kernels.launch(kernel(), (1, 1, 1), x, 7)


def test_collecting_launches_nothing() -> None:
    kernels = Kernels(CPU, 90, pytest.fail)

    def work() -> None:
        for number in (2, 1, 2):
            kernels.launch(kernel(number), (1, 1, 1), 0, 0, 0)

    assert kernels.collect(work) == [kernel(2), kernel(1)]
    with pytest.raises(ZeroDivisionError):
        kernels.collect(lambda: 1 // 0)
    assert kernels.collect(lambda: None) == []


@pytest.mark.parametrize("count", [1, 3 * FEW])
@pytest.mark.parametrize("patience", [1e9, 0.0])
def test_what_is_missing_is_compiled_and_progress_told(
    count: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this process, or by as many as there are cores."""
    monkeypatch.setattr(compiler, "PATIENCE", patience)
    monkeypatch.setattr(compiler, "READING", 0.0)
    kernels = Kernels(CPU, 90, Compiled)
    kernels.compiled(kernel(0))
    told: list[tuple[int, int]] = []
    kernels.compile_all(
        [kernel(number) for number in range(count + 1)], lambda *progress: told.append(progress)
    )
    assert told == [(done, count) for done in range(1, count + 1)]
    assert all(kernels.compiled(kernel(number)).capability == 90 for number in range(count + 1))


def says_who(kernel: Kernel, _capability: int) -> int:
    (number,) = (value for name, value in kernel.constants if name == "NUMBER")
    with Path(kernel.function, f"{number}-{os.getpid()}").open("x"):
        return os.getpid()


@pytest.mark.parametrize("patience", [1e9, 0.0])
def test_other_processes_compile_only_what_would_take_long(
    patience: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler, "PATIENCE", patience)
    monkeypatch.setattr(compiler, "READING", 0.0)
    kernels = Kernels(CPU, 90, says_who)
    several = [replace(kernel(number), function=str(tmp_path)) for number in range(3 * FEW)]
    kernels.compile_all(several, lambda _done, _all: None)
    by_others = [file for file in tmp_path.iterdir() if not file.name.endswith(f"-{os.getpid()}")]
    assert len(by_others) == (0 if patience or (os.cpu_count() or 1) < 2 else len(several))
    assert all(kernels.compiled(one) == os.getpid() for one in several)


def dies_in_a_child(kernel: Kernel, capability: int) -> Compiled:
    if multiprocessing.parent_process() is not None:
        os._exit(1)
    return Compiled(kernel, capability)


def test_processes_that_die_do_not_end_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "PATIENCE", 0.0)
    monkeypatch.setattr(compiler, "READING", 0.0)
    kernels = Kernels(CPU, 90, dies_in_a_child)
    several = [kernel(number) for number in range(3 * FEW)]
    kernels.compile_all(several, lambda _done, _all: None)
    assert all(kernels.compiled(one).capability == 90 for one in several)


def test_which_arguments_are_multiples_of_sixteen() -> None:
    assert kernel().aligned_arguments == (0, 2)
    assert kernel(aligned=("n",)).aligned_arguments == (0, 1, 2)
    assert kernel(loose=("y",)).aligned_arguments == (0,)


def test_what_prepares_is_over_before_a_kernel_is_compiled() -> None:
    order: list[str] = []
    begin = threading.Event()

    def prepare() -> None:
        begin.wait(60)
        order.append("prepared")
        raise OSError("told by who needs it")

    def compile(kernel: Kernel, capability: int) -> Compiled:
        order.append("compiled")
        return Compiled(kernel, capability)

    kernels = Kernels(CPU, 90, compile, prepare=prepare)
    kernels.prepare()
    kernels.prepare()
    threading.Timer(0.05, begin.set).start()
    kernels.compile_all([kernel(0), kernel(1)], lambda _done, _all: None)
    assert order == ["prepared", "compiled", "compiled"]


def test_nothing_is_prepared_before_a_model_is_loaded() -> None:
    Kernels(CPU, 90, Compiled, prepare=pytest.fail).compiled(kernel())


def test_after_preparing_nothing_is_left_to_import() -> None:
    """In a process of its own: only there is nothing imported yet."""
    pytest.importorskip("triton")
    code = """
import sys
from worker_orcd.kernels.cuda.compiler import prepare_triton
prepare_triton()
from triton.runtime.cache import triton_key
print(triton_key.cache_info().currsize, "triton.compiler" in sys.modules, *[
    name for name in ("attention", "linear", "sampling") if f"worker_orcd.kernels.cuda.{name}" in sys.modules
])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True", "attention", "linear", "sampling"], done.stderr
