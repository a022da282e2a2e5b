"""Pages that cannot be read: a mapped file is shortened."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.kernels import pages
from worker_orcd.kernels.cpu.build import find_library
from worker_orcd.kernels.cpu.library import Library
from worker_orcd.kernels.pages import WatchedPages

PAGE = mmap.PAGESIZE


def mapped(path: Path, num_pages: int) -> NDArray[np.uint8]:
    path.write_bytes(b"x" * num_pages * PAGE)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def test_what_is_lost_becomes_zeros_and_is_told(library: Library, tmp_path: Path):
    data, other = mapped(tmp_path / "a", 8), mapped(tmp_path / "b", 8)
    numbers = [library.watch_pages(each.ctypes.data, each.nbytes) for each in (data, other)]
    assert None not in numbers
    number, untouched = (int(number or 0) for number in numbers)
    os.truncate(tmp_path / "a", 3 * PAGE)
    assert data[: 3 * PAGE].all() and not library.pages_lost(number)
    assert not data[5 * PAGE :].any() and library.pages_lost(number)
    assert not data[3 * PAGE : 5 * PAGE].any()
    assert data[: 3 * PAGE].all() and other.all() and not library.pages_lost(untouched)
    library.forget_pages(number)
    library.forget_pages(untouched)
    again = library.watch_pages(data.ctypes.data, PAGE)
    assert again == number and not library.pages_lost(again)  # its place is free, and says nothing of before
    library.forget_pages(again)


def test_there_are_only_so_many_ranges(library: Library):
    numbers = [library.watch_pages(PAGE * number, PAGE) for number in range(1, 1100)]
    kept = [number for number in numbers if number is not None]
    assert len(kept) == 1024 and numbers[-1] is None
    for number in kept:
        library.forget_pages(number)
    assert library.watch_pages(0, PAGE) is None and library.watch_pages(PAGE, 0) is None


DIES = """
import faulthandler, mmap, os, signal, sys
import numpy as np
from worker_orcd.kernels.cpu.build import load_library
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
library = load_library()
def mapped(name):
    with open(name, "w+b") as file:
        file.write(bytes(8 * mmap.PAGESIZE))
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
watched, other = mapped(sys.argv[1] + "/watched"), mapped(sys.argv[1] + "/other")
number = library.watch_pages(watched.ctypes.data, watched.nbytes)
if sys.argv[3] == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
if sys.argv[3] == "forgotten":
    library.forget_pages(number)
    other = watched
for name in ("watched", "other"):
    os.truncate(sys.argv[1] + "/" + name, 0)
print(other.sum())
"""


@pytest.mark.slow
@pytest.mark.parametrize("others", ["nobody", "faulthandler"])
@pytest.mark.parametrize("how", ["elsewhere", "forgotten", "sent"])
def test_what_nobody_watches_ends_the_process_as_before(
    library: Library, tmp_path: Path, others: str, how: str
):
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path), others, how], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGBUS and done.stdout == ""
    assert ("Bus error" in done.stderr) == (others == "faulthandler")


def model(path: Path) -> Path:
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "llama")
        writer.add_tensor("a", (64, 1024), 0, np.ones((64, 4096), np.uint8).tobytes())
    return path


def test_a_watched_file_says_what_it_has_lost(library: Library, tmp_path: Path):
    path = model(tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        with WatchedPages(file) as watched:
            assert file.data("a").all()
            watched.check()
        with pytest.raises(InvalidModelFile, match=r"'m.gguf': a part of it could not be read"):  # noqa: SIM117
            with WatchedPages(file):
                os.truncate(path, PAGE)
                zeros = file.data("a")
                raise ValueError(
                    f"{zeros.sum()} is no sum of weights"
                )  # what comes of zeros is not what is told
    with GGUFFile(model(path)) as file, WatchedPages(file) as watched:  # nothing of the range is left
        watched.check()


def test_without_a_library_a_change_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "find_library", lambda: None)
    path = model(tmp_path / "m.gguf")
    with pytest.raises(InvalidModelFile, match="changed while it was loaded"), GGUFFile(path) as file:  # noqa: SIM117
        with WatchedPages(file) as watched:
            os.truncate(path, PAGE)
            watched.check()


def test_a_library_that_was_not_compiled_is_not_compiled_for_this(library: Library, tmp_path: Path):
    assert find_library(cache=tmp_path) is None
    assert find_library(compilers=()) is None and not list(tmp_path.iterdir())
    found = find_library()
    assert found is not None and found.abi_version == library.abi_version
