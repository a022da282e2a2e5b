"""Launches that are made again are those that were written down, and reach Triton as its own do."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels, compile_kernel
from worker_orcd.kernels.cuda.recorded import Launched, Recorded, starter

CPU = torch.device("cpu")


def kernel(number: int = 0) -> Kernel:
    return Kernel(
        module="linear", function="linear", arguments=(("x", "*fp32"), ("n", "i32")),
        constants=(("NUMBER", number), ("OTHER", True)),
    )  # fmt: skip


class Compiled:
    """Takes the place of a compiled kernel: launches go to one list."""

    calls: list[tuple[Any, ...]]
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel, _capability: int) -> None:
        self._number = dict(kernel.constants)["NUMBER"]

    def run(self, *arguments: Any) -> None:
        self.calls.append((self._number, arguments))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(Compiled, "calls", [], raising=False)
    return Kernels(CPU, 90, Compiled)


class Work:
    """Two launches, the second only if it is called once more than it should be."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, self.x, self.count = kernels, torch.zeros(4), 0

    def __call__(self) -> None:
        self.count += 1
        self._kernels.launch(kernel(self.count), (1, 2, 3), self.x, 7)
        self._kernels.launch(kernel(10), (4, 5, 6), self.x[1:], 8)


def test_launches_are_found_out_once_and_made_as_often_as_wanted(kernels: Kernels) -> None:
    work = Work(kernels)
    recorded, address = Recorded(kernels, work), work.x.data_ptr()
    assert [one.kernel for one in recorded.launches] == [kernel(1), kernel(10)] and not Compiled.calls
    for _ in range(3):
        recorded()
    given = 0, "function", "metadata", None, None, None
    assert (
        Compiled.calls
        == [
            (1, (1, 2, 3, *given, address, 7, None, None)),
            (10, (4, 5, 6, *given, address + 4, 8, None, None)),
        ]
        * 3
    )
    assert work.count == 1


def test_what_found_them_out_is_let_go(kernels: Kernels) -> None:
    work = Work(kernels)
    seen = weakref.ref(work)
    recorded = Recorded(kernels, work)
    del work
    assert seen() is not None
    recorded()
    assert seen() is None and len(Compiled.calls) == 2


def test_recorded_launches_are_collected_again_and_again(kernels: Kernels) -> None:
    """To know what there is to compile; and launching afterwards launches."""
    recorded, alone = Recorded(kernels, Work(kernels)), kernel(20)

    def work() -> None:
        kernels.launch(alone, (1, 1, 1), 0, 0)
        recorded()
        recorded()

    for _ in range(2):
        assert kernels.collect(work) == [alone, kernel(1), kernel(10)]
        assert [one.grid for one in kernels.written_down(work)][:3] == [(1, 1, 1), (1, 2, 3), (4, 5, 6)]
    assert not Compiled.calls
    work()
    assert [number for number, _ in Compiled.calls] == [20, 1, 10, 1, 10]


def test_work_that_fails_is_asked_again(kernels: Kernels) -> None:
    failing = [True]

    def work() -> None:
        kernels.launch(kernel(1), (1, 1, 1), 0, 0)
        if failing.pop():
            failing.append(False)
            raise ValueError("not yet")

    recorded = Recorded(kernels, work)
    with pytest.raises(ValueError, match="not yet"):
        recorded()
    assert not Compiled.calls
    recorded()
    assert len(Compiled.calls) == 1


def test_a_launch_reaches_the_driver_as_tritons_own_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """All but the hooks and what they are told. Compiled for a GPU, and launched without one."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = "drawn token_ids positions context_lens slots block_tables"
    arguments = [(name, "*i32") for name in names.split()]
    arguments.insert(1, ("ints", "*i64"))
    arguments += [(name, "i32") for name in ("rows", "slots_stride", "tables_stride", "tables_row_stride")]
    constants = {"POSITION": 1, "LAST": 7, "ROWS": 4, "GROUPS": 1, "BLOCK_SIZE": 16, "BLOCK": 32}
    one = Kernel(
        module="advance",
        function="advance",
        arguments=tuple(arguments),
        constants=tuple(constants.items()),
    )
    compiled = compile_kernel(one, 90)
    found: list[tuple[Any, ...]] = []

    def launcher(*arguments: Any) -> None:
        found.append(arguments)

    compiled.module, compiled.function, compiled._run = "module", 4711, launcher  # loaded on no GPU
    grid: Grid = (3, 2, 1)
    values = list(range(100, 111))
    starter(compiled, Launched(one, grid, values))(17)
    compiled[grid](*values, *[None] * len(one.constants), stream=17)
    ours, own = found
    assert ours[:4] == own[:4] == (3, 2, 1, 17)
    assert (ours[4:6], ours[9:]) == (own[4:6], own[9:])
    assert ours[6:9] == (None, None, None) and len(ours) == len(own) == 9 + len(values) + len(one.constants)
