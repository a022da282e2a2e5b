"""
Pages of a mapped model file that cannot be read: the file is shortened or written anew meanwhile, or its disk
fails. Without this the system ends the process with SIGBUS, and nobody is told why.

The native library does it (`pages.c`), whatever device the model is for. Where there is none, as on a GPU's
machine without a C compiler, the process ends as the system wants.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cpu.build import find_library


class WatchedPages:
    """Watches a file from when it is made to `close` or the end of the context, before the file is closed."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._library = find_library()
        self._numbers: list[int] = []
        if self._library is not None:
            watched = [self._library.watch_pages(*where) for where in file.ranges()]
            self._numbers = [number for number in watched if number is not None]

    def check(self) -> None:
        """Raises InvalidModelFile if something that was read since the beginning is not in the file."""
        library = self._library
        if library is not None and any(library.pages_lost(number) for number in self._numbers):
            raise InvalidModelFile(
                f"{quoted(self._file.path.name)}: a part of it could not be read: the file was changed"
                " while it was loaded, or its disk fails"
            )

    def close(self) -> None:
        """Raises InvalidModelFile as `check` does, and where somebody has written to the file meanwhile."""
        try:
            self.check()
            self._file.check_unchanged()
        finally:
            numbers, self._numbers = self._numbers, []
            for number in numbers:
                if self._library is not None:
                    self._library.forget_pages(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What goes wrong because pages are zeros is told as what it is."""
        try:
            self.close()
        except InvalidModelFile as lost:
            raise lost from None
