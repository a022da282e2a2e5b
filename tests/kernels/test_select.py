from __future__ import annotations

import pytest
import torch

from worker_orcd.config import DeviceConfig
from worker_orcd.errors import InvalidConfiguration
from worker_orcd.kernels.cpu.build import LibraryUnavailable
from worker_orcd.kernels.cpu.cores import usable_cores
from worker_orcd.kernels.select import select_backend


def _unavailable(**_):
    raise LibraryUnavailable("no C compiler found (looked for cc)")


def test_without_a_library_the_reference_runs_and_one_warning_says_so():
    warnings = []
    backend = select_backend(DeviceConfig(device="cpu"), warnings.append, _unavailable)
    assert backend.name == "cpu-reference"
    assert backend.description == "torch reference, float32 activations, float32 KV cache"
    (warning,) = warnings
    assert "no C compiler found" in warning
    assert "float32 activations instead of int8" in warning


def test_the_substitute_has_the_threads_that_were_asked_for():
    before = torch.get_num_threads()
    try:
        select_backend(DeviceConfig(cpu_threads=3), lambda _sentence: None, _unavailable)
        assert torch.get_num_threads() == 3
        with pytest.raises(InvalidConfiguration, match="cpu_threads is 0; allowed are 1 to 256"):
            select_backend(DeviceConfig(cpu_threads=0), lambda _sentence: None, _unavailable)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_with_a_library_the_native_backend_runs_silently(device, library):
    before, warnings = library.num_threads, []
    config = DeviceConfig(device=device, cpu_threads=2, cpu_activations="int8")
    backend = select_backend(config, warnings.append, lambda **_: library)
    assert backend.name == "cpu"
    assert backend.description == f"{library.isa}, 2 threads, int8 activations, float16 KV cache"
    assert not warnings
    library.set_threads(before)


@pytest.mark.parametrize(
    ("activations", "kv", "said"),
    [
        ("float32", "auto", "float32 activations, float32 KV cache"),
        ("float32", "float16", "float32 activations, float16 KV cache"),
        ("int16", "float32", "int16 activations, float32 KV cache"),
    ],
)
def test_the_description_says_what_was_chosen(activations, kv, said, make_native):
    assert make_native(cpu_activations=activations, kv_cache_dtype=kv).description.endswith(said)


def test_who_waits_is_told_whose_kernels_are_compiled(library):
    told: list[tuple[str, int, int]] = []

    def load(*, on_compile):
        on_compile()
        return library

    select_backend(DeviceConfig(device="cpu"), pytest.fail, load, lambda *of: told.append(of))
    assert told == [("CPU", 0, 1)]


def test_the_cpu_has_no_fp8(library):
    for load in (_unavailable, lambda **_: library):
        with pytest.raises(InvalidConfiguration, match=r"kv_cache_dtype is fp8; .* fp8 needs a GPU"):
            select_backend(DeviceConfig(device="cpu", kv_cache_dtype="fp8"), pytest.fail, load)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InvalidConfiguration, match=r"device is cuda; torch finds no CUDA device"):
        select_backend(DeviceConfig(device="cuda"), pytest.fail, _unavailable)


def test_a_number_of_threads_the_pool_cannot_have(library):
    with pytest.raises(InvalidConfiguration, match="cpu_threads is 0; allowed are 1 to 256"):
        select_backend(DeviceConfig(cpu_threads=0), pytest.fail, lambda **_: library)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 8), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 8)]
)
def test_a_quota_limits_the_cores(text, cores, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == cores


def test_no_quota_file_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(tmp_path / "cpu.max") == 8
    (tmp_path / "cpu.max").write_text("nonsense")
    assert usable_cores(tmp_path / "cpu.max") == 8
