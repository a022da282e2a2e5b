"""`run`: one prompt or a conversation, through the real model."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.cli.chat import Screen
from worker_orcd.text.regions import Message
from worker_orcd.text.stream import Delta

SMALL = ("--kv-cache-size-mb", "64", "--max-num-seqs", "2", "--cpu-threads", "1")
GREEDY = (*SMALL, "--temperature", "0")


def test_an_answer_goes_to_stdout_and_figures_to_stderr(invoke: Any, demo_model: Path) -> None:
    words = ("run", str(demo_model), "Name three fruits.", *GREEDY, "--max-model-len", "512")
    plain = invoke(*words, "--max-tokens", "12")
    assert plain.status == 0
    assert len(plain.out.split()) > 3
    assert plain.err == ""
    told = invoke(*words, "--max-tokens", "12", "--stats")
    assert told.out == plain.out
    assert re.fullmatch(
        r"\[\d+ prompt tokens, first token after \d+ ms, \d+ tokens, [\d.]+ tok/s\]\n", told.err
    )


def test_the_prompt_may_come_from_standard_input(
    invoke: Any, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(demo_model), *GREEDY, "--max-tokens", "6"]
    expected = invoke("run", words[0], "Name a colour.", *words[1:])
    monkeypatch.setattr(sys, "stdin", StringIO("Name a colour."))
    assert invoke("run", *words).out == expected.out
    monkeypatch.setattr(sys, "stdin", StringIO("Name a colour."))
    assert invoke("run", words[0], "-", *words[1:]).out == expected.out


def test_raw_continues_the_text(invoke: Any, demo_model: Path) -> None:
    raw = invoke("run", str(demo_model), "The capital of France is", "--raw", *GREEDY, "--max-tokens", "4")
    assert raw.status == 0
    assert "Paris" in raw.out
    assert not raw.out.startswith("The capital")


def test_a_seed_fixes_the_draws(invoke: Any, demo_model: Path) -> None:
    def answer(seed: str) -> str:
        words = [str(demo_model), "Tell me a story.", *SMALL, "--temperature", "1.5", "--max-tokens", "12"]
        return invoke("run", *words, "--seed", seed).out

    first = answer("1")
    assert answer("1") == first
    assert answer("2") != first


def test_a_system_message_changes_the_answer(invoke: Any, demo_model: Path) -> None:
    words = ["run", str(demo_model), "Who are you?", *GREEDY, "--max-tokens", "16"]
    assert invoke(*words).out != invoke(*words, "--system", "You are a pirate called Blackbeard.").out


def test_too_long_a_prompt_gives_both_numbers(invoke: Any, demo_model: Path) -> None:
    outcome = invoke("run", str(demo_model), "word " * 300, *GREEDY, "--max-model-len", "128")
    assert outcome.status == 1
    assert re.match(r"error INVALID_REQUEST: the prompt has 3\d\d tokens; at most 127 fit\n", outcome.err)


class Terminal:
    """`worker-orcd run` on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "worker_orcd", "run", *words]
        environment = os.environ | {"TERM": "dumb", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, expression: str, seconds: float = 240.0) -> str:
        """Read until what has not been asked for yet matches; forget it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(expression, self.text, re.DOTALL)) is None:
            if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {expression!r} in {self.text!r}")
            try:
                self.text += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError as error:
                raise AssertionError(f"ended without {expression!r}: {self.text!r}") from error
        read, self.text = self.text[: match.end()], self.text[match.end() :]
        return read

    def interrupt_until(self, expression: str) -> str:
        """Press Ctrl-C, again and again: Python's readline misses one that comes just before it waits."""
        for _ in range(20):
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                return self.wait_for(expression, seconds=10.0)
            except AssertionError:
                continue
        return self.wait_for(expression)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


class FakeTerminal(StringIO):
    def isatty(self) -> bool:
        return True


REASONED = [("Hm\x1b[2J.", "analysis"), ("", None), (" So", "analysis"), ("Four", "final"), (".", "final")]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (StringIO(), "Four.\n"),
        (FakeTerminal(), "\x1b[2mHm\ufffd[2J. So\x1b[0m\n\nFour.\n"),
    ],
)
def test_reasoning_is_dim_and_only_for_terminals(
    output: StringIO, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", output)
    screen = Screen()
    for text, channel in REASONED:
        screen.show(Delta(text, message=None if channel is None else Message(channel)))
    screen.end()
    assert output.getvalue() == expected
    assert "".join(screen.content) == "Four."


def test_an_answer_of_reasoning_alone_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    screen = Screen()
    screen.show(Delta("Hm", message=Message("analysis")))
    screen.end()
    assert sys.stdout.getvalue() == "\x1b[2mHm\x1b[0m\n"


@pytest.mark.slow
def test_a_conversation(demo_model: Path) -> None:
    terminal = Terminal(str(demo_model), *GREEDY)
    try:
        terminal.wait_for(r"/help for help.*> ")
        terminal.type("My name is Zoe. Say hello.\n")
        assert "prompt tokens" in terminal.wait_for(r"tok/s\].*> ")

        terminal.type("Write a haiku about autumn rain.\n")  # greedily, it never stops by itself
        terminal.wait_for(r"autumn rain\.\r?\n.{40}")
        os.killpg(terminal.process.pid, signal.SIGINT)  # Ctrl-C stops the answer, not the program
        stopped = terminal.wait_for(r"tok/s\].*> ")
        assert int(re.findall(r"(\d+) tokens, [\d.]+ tok/s", stopped)[-1]) < 2000

        terminal.type("/nonsense\n")
        assert "/reset" in terminal.wait_for(r"Ctrl-C stops the answer\..*> ")
        terminal.type("/reset\n")
        terminal.wait_for(r"/reset\r?\n.*> ")
        terminal.interrupt_until(r"/exit to leave.*> ")  # at the prompt it explains how to leave

        terminal.type("Say hello.\n")
        assert "prompt tokens" in terminal.wait_for(r"Say hello.*tok/s\].*> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(120) == 0
    finally:
        terminal.close()
