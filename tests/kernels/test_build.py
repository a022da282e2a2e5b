"""Finding, compiling and keeping the native library, on a small one with the same interface."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from worker_orcd.kernels.cpu import build
from worker_orcd.kernels.cpu.build import COMPILERS, LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.library import ABI_VERSION

STUB = """
#include "orcd.h"
int orcd_abi_version(void) { return ORCD_ABI_VERSION; }
const char *orcd_isa(void) { return "stub"; }
int orcd_force_isa(const char *name) { return name == 0; }
int orcd_set_threads(int num_threads, int pin) { return num_threads + pin > 0 ? 0 : -1; }
int orcd_num_threads(void) { return 1; }
int orcd_run(const orcd_op *o, int32_t n, const orcd_batch *b) { return o && b ? n : 0; }
#define PLAN(name) int name(const orcd_op *o, const orcd_batch *b, orcd_task *t) { return o && b && t; }
PLAN(orcd_plan_linear) PLAN(orcd_plan_embed) PLAN(orcd_plan_elementwise)
PLAN(orcd_plan_store_kv) PLAN(orcd_plan_attention) PLAN(orcd_plan_route) PLAN(orcd_plan_expert_linear)
int64_t orcd_packed_bytes(int32_t f, int64_t n, int64_t k) { return f * n * k; }
int orcd_pack(int32_t f, int64_t n, int64_t k, int64_t a, int64_t b, const uint8_t *s, void *d) {
  return f + n + k + a + b + (s != d) > 0;
}
int orcd_watch_pages(const void *start, int64_t bytes) { return start && bytes; }
int orcd_pages_lost(int range) { return range; }
void orcd_forget_pages(int range) { (void)range; }
int64_t orcd_cache_block_bytes(int32_t a, int32_t b, int32_t c, int32_t d) { return a * b * c * d; }
"""


@pytest.fixture
def compiler():
    found = next((command for command in COMPILERS if shutil.which(command)), None)
    if found is None:
        pytest.skip("no C compiler")
    return found


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "native"
    folder.mkdir()
    shutil.copy(build.SOURCES / "orcd.h", folder)
    (folder / "stub.c").write_text(STUB)
    return folder


@pytest.fixture
def compilations(monkeypatch):
    """Counts calls of compile_library."""
    calls = []
    real = build.compile_library

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(build, "compile_library", counting)
    return calls


def test_compiled_once_then_found(compiler, sources, tmp_path, compilations):
    cache = tmp_path / "cache"
    told: list[int] = []
    for _ in range(2):
        library = load_library(sources, cache, on_compile=lambda: told.append(len(compilations)))
        assert library.isa == "stub"
    assert len(compilations) == 1
    assert told == [0], "told once, before it compiled"
    (kept,) = cache.glob("*/*")
    assert kept.suffix == ".so"


def test_changed_sources_are_compiled_again(compiler, sources, tmp_path, compilations):
    load_library(sources, tmp_path / "cache")
    (sources / "stub.c").write_text(STUB.replace('"stub"', '"changed"'))
    assert load_library(sources, tmp_path / "cache").isa == "changed"
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and nothing else", None])
def test_a_damaged_library_is_compiled_again(damage, compiler, sources, tmp_path, compilations):
    cache = tmp_path / "cache"
    load_library(sources, cache)
    (kept,) = cache.glob("*/*.so")
    content = kept.read_bytes()
    kept.unlink()  # the loaded one stays mapped
    kept.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert load_library(sources, cache).isa == "stub"
    assert len(compilations) == 2
    (kept,) = cache.glob("*/*.so")
    assert len(kept.read_bytes()) > 1000


def test_a_shipped_library_needs_no_compiler(compiler, sources, tmp_path):
    build.ship_library(sources, sources)
    assert load_library(sources, tmp_path / "cache", compilers=()).isa == "stub"
    (sources / "stub.c").write_text(STUB.replace("stub", "newer"))
    with pytest.raises(LibraryUnavailable, match="no C compiler found"):
        load_library(sources, tmp_path / "cache", compilers=())


def test_without_a_compiler_the_message_says_what_was_looked_for(sources, tmp_path):
    with pytest.raises(LibraryUnavailable, match=r"no C compiler found \(looked for no-cc, no-gcc\)"):
        load_library(sources, tmp_path / "cache", compilers=("no-cc", "no-gcc"))


def test_the_compiler_s_last_words_are_repeated_without_paths(compiler, sources, tmp_path):
    (sources / "broken.c").write_text("int f(void) { return undeclared_name; }\n")
    with pytest.raises(LibraryUnavailable) as caught:
        load_library(sources, tmp_path / "cache")
    assert "undeclared_name" in str(caught.value)
    assert "broken.c" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/*.so"))


def test_another_abi_version_is_refused(compiler, sources, tmp_path):
    (sources / "stub.c").write_text(STUB.replace("return ORCD_ABI_VERSION", "return 77"))
    with pytest.raises(LibraryUnavailable, match=f"ABI version 77; this version needs {ABI_VERSION}"):
        load_library(sources, tmp_path / "cache")


def test_a_library_without_a_function_is_refused(compiler, sources, tmp_path):
    (sources / "stub.c").write_text(STUB.replace("orcd_isa", "orcd_other"))
    with pytest.raises(LibraryUnavailable, match="cannot be loaded: AttributeError"):
        load_library(sources, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_done_without(compiler, sources, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert load_library(sources, tmp_path / "file" / "cache").isa == "stub"


def test_many_processes_at_once(compiler, sources, tmp_path):
    code = (
        "import sys; from pathlib import Path; from worker_orcd.kernels.cpu.build import load_library; "
        "print(load_library(Path(sys.argv[1]), Path(sys.argv[2])).isa)"
    )
    command = [sys.executable, "-c", code, str(sources), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["stub\n"] * 3
    assert not list((tmp_path / "cache").glob("*/*.part"))


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_directory() == tmp_path / "worker-orcd" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_directory() == tmp_path / "home" / ".cache" / "worker-orcd" / "native"
