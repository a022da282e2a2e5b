"""What a worker tells of its life, and what it never tells."""

from __future__ import annotations

import io
import json
import threading
from typing import Any, get_args

import pytest

from worker_orcd.narration import Event, Narration, Style

SECRET = "the prompt nobody may read: Überraschung \U0001f600"


def told(narration: Narration, stream: io.StringIO, *args: Any, **fields: Any) -> dict[str, Any]:
    """The one line that this event makes."""
    before = stream.tell()
    narration.tell(*args, **fields)
    lines = stream.getvalue()[before:].splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_an_event_is_one_json_line_with_a_sentence():
    stream = io.StringIO()
    narration = Narration("json", stream=stream, worker_id="w1", model_ref="m.gguf")
    event = told(narration, stream, "ready", "Ready after 2 s.", uri="http://localhost:1", job_id=None)
    assert list(event)[:4] == ["timestamp", "level", "event", "sentence"]
    assert event["timestamp"].endswith("Z")
    assert (event["level"], event["event"], event["sentence"]) == ("info", "ready", "Ready after 2 s.")
    assert (event["worker_id"], event["model_ref"], event["uri"]) == ("w1", "m.gguf", "http://localhost:1")
    assert "job_id" not in event, "what is not known is left out"


@pytest.mark.parametrize("name", get_args(Event))
def test_every_event_can_be_told(name: Event):
    stream = io.StringIO()
    event = told(Narration("json", stream=stream), stream, name, "It happened.")
    levels = {"error": "error", "gpu_error": "error", "residency_violation": "critical", "warning": "warning"}
    assert event["level"] == levels.get(name, "info")


def test_bound_fields_stay_with_their_narrator():
    stream = io.StringIO()
    narration = Narration("json", stream=stream, worker_id="w1")
    job = narration.bind(job_id="j1", correlation_id=None)
    assert told(job, stream, "cancel", "Gone.")["job_id"] == "j1"
    assert "job_id" not in told(narration, stream, "cancel", "Gone.")
    narration.learn(device="cpu")
    for narrator in (narration, job):
        assert told(narrator, stream, "cancel", "Gone.")["device"] == "cpu"
    assert told(job, stream, "cancel", "Gone.", job_id="j2")["job_id"] == "j2"


def test_text_is_told_as_digest_and_length():
    stream = io.StringIO()
    narration = Narration("json", stream=stream)
    event = told(narration, stream, "execute_start", "Go.", **narration.text_fields("prompt", SECRET))
    assert event["prompt_chars"] == len(SECRET)
    assert len(event["prompt_sha256"]) == 12
    assert "nobody" not in stream.getvalue() and "prompt" not in event
    assert narration.text_fields("prompt", "\ud800")["prompt_chars"] == 1  # a lone surrogate is text too


def test_text_is_told_where_it_was_asked_for():
    stream = io.StringIO()
    narration = Narration("json", stream=stream, log_prompts=True).bind(job_id="j")
    event = told(narration, stream, "execute_start", "Go.", **narration.text_fields("prompt", SECRET))
    assert event["prompt"] == SECRET


def test_a_traceback_is_told_on_the_same_line():
    stream = io.StringIO()
    try:
        raise KeyError("lost")
    except KeyError as error:
        event = told(Narration("json", stream=stream), stream, "error", "A fault.", trace=error)
    assert event["exception"].startswith("Traceback") and "KeyError: 'lost'" in event["exception"]


def test_values_that_json_does_not_know_become_text():
    stream = io.StringIO()
    event = told(Narration("json", stream=stream), stream, "warning", "Odd.", value=object(), line="a\nb")
    assert event["value"].startswith("<object") and event["line"] == "a\nb"


def test_a_terminal_gets_sentences():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    narration = Narration(stream=stream, worker_id="w1")
    narration.tell("ready", "Ready after 2 s.", uri="here")
    line = stream.getvalue()
    assert narration.is_pretty and "Ready after 2 s." in line and "here" in line
    assert "w1" not in line and not line.startswith("{")
    try:
        raise KeyError("lost")
    except KeyError as error:
        narration.tell("error", "A fault.", trace=error)
    assert "KeyError" in stream.getvalue()
    assert not Narration(stream=io.StringIO()).is_pretty
    assert Narration("pretty", stream=io.StringIO()).is_pretty
    assert not Narration("json", stream=Terminal()).is_pretty


def test_a_file_gets_no_colours():
    stream = io.StringIO()
    narration = Narration("pretty", stream=stream)
    narration.tell("ready", "Ready after 2 s.", uri="here")
    try:
        raise KeyError("lost")
    except KeyError as error:
        narration.tell("error", "A fault.", trace=error)
    assert "Ready after 2 s." in stream.getvalue() and "KeyError: 'lost'" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_tables_are_for_people():
    stream = io.StringIO()
    Narration("json", stream=stream).show(["weights  1 MiB"])
    assert stream.getvalue() == ""
    Narration("pretty", stream=stream).bind(job_id="j").show(["weights  1 MiB", "total  2 MiB"])
    assert stream.getvalue() == "weights  1 MiB\ntotal  2 MiB\n"


def test_what_takes_the_place_of_stderr_gets_the_lines(monkeypatch: pytest.MonkeyPatch):
    narration = Narration("json")
    bar = io.StringIO()
    monkeypatch.setattr("sys.stderr", bar)
    narration.tell("warning", "Beside the bar.")
    assert "Beside the bar." in bar.getvalue()


def test_a_closed_stream_is_nobodys_problem():
    stream = io.StringIO()
    narration = Narration("json", stream=stream)
    stream.close()
    narration.tell("ready", "Nobody hears it.")
    narration.warn("Nor this.")
    narration = Narration("pretty", stream=stream)
    narration.show(["Nor this."])


def test_lines_of_several_threads_do_not_mix():
    stream = io.StringIO()
    narration = Narration("json", stream=stream)

    def talk(name: int) -> None:
        for i in range(50):
            narration.tell("cancel", f"{name} {i}", filler="x" * 200)

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sentences = [json.loads(line)["sentence"] for line in stream.getvalue().splitlines()]
    assert sorted(sentences) == sorted(f"{n} {i}" for n in range(8) for i in range(50))


@pytest.mark.parametrize(
    "odd", ["\x1b[31m", "\x9b31m", "\u202e", "\u2028", "\u2066", "a\nb", "\r", "\x7f", "\x00"]
)
@pytest.mark.parametrize("style", ["json", "pretty"])
def test_what_a_caller_wrote_cannot_write_to_a_terminal(odd: str, style: Style):
    out = io.StringIO()
    Narration(style, stream=out).tell("execute_end", "Done.", job_id=f"x{odd}y")
    (line,) = out.getvalue().split("\n")[:-1]
    assert line.isprintable()
    assert style == "pretty" or json.loads(line)["job_id"] == f"x{odd}y"
