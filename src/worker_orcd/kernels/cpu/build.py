"""
Finding or compiling the native library.

Looked for in this order: a library shipped beside the sources (a wheel), one compiled earlier and kept in
the user's cache, and else a fresh compilation, which takes some seconds once. A library is accepted only if
it was made from these very sources: shipped ones carry the sources' hash in their name, cached ones lie in a
folder named by the hash of sources, flags and compiler, under the hash of their own bytes, so that a damaged
file is seen before it is loaded. Files appear by renaming: any number of processes may do all this at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from worker_orcd.kernels.cpu.library import ABI_VERSION, Library

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno")
TIMEOUT_SECONDS = 600
ERROR_LINES = 8  # of the compiler, repeated in a message


class LibraryUnavailable(Exception):
    """There is no native library on this machine; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class _Compiler:
    command: str
    version: str


def cache_directory() -> Path:
    """Where compiled libraries are kept: $XDG_CACHE_HOME or ~/.cache, then worker-orcd/native."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "worker-orcd" / "native"


def load_library(
    sources: Path = SOURCES,
    cache: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    on_compile: Callable[[], None] | None = None,
) -> Library:
    """The native library of this machine. Raises LibraryUnavailable.

    `compilers` are tried in order; the first one present is used. `cache` defaults to `cache_directory()`.
    `on_compile` is called before a compilation, which takes from seconds to a minute.
    """
    made = _made(sources, cache, compilers)
    if isinstance(made, Library):
        return made
    folder, compiler = made
    if on_compile is not None:
        on_compile()
    return _compile_into(folder, compiler, sources)


def find_library(
    sources: Path = SOURCES, cache: Path | None = None, compilers: Sequence[str] = COMPILERS
) -> Library | None:
    """The native library, if it has been compiled already."""
    try:
        made = _made(sources, cache, compilers)
    except LibraryUnavailable:
        return None
    return made if isinstance(made, Library) else None


def _made(sources: Path, cache: Path | None, compilers: Sequence[str]) -> Library | tuple[Path, _Compiler]:
    """The library that is there, or else where it would be kept and what would compile it."""
    source_hash = _source_hash(sources)
    shipped = sources / shipped_name(source_hash)
    if shipped.exists():
        return _open(shipped)
    compiler = _find_compiler(compilers)
    flags = " ".join(FLAGS)
    key = _digest([source_hash.encode(), flags.encode(), compiler.version.encode()])
    folder = (cache_directory() if cache is None else cache) / key
    for kept in sorted(folder.glob("*.so")):
        try:
            if _digest([kept.read_bytes()]) == kept.stem:
                return _open(kept)
            kept.unlink()  # damaged
        except (OSError, LibraryUnavailable):
            continue  # somebody else removed it, or it cannot be loaded: compile it again
    return folder, compiler


def ship_library(folder: Path, sources: Path = SOURCES) -> Path:
    """Compile the library that a wheel carries, into `folder`. Raises LibraryUnavailable."""
    compiler = _find_compiler(COMPILERS)
    with tempfile.TemporaryDirectory(prefix="worker-orcd-") as temporary:
        built = compile_library(Path(temporary), compiler.command, sources)
        return Path(shutil.copyfile(built, folder / shipped_name(_source_hash(sources))))


def shipped_name(source_hash: str) -> str:
    """The file name of a library in a wheel for this kind of machine."""
    return f"liborcd-{platform.system().lower()}-{platform.machine()}-{source_hash}.so"


def _source_hash(sources: Path) -> str:
    files = sorted([*sources.glob("*.c"), *sources.glob("*.h")])
    return _digest(part for file in files for part in (file.name.encode(), file.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _find_compiler(commands: Sequence[str]) -> _Compiler:
    for command in commands:
        if shutil.which(command) is None:
            continue
        done = _run([command, "--version"], Path.cwd())
        if done.returncode == 0:
            return _Compiler(command, f"{platform.machine()} {done.stdout}")
    raise LibraryUnavailable(f"no C compiler found (looked for {', '.join(commands)})")


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryUnavailable(f"{command[0]} did not run: {type(error).__name__}") from error


def _compile_into(folder: Path, compiler: _Compiler, sources: Path) -> Library:
    with tempfile.TemporaryDirectory(prefix="worker-orcd-") as temporary:
        built = compile_library(Path(temporary), compiler.command, sources)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / f"{_digest([built.read_bytes()])}.so"
            handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
            os.close(handle)
            shutil.copyfile(built, name)
            Path(name).replace(kept)
        except OSError:
            return _open(built)  # nowhere to keep it: loaded, its file may go
        return _open(kept)


def compile_library(folder: Path, compiler: str, sources: Path = SOURCES) -> Path:
    """Compile the sources to `liborcd.so` in `folder`, files side by side. Raises LibraryUnavailable."""
    files = sorted(sources.glob("*.c"))
    objects = [folder / f"{file.stem}.o" for file in files]

    def compile_one(file: Path, target: Path) -> None:
        _check(_run([compiler, *FLAGS, "-c", file.name, "-o", str(target)], sources), compiler)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for _ in pool.map(compile_one, files, objects):
            pass  # the first failure is raised here
    built = folder / "liborcd.so"
    names = [target.name for target in objects]
    _check(_run([compiler, "-shared", "-pthread", *names, "-o", built.name, "-lm"], folder), compiler)
    return built


def _check(done: subprocess.CompletedProcess[str], compiler: str) -> None:
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-ERROR_LINES:])
        raise LibraryUnavailable(f"{compiler} could not compile the native kernels:\n{last}")


def _open(path: Path) -> Library:
    try:
        library = Library(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise LibraryUnavailable(f"the native library cannot be loaded: {type(error).__name__}") from error
    if library.abi_version != ABI_VERSION:
        raise LibraryUnavailable(
            f"the native library has ABI version {library.abi_version}; this version needs {ABI_VERSION}"
        )
    return library
