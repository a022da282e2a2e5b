"""Makes the pieces of large tensors on several threads and hands them over in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

Make = Callable[[], NDArray[Any]]
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class PieceStream:
    """The results of `jobs` in their order; at most two a thread are made before they are asked for.

    A context manager: leaving it cancels what has not begun and waits for what has. An exception in a job is
    raised where its piece is taken.
    """

    def __init__(
        self, jobs: Iterable[Make], *, threads: int, stage: str, total: int, on_progress: Progress | None
    ) -> None:
        """`on_progress` is called with `stage` and bytes, of `total`, on the thread that takes."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pieces")
        self._made = self._run(jobs, 2 * threads)
        self._done, self._total = 0, total
        self._stage, self._report = stage, on_progress

    def take(self, nbytes: int) -> Iterator[NDArray[Any]]:
        """The next pieces, which have `nbytes` together: those of one tensor."""
        left = nbytes
        while left > 0:
            piece = next(self._made)
            left -= piece.nbytes
            yield piece
            self._done += piece.nbytes
            if self._report is not None:
                self._report(self._stage, self._done, self._total)

    def _run(self, jobs: Iterable[Make], ahead: int) -> Generator[NDArray[Any]]:
        futures: deque[Future[NDArray[Any]]] = deque()
        try:
            for job in jobs:
                futures.append(self._pool.submit(job))
                if len(futures) > ahead:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._made.close()
        self._pool.shutdown()


def pieces_of_rows(num_rows: int, rows_in_piece: int) -> Iterator[slice]:
    """Slices that cover `num_rows`."""
    for start in range(0, num_rows, rows_in_piece):
        yield slice(start, min(start + rows_in_piece, num_rows))
