"""What a start does beside importing: that it is done, that nothing breaks where it cannot be done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd.worker import ahead


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_starts_nothing():
    code = "import threading, worker_orcd.worker.ahead as a; import sys;"
    assert run(code + "print(threading.active_count(), 'torch' in sys.modules, 'numpy' in sys.modules)") == (
        "1 False False"
    )


# -- torch -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_is_whole_once_all_of_it_is_asked_for():
    code = """
import sys
from worker_orcd.worker.ahead import import_torch
before = list(sys.meta_path)
import_torch()
assert sys.meta_path == before
import torch
with torch.inference_mode():
    x = torch.arange(6.0).view(2, 3)
    print(int((x @ x.T).sum()))
import torch._decomp.decompositions
module = sys.modules["torch._meta_registrations"]
print(type(module).__name__, "register_meta" in vars(module), hasattr(module, "__author__"))
print(torch._meta_registrations.register_meta.__name__, type(module).__name__)
print(torch.empty(3, device="meta").add(1).shape, hasattr(module, "nothing"))
"""
    assert run(code).splitlines() == [
        "83",
        "_Postponed False False",
        "register_meta module",
        "torch.Size([3]) False",
    ]


def test_torch_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    import torch
    import torch._meta_registrations as whole

    monkeypatch.setattr(ahead, "_Postponing", None)
    ahead.import_torch()
    assert torch._meta_registrations is whole


def test_what_importing_torch_needs_is_executed(tmp_path: Path):
    """Another torch may use what this one does not."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys; from torch import _meta_registrations as m\n"
        "assert all(hasattr(one, '__name__') for one in list(sys.modules.values()))\n"
        "assert 'needed' not in vars(m)\n"
        "found = m.needed\n"
    )
    (package / "_meta_registrations.py").write_text("needed = 7\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from worker_orcd.worker.ahead import import_torch
import_torch()
import torch
print(torch.found, torch._meta_registrations.needed, "torch._meta_registrations" in sys.modules)
"""
    assert run(code) == "7 7 True"


@pytest.mark.skipif(sys.platform != "linux", reason="as the loader of Linux has it")
def test_libraries_are_loaded_before_torch_is_imported():
    code = """
import sys
from pathlib import Path
from worker_orcd.worker.ahead import load_libraries
load_libraries()
print("libtorch_cpu.so" in Path("/proc/self/maps").read_text(), "torch" in sys.modules)
"""
    assert run(code) == "True False"


@pytest.mark.skipif(sys.platform != "linux", reason="as the loader of Linux has it")
def test_without_torch_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Or with one whose libraries are elsewhere, or broken."""
    code = """
import importlib.util, sys
from worker_orcd.worker import ahead
ahead.importlib.util.find_spec = lambda name: None
ahead.load_libraries()
class Elsewhere:
    submodule_search_locations = [sys.argv[1]]
ahead.importlib.util.find_spec = lambda name: Elsewhere
ahead.load_libraries()
"""
    library = tmp_path / "lib" / "libc10.so"
    library.parent.mkdir()
    library.write_text("broken")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- the device --------------------------------------------------------------------------------------------

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
static int told(const char *what, int number) {
    FILE *log = fopen(getenv("LOG"), "a");
    fprintf(log, "%s %d %s\\n", what, number, getenv("CUDA_MODULE_LOADING"));
    fclose(log);
    return 0;
}
int cuInit(unsigned flags) { return told("init", (int)flags); }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return index > 1 ? 101 : told("get", index); }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = 0; return told("retain", device); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("index", "asked"), [(1, ["init 0 LAZY", "get 1 LAZY", "retain 11 LAZY"]), (2, ["init 0 LAZY"])]
)
def test_the_context_is_that_of_the_gpu_that_was_asked_for(
    index: int, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, library, log = tmp_path / "driver.c", tmp_path / "driver.so", tmp_path / "log"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    ahead.make_context(index, str(library))
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    assert log.read_text().splitlines() == asked


def test_without_a_driver_there_is_no_context():
    ahead.make_context(0, "libno-such-driver.so.1")


# -- the file ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to ask")
@pytest.mark.parametrize(("pages", "asked"), [(2, 1), (1, 0)])
def test_a_file_that_leaves_room_is_asked_for(
    pages: int, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.__getitem__)
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, *what: calls.append(what))
    ahead.read_ahead(path)
    assert calls == [(0, 4096, os.POSIX_FADV_WILLNEED)] * asked
    ahead.read_ahead(tmp_path / "absent.gguf")
    assert len(calls) == asked


# -- all of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "done"), [("cpu", "file libraries"), ("auto", "context 3 file libraries")]
)
def test_only_what_the_device_needs_is_begun(device: str, done: str):
    code = f"""
import gc
from pathlib import Path
from worker_orcd.config import DeviceConfig
from worker_orcd.worker import ahead
did = []
ahead.load_libraries = lambda: did.append("libraries")
ahead.make_context = lambda index: did.append(f"context {{index}}")
ahead.read_ahead = lambda path: did.append(path.name)
ahead.begin(DeviceConfig(device={device!r}, gpu_index=3), Path("file"))
enabled = gc.isenabled()
ahead.imported()
import atexit
atexit._run_exitfuncs()
print(*sorted(did), enabled, gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    assert run(code) == f"{done} False True True"
