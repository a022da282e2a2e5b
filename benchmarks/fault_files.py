"""Faults of files: the model's while it is loaded, the disk that it is on, those that a worker writes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

from fault_worker import FROM_START, Bench, FaultWorker, Innocents, Row
from worker_client import Client, require

LOAD_FAILED = "MODEL_LOAD_FAILED"
NOT_TRIED = "not tried: mounting takes root"
WRITTEN = "the file was changed while it was loaded"


async def file(bench: Bench) -> list[Row]:
    """What may happen to a model's file, before and while it is loaded."""
    if bench.quick:
        return [await spoilt(bench, *SPOILT[0])]
    rows = [await unusable(bench, *fault) for fault in UNUSABLE]
    rows += [await spoilt(bench, *fault) for fault in SPOILT]
    rows += [await replaced(bench, *fault) for fault in REPLACED]
    return rows


def _directory(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _head(model: Path) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(model.read_bytes()[:4000]) and None


UNUSABLE = (
    ("the model's path is a directory", _directory, "is a directory"),
    ("the model's path is a pipe that nobody writes to", _pipe, "no such file"),
    ("the model's file ends in its header", None, "are left"),
)
SPOILT = (
    ("cut to nothing", lambda path: os.truncate(path, 0), WRITTEN),
    ("cut in half", lambda path: os.truncate(path, path.stat().st_size // 2), WRITTEN),
    ("written anew in place", lambda path: path.write_bytes(bytes(path.stat().st_size)), WRITTEN),
)
REPLACED = (
    ("another file takes its name", lambda path: _other(path).replace(path)),
    ("it is removed", lambda path: path.unlink()),
)


def _other(path: Path) -> Path:
    other = path.with_name("other")
    other.write_bytes(b"another model")
    return other


async def unusable(bench: Bench, fault: str, make: Callable[[Path], None] | None, words: str) -> Row:
    path = bench.fresh("model") / "model.gguf"
    (make or _head(bench.model()))(path)
    with FaultWorker(bench, model=path) as worker:
        code, seconds = await worker.ended(worker.begun)
        require(code == 1, f"{fault}: exit code {code}")
        worker.require_one_sentence(LOAD_FAILED, words)
    return Row(
        fault, f"`{LOAD_FAILED}`: {words}", seconds, "exit 1, from the start of the process", "the start"
    )


async def spoilt(bench: Bench, what: str, spoil: Callable[[Path], object], words: str) -> Row:
    path = Path(shutil.copy(bench.model(), bench.fresh("model")))
    with FaultWorker(bench, model=path, orders={"load": {"fraction": 0.3}}) as worker:
        worker.until_told("load")
        begun = time.monotonic()
        spoil(path)
        worker.orders.drop("load")
        code, seconds = await worker.ended(begun)
        require(code == 1, f"{what}: exit code {code}\n{worker.log()}")
        worker.require_one_sentence(LOAD_FAILED, words)
    return Row(
        f"the model's file is {what} while it is loaded",
        f"`{LOAD_FAILED}`: {words}",
        seconds,
        "exit 1",
        "the start",
    )


async def replaced(bench: Bench, what: str, change: Callable[[Path], object]) -> Row:
    path = Path(shutil.copy(bench.model(), bench.fresh("model")))
    with FaultWorker(bench, model=path, orders={"load": {"fraction": 0.3}}) as worker:
        worker.until_told("load")
        begun = time.monotonic()
        change(path)
        worker.orders.drop("load")
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            seconds = time.monotonic() - begun
    fault = f"while the model's file is loaded, {what}"
    return Row(fault, "the file that was opened is served", seconds, "answer", "nothing")


# -- disks -------------------------------------------------------------------------------------------------


async def disk(bench: Bench) -> list[Row]:
    """The disk of the model cannot be read from some place on: a file system on a file that is cut (root)."""
    if os.geteuid() != 0:
        return [
            Row("the disk fails while the model is loaded", "not tried: mounting takes root", None, "", "")
        ]
    image = bench.fresh("disk") / "image"
    with broken_disk(bench, image) as path, FaultWorker(bench, model=path) as worker:
        code, seconds = await worker.ended(worker.begun)
        require(code == 1, f"exit code {code}\n{worker.log()}")
        worker.require_one_sentence(LOAD_FAILED, "its disk fails")
    told = f"`{LOAD_FAILED}`: … or its disk fails"
    fault = "the disk fails (EIO) while the model is loaded"
    return [Row(fault, told, seconds, f"exit 1{FROM_START}", "the start")]


@contextlib.contextmanager
def broken_disk(bench: Bench, image: Path) -> Generator[Path]:
    """A model's file, the second half of which cannot be read."""
    with image.open("wb") as made:
        made.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", str(image))
    mounted = image.parent / "mounted"
    mounted.mkdir()
    with mount("-o", "loop", str(image), str(mounted)):
        path = Path(shutil.copy(bench.model(), mounted / "model.gguf"))
        with path.open("rb") as copied:
            os.fsync(copied.fileno())
        where = run("filefrag", "-v", str(path))
        first = int(where.split("\n")[3].split(":")[2].split("..")[0])
        os.truncate(image, first * 4096 + path.stat().st_size // 2)
        with path.open("rb") as copied:
            os.posix_fadvise(copied.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield path


@contextlib.contextmanager
def mount(*arguments: str) -> Generator[None]:
    run("mount", *arguments)
    try:
        yield
    finally:
        run("umount", "-l", arguments[-1])


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"{' '.join(command)}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def full_disk(bench: Bench) -> Generator[Path]:
    folder = bench.fresh("full")
    with mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        (folder / "log").touch()  # its name is there; room for what it says is not
        with contextlib.suppress(OSError):
            (folder / "filler").write_bytes(bytes(128 << 10))
        yield folder


async def full(bench: Bench) -> list[Row]:
    """No room for compiled kernels, for temporary files, for the log."""
    rows = [await serves(bench, "the log is `/dev/full`", stderr="/dev/full")]
    rows.append(await unread_log(bench))
    if os.geteuid() != 0:
        return [*rows, Row("the cache is on a full disk", NOT_TRIED, None, "", "")]
    with full_disk(bench) as folder:
        rows.append(await serves(bench, "the log is a file on a full disk", stderr=str(folder / "log")))
        everything = {"XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder)}
        fault = "no room for kernels, nor for temporary files"
        rows.append(await serves(bench, fault, environment=everything, word="slow reference"))
        if not bench.quick:
            fault = "no room in the cache of kernels"
            rows.append(await serves(bench, fault, environment={"XDG_CACHE_HOME": str(folder)}))
    return rows


async def serves(
    bench: Bench,
    fault: str,
    *,
    stderr: str | None = None,
    environment: dict[str, str] | None = None,
    word: str = "",
) -> Row:
    """As if nothing were, up to its exit code."""
    with contextlib.ExitStack() as stack:
        out = None if stderr is None else stack.enter_context(Path(stderr).open("wb"))
        worker = stack.enter_context(FaultWorker(bench, environment=environment, stderr=out))
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client, tokens=20)
            await innocents.learn()
            seconds = time.monotonic() - worker.begun
            async with innocents:
                await innocents.next_answer()
            lost = innocents.require_unharmed()
        require(word in worker.log(), f"the log does not say {word!r}")
        worker.process.terminate()
        code = await asyncio.to_thread(worker.exit_code)
        require(code == 0, f"exit code {code}")
    told = (
        "served; a warning says that the slow reference runs" if word else "served; exit 0 when told to end"
    )
    return Row(fault, told, seconds, f"answer{FROM_START}", lost)


async def unread_log(bench: Bench) -> Row:
    """Who reads the log goes away."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as out, FaultWorker(bench, stderr=out) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            async with innocents:
                os.close(reader)
                seconds = await innocents.next_answer()
            lost = innocents.require_unharmed()
        worker.process.terminate()
        code = await asyncio.to_thread(worker.exit_code)
        require(code == 0, f"exit code {code}")
    return Row("who reads the log goes away", "served; exit 0 when told to end", seconds, "answer", lost)
