"""Runs commands in this process, where torch is imported once, or in one of their own."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from worker_orcd.cli import terminal
from worker_orcd.cli.app import build


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`invoke("inspect", "x.gguf")`: what `worker-orcd inspect x.gguf` prints, and its exit status.

    Progress is left out: on a busy machine loading takes long enough to be told.
    """
    monkeypatch.setattr(terminal, "WORTH_TELLING_SECONDS", math.inf)
    app = build()

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        try:
            app(list(words), prog_name="worker-orcd")
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    yield run


@pytest.fixture
def execute() -> Invoke:
    """The same in a process of its own, as a user runs it."""

    def run(*words: str) -> Outcome:
        command = [sys.executable, "-m", "worker_orcd", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
