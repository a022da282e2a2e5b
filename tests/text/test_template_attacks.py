"""Hostile chat templates: each fails, in bounded time and memory, and leaves the process that serves as it
was.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from template_attacks import COMPILER, ESCAPES, EXHAUSTION, HARMLESS

from worker_orcd.errors import InvalidModelFile, InvalidParameter
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.template_process import RenderLimits

LIMITS = RenderLimits(seconds=0.5, max_chars=1 << 20, memory_bytes=64 << 20)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
MOST_SECONDS = 60.0  # to start, compile and render on a busy machine; without limits it would be hours
SEEN = r"uid=\d|root:|posix|<module|builtins|subclass|/etc|/home|os\.|Popen"


def attempt(source: str, limits: RenderLimits = LIMITS) -> tuple[str, Exception | None]:
    """What the template rendered, or how it failed."""
    try:
        template = ChatTemplate(source, limits=limits)
        try:
            return template.render(MESSAGES), None
        finally:
            template.close()
    except (InvalidModelFile, InvalidParameter) as error:
        return "", error


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes(source: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    rendered, error = attempt(source.replace("{canary}", str(canary)))
    assert error is not None, rendered
    assert not canary.exists()
    assert len(str(error)) < 700
    assert not re.search(r"0x[0-9a-f]{6}|Traceback|site-packages", str(error))


@pytest.mark.parametrize("source", HARMLESS)
def test_what_renders_says_nothing(source: str) -> None:
    rendered, error = attempt(source, RenderLimits())
    assert error is None, error
    assert not re.search(SEEN, rendered)


@pytest.mark.parametrize("source", EXHAUSTION)
def test_exhaustion(source: str) -> None:
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    rendered, error = attempt(source)
    seconds = time.perf_counter() - start
    assert error is not None, f"{len(rendered)} characters"
    assert seconds < MOST_SECONDS
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("name", COMPILER)
def test_the_compiler_is_bounded_too(name: str) -> None:
    start = time.perf_counter()
    rendered, _ = attempt(COMPILER[name])
    assert len(rendered) <= LIMITS.max_chars
    assert time.perf_counter() - start < MOST_SECONDS


def test_a_template_that_was_stopped_is_tried_again():
    source = (
        "{% if messages | length == 2 %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    template = ChatTemplate(source, limits=RenderLimits(seconds=4))
    for _ in range(2):
        with pytest.raises(InvalidParameter, match="it takes longer than 4 s"):
            template.render(MESSAGES)
        assert template.render(MESSAGES[:1]) == "ok"
    template.close()


def test_memory_of_the_process_is_bounded():
    limits = replace(LIMITS, seconds=60)  # memory is what ends it
    template = ChatTemplate("{{ messages[0].n | int * 'x' }}", limits=limits)
    process = psutil.Process(template.process_id)
    for n in (10**6, 10**8, 10**9, 10**11, 10**6):
        try:
            template.render([{"role": "user", "content": "", "n": n}])
        except InvalidParameter as error:
            assert re.search("memory|longer than 1048576 characters|OverflowError", str(error)), error
        assert process.memory_info().rss < LIMITS.memory_bytes + (64 << 20)
    assert template.process_id == process.pid  # refused, not died
    template.close()


def test_the_process_has_nothing_to_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_ORCD_API_KEY", "secret")
    template = ChatTemplate("x")
    process = psutil.Process(template.process_id)
    assert "WORKER_ORCD_API_KEY" not in process.environ()
    assert process.cwd() == "/"
    assert [f.path for f in process.open_files()] == []
    assert os.getsid(process.pid) == process.pid  # Ctrl-C in a terminal does not reach it
    template.close()


def test_no_process_outlives_its_template():
    template = ChatTemplate("x")
    process = psutil.Process(template.process_id)
    template.close()
    assert not process.is_running()
    assert template.render(MESSAGES) == "x"  # closing is not final
    process = psutil.Process(template.process_id)
    del template
    assert not process.is_running()


def test_no_process_outlives_the_worker():
    """Not even one that is busy and whose worker was killed."""
    code = (
        "from worker_orcd.text.chat import ChatTemplate\n"
        "from worker_orcd.text.template_process import RenderLimits\n"
        "t = ChatTemplate('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',"
        " limits=RenderLimits(seconds=5))\n"
        "print(t.process_id, flush=True)\n"
        "t.render([{'role': 'user', 'content': ''}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        number = int(worker.stdout.readline())
        worker.kill()
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        child = psutil.Process(number)
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running()


def test_a_killed_process_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(MESSAGES) == "Hi"
    psutil.Process(template.process_id).kill()
    with pytest.raises(InvalidParameter, match="its process ended"):
        template.render(MESSAGES)
    assert template.render(MESSAGES) == "Hi"
    template.close()


def test_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(InvalidModelFile, match="its process cannot be started"):
        ChatTemplate("x")
