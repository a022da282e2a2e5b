"""What the commands say to a person: errors in one line, progress as a bar where there is a terminal."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Literal, TypeVar

import typer

from worker_orcd.errors import InvalidConfiguration, WorkerError

Command = TypeVar("Command", bound=Callable[..., None])
WORTH_TELLING_SECONDS = 1.0  # what takes less needs no line in a log

Progress = Callable[[str, int, int], None]  # what is being done, done, in all


def reports_errors(command: Command) -> Command:
    """A decorator: an expected failure is one line on stderr and an exit status, never a traceback."""

    @functools.wraps(command)
    def wrapper(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except WorkerError as error:
            print(f"error {error.code}: {error.message}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, InvalidConfiguration) else 1) from None
        except BrokenPipeError:  # `worker-orcd inspect … | head`
            sys.stdout = None  # nothing is left to flush to
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return wrapper  # pyright: ignore[reportReturnType]


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def warn_all(messages: Iterable[str]) -> None:
    for message in messages:
        warn(message)


@contextlib.contextmanager
def progress_bar(unit: Literal["bytes", "tokens"] = "bytes") -> Generator[Progress]:
    """A bar on stderr if that is a terminal, else a line for each quarter of what takes long."""
    if sys.stderr.isatty():
        with _drawn(unit) as report:
            yield report
    else:
        yield _told_in_quarters()


@contextlib.contextmanager
def _drawn(unit: str) -> Generator[Progress]:
    from rich import progress
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    columns = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    if unit != "bytes":
        columns = (progress.MofNCompleteColumn(), progress.TextColumn(unit), progress.TimeRemainingColumn())
    shown = (progress.TextColumn("{task.description}"), progress.BarColumn(), *columns)
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[stage] = bar.add_task(stage, total=total or None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


def _told_in_quarters() -> Progress:
    begun: dict[str, float] = {}
    told: dict[str, int] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        quarter = 4 * done // total if total else 0
        if now - begun.setdefault(stage, now) >= WORTH_TELLING_SECONDS and quarter > told.get(stage, -1):
            told[stage] = quarter
            print(f"{stage}: {25 * quarter} %", file=sys.stderr, flush=True)

    return report
