"""The experiments with many tokens: what can be said of them without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import under_interpreter

import gpu_wide
import wide_ways
from worker_orcd.kernels.cuda.compiler import Kernel, Kernels
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import shape_of

CASES = (
    "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0", "Q4_K by half", "Q5_K by half", "2 pieces, 1 chunks",
    "2 pieces, 2 chunks", "4 pieces, 1 chunks", "4 pieces, 2 chunks",
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return under_interpreter.run("interpreted_wide.py")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_interpreter_finds_the_same_numbers(found: dict[str, dict[str, float]], case: str) -> None:
    assert found[case]["differing"] == 0
    assert 0 < found[case]["error"] < 2e-3
    assert set(found) == set(CASES)


@pytest.mark.slow
def test_a_kernel_of_each_kind_compiles_without_a_fault() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    kinds = {
        kernel.function: kernel for kernel in gpu_wide.kernels_of(["plain", "product", "apart", "fused"])
    }
    assert {"linear", "unpack", "pieces", "product", "apart", "fused"} == set(kinds)
    for kernel in kinds.values():
        assert gpu_wide.inspect(kernel) == ""


def test_what_cannot_be_compiled_is_said() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    (kernel, *_) = (one for one in gpu_wide.kernels_of(["product"]) if one.function == "product")
    broken = gpu_wide.with_constants(kernel, STAGES=1000)
    assert "product" in gpu_wide.inspect(broken)


def test_every_way_of_a_run_is_among_the_kernels_that_are_compiled() -> None:
    names = {kernel.function for kernel in gpu_wide.kernels_of(["plain"])}
    assert names == {"linear", "unpack", "pieces"}
    assert {kernel.function for kernel in gpu_wide.kernels_of(["fused"])} == {"linear", "fused"}


def test_chunks_end_where_the_steps_of_the_others_do() -> None:
    """So no way has to begin a sum within a step."""
    for name, n, k, _, _ in gpu_wide.SHAPES:
        shape = shape_of(name, n, k)
        assert k % (256 * shape.chunks) == 0 or shape.format != "Q4_K"
        assert k % (gpu_wide.STEP * shape.chunks) == 0


class Notes:
    """In a session's place."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[str] = []
        self.kept: dict[str, Any] = {}

    def say(self, line: str, *, ok: bool = True) -> None:
        (self.lines if ok else self.failed).append(line)

    def keep(self, name: str, value: Any) -> None:
        self.kept[name] = list(value)

    def guarded(self, name: str, work: Callable[[], None]) -> None:
        work()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """There is no GPU: every kernel writes ones, but those that take pieces of steps write twos."""

    def launch(kernels: Kernels, kernel: Kernel, grid: Any, *values: Any) -> None:
        assert len(values) == len(kernel.arguments)
        names = [name for name, _ in kernel.arguments]
        if "y" in names:
            values[names.index("y")].fill_(2 if kernel.function == "pieces" else 1)

    monkeypatch.setattr(Kernels, "launch", launch)
    monkeypatch.setattr(wide_ways, "descriptor", lambda matrix, *_: matrix)
    monkeypatch.setattr(gpu_wide, "graph_microseconds", lambda runs, _: [run() for run in runs] and 10.0)
    monkeypatch.setattr(gpu_wide, "matmul_teraflops", lambda *_: 100.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_wide, "SHAPES", (("Q4_K", 512, 512, 1, torch.float16),))
    monkeypatch.setattr(gpu_wide, "CHECKED_ROWS", 192)
    monkeypatch.setattr(gpu_wide, "TOKENS", (300,))
    monkeypatch.setattr(gpu_wide, "CHECKED_TOKENS", (290,))
    return Notes()


def test_a_group_says_whose_bits_differ_and_times_all(notes: Notes) -> None:
    group = gpu_wide.Group(notes, "plain", torch.device("cpu"))
    group.check()
    differing = {one["way"]: one["differing"] for one in notes.kept["bits"]}
    assert {way[0] for way, words in differing.items() if words} == {"d"}
    assert {way[0] for way, words in differing.items() if not words} == {"b"}
    assert any("DIFFERS" in line for line in notes.failed)
    group.measure(lambda: 10.0)
    assert {one["way"] for one in notes.kept["times"]} == {"now", *differing}
    assert all(one["torch"] == 100.0 for one in notes.kept["times"])


@pytest.mark.parametrize("kind", ["product", "apart", "fused"])
def test_the_other_groups_go_through(notes: Notes, kind: str) -> None:
    group = gpu_wide.Group(notes, kind, torch.device("cpu"))
    group.check()
    assert notes.failed == []
    group.measure(lambda: 10.0)
    assert len(notes.kept["times"]) == 1 + len(notes.kept["bits"]) > 2


def test_a_group_without_time_left_stops(notes: Notes) -> None:
    gpu_wide.Group(notes, "fused", torch.device("cpu")).measure(lambda: 1.0)
    assert notes.lines == ["out of time"]
    assert notes.kept == {}


@pytest.mark.parametrize(("slab", "rows"), [(0, [192]), (2 * 512 * 256, [192]), (2 * 512 * 300, [192])])
def test_slabs_of_few_rows_are_one(slab: int, rows: list[int]) -> None:
    weight = gpu_wide.empty_matrix(shape_of("Q4_K", 192, 512), 192, torch.device("cpu"))
    wide = gpu_wide.Wide(
        Kernels(torch.device("cpu"), 90), Products(Kernels(torch.device("cpu"), 90)), 1 << 20
    )
    assert [some.n for _, some in wide.slabs(weight, slab)] == rows


def test_slabs_are_all_rows_in_order_and_alike() -> None:
    weight = gpu_wide.empty_matrix(shape_of("Q6_K", 1216, 512), 1216, torch.device("cpu"))
    wide = gpu_wide.Wide(
        Kernels(torch.device("cpu"), 90), Products(Kernels(torch.device("cpu"), 90)), 1 << 20
    )
    slabs = list(wide.slabs(weight, 2 * 512 * 600))
    assert [(start, some.n) for start, some in slabs] == [(0, 512), (512, 512), (1024, 192)]
    for part in ("words", "high", "headers"):
        assert torch.equal(
            torch.cat([getattr(some, part) for _, some in slabs]).view(torch.int16),
            getattr(weight, part).view(torch.int16),
        )


def results(**times: float) -> dict[str, Any]:
    lines = [
        {"format": name, "n": n, "k": k, "tokens": 2048, "way": way, "microseconds": micro, "torch": 800.0,
         "tflop_per_s": 400.0}
        for name, n, k, count, _ in gpu_wide.SHAPES
        if count
        for way, micro in times.items()
    ]  # fmt: skip
    return {"plain": {"times": lines, "bits": []}}


def test_the_table_has_the_fastest_first_and_a_whole_step() -> None:
    found = results(now=100.0, **{"b slabs": 50.0, "c apart": 80.0})
    lines = gpu_wide.table(found)
    assert lines[0].startswith("Q4_K 16384x3072, 2048 tokens")
    assert [line.split()[0] for line in lines[1:4]] == ["b", "c", "now"]
    assert "50%" in lines[1]
    assert lines[-1].startswith("Phi-3-mini's products, 2048 tokens: now 12.8 ms, b 6.4 ms, c apart 10.2 ms")


def test_the_table_says_where_bits_differ() -> None:
    found = results(now=100.0, e=50.0)
    found["fused"] = {"bits": [{"shape": "Q4_K 16384x3072", "way": "e", "differing": 3}]}
    lines = gpu_wide.table(found)
    assert [line.endswith("BITS DIFFER") for line in lines[1:3]] == [True, False]


def test_a_group_that_hangs_is_ended_and_what_it_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(args: Any, group: str, seconds: float) -> list[str]:
        file = gpu_wide.result_file(args.out, group)
        script = f"echo '{json.dumps({'bits': []})}' > {file}; " + (
            "sleep 60" if group == "apart" else "exit 0"
        )
        return ["sh", "-c", f"exec 0<&-; {script}"]

    monkeypatch.setattr(gpu_wide, "child_command", command)
    monkeypatch.setattr(gpu_wide, "SECONDS", dict.fromkeys(gpu_wide.GROUPS, 1.0))
    monkeypatch.setattr(gpu_wide, "SHORTEST", 0.5)
    args = gpu_wide.arguments(["--out", str(tmp_path / "wide.json"), "--groups", "plain", "apart", "fused"])
    found = gpu_wide.run_groups(args)
    assert found["failed"] == 1
    assert found["apart"] == {"exit": -1, "bits": []}
    assert found["fused"]["exit"] == 0
    assert json.loads(args.out.read_text()) == found
