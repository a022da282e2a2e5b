"""Files that a command writes: refused at once if they cannot be written, described when they are."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from worker_orcd.errors import InvalidConfiguration

SPARE_BYTES = 64 << 20  # a disk should not be filled to the last block


def check_output(path: Path, num_bytes: int, *, force: bool) -> None:
    """Raises InvalidConfiguration unless a file of `num_bytes` can be written to `path`.

    An existing file is replaced only with `force`, and then when the new one is whole: both need room.
    """
    name, directory = repr(path.name), path.parent
    if path.is_dir():
        raise InvalidConfiguration(f"OUT: {name} is a directory; name a file")
    if path.exists() and not force:
        raise InvalidConfiguration(f"OUT: {name} exists; name another file, or give --force to replace it")
    if not directory.is_dir():
        raise InvalidConfiguration(f"OUT: there is no directory {directory.name!r} to write {name} to")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InvalidConfiguration(f"OUT: no permission to write to the directory of {name}")
    free = shutil.disk_usage(directory).free
    if free < num_bytes + SPARE_BYTES:
        raise InvalidConfiguration(
            f"OUT: {name} will have {num_bytes / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB left"
        )


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """What the system says against writing, as an InvalidConfiguration."""
    try:
        yield
    except OSError as error:
        raise InvalidConfiguration(f"OUT: {path.name!r} cannot be written: {error.strerror}") from None


def write_text(option: str, path: Path, text: str) -> None:
    """A small file that `option` names. Raises InvalidConfiguration."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidConfiguration(f"{option} {path}: {error.strerror}") from None


def described(num_bytes: int, seconds: float, counts: dict[str, int]) -> str:
    """As `12.11 GB in 30.1 s (402 MB/s): MXFP4 72, Q8_0 98, F32 289`."""
    types = ", ".join(f"{name} {count}" for name, count in counts.items())
    rate = num_bytes / 1e6 / max(seconds, 1e-3)
    size = f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    return f"{size} in {seconds:.1f} s ({rate:.0f} MB/s): {types}"


def mixture_option(name: str) -> str:
    """The mixture that `--mix` names. Raises InvalidConfiguration."""
    from worker_orcd.gguf.mixture import MIXTURES, mixture_named

    mixture = mixture_named(name)
    if mixture is None:
        raise InvalidConfiguration(f"--mix: found {name!r}; expected one of {', '.join(MIXTURES)}")
    return mixture
