"""Progress and errors as people see them."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
from typing import Literal

import pytest
import typer

from worker_orcd.cli import terminal
from worker_orcd.errors import Internal, InvalidConfiguration, ModelNotFound


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_what_takes_long_is_told_in_quarters(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as report:
        for done in range(0, 101, 5):
            report("downloading", done, 100)
            clock[0] += 0.5
    assert capsys.readouterr().err.splitlines() == [
        "downloading: 0 %",
        "downloading: 25 %",
        "downloading: 50 %",
        "downloading: 75 %",
        "downloading: 100 %",
    ]


def test_what_is_quick_is_not_told(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as report:
        for done in range(101):
            report("reading", done, 100)
            clock[0] += 0.005
        report("of unknown length", 1, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "1.0/2.0 kB"), ("tokens", "1000/2000 tokens")])
def test_the_bar_counts_in_its_unit(
    unit: Literal["bytes", "tokens"], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with terminal.progress_bar(unit) as report:
            report("scoring", 1000, 2000)
    drawn = everything(master)
    assert shown in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)


def everything(master: int) -> str:
    """What was written to a terminal that is closed. A read gives what one write gave, then there is EIO."""
    chunks: list[bytes] = []
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 1 << 16):
            chunks.append(chunk)
    os.close(master)
    return b"".join(chunks).decode()


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with terminal.progress_bar() as report:
            report("downloading", 0, 0)  # the length is not known at first
            report("downloading", 50, 100)
            report("unpacking", 1, 2)
            report("unpacking", 2, 2)
    drawn = everything(master)
    assert "downloading" in drawn or "unpacking" in drawn
    assert "\x1b" in drawn


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ModelNotFound("no such file"), 1, "error MODEL_LOAD_FAILED: no such file\n"),
        (InvalidConfiguration("port"), 2, "error INVALID_CONFIGURATION: port\n"),
        (Internal("reference 1"), 1, "error INTERNAL: reference 1\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_expected_failures_end_in_a_status(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back what a broken pipe takes away

    @terminal.reports_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == status
    assert capsys.readouterr().err == line


def test_unexpected_failures_are_not_hidden() -> None:
    @terminal.reports_errors
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()
