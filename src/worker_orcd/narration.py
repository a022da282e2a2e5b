"""
The events of a worker's life, each one line: a sentence for people and fields for machines.

* Events are few and named (`Event`); debugging output is not narrated.
* On a terminal the line is coloured text, elsewhere JSON (or, where asked for, text without colours):
  `timestamp`, `level`, `event`, `sentence`, then the bound fields (`worker_id`, `model_ref`, `device`) and
  those of the event (`job_id`, `correlation_id`, …).
* No prompt and no completion is ever told: `Narration.text_fields` gives a digest and a length, and the text
  itself only where the operator asked for it (`log_prompts`).
* Telling never raises and never changes what is told about: a broken stderr is no reason to drop a job.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Event = Literal[
    "startup",
    "model_load_start",
    "model_load_progress",
    "memory_plan",
    "memory_measured",
    "model_load_complete",
    "ready",
    "execute_start",
    "execute_end",
    "cancel",
    "paused",
    "resumed",
    "gpu_error",
    "residency_violation",
    "warning",
    "error",
    "shutdown",
]
Style = Literal["auto", "json", "pretty"]

_LEVELS: dict[Event, str] = {  # all others are information
    "error": "error",
    "gpu_error": "error",
    "residency_violation": "critical",
    "warning": "warning",
}
_DIGEST_CHARS = 12
_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode
# What JSON may hold as it is, but a terminal obeys and some readers take for the end of a line.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class _Stderr:
    """sys.stderr as it is when something is written: a progress bar takes its place to keep lines apart."""

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class Narration:
    """Writes events to one stream (stderr by default). Safe to use from several threads."""

    def __init__(
        self,
        style: Style = "auto",
        *,
        stream: TextIO | None = None,
        log_prompts: bool = False,
        **fields: object,
    ) -> None:
        out: Any = _Stderr() if stream is None else stream
        self._out = out
        self.is_pretty = style == "pretty" or (style == "auto" and out.isatty())
        self._log_prompts = log_prompts
        self._learnt = dict[str, Any]()  # shared with every narrator bound from this one
        self._fields = _known(fields)
        self._logger: Any = _pretty_logger(out, colours=_is_terminal(out)) if self.is_pretty else None

    def bind(self, **fields: object) -> Narration:
        """The same narrator with these fields in every event. None leaves a field out."""
        bound = object.__new__(Narration)
        bound._out = self._out
        bound.is_pretty = self.is_pretty
        bound._log_prompts = self._log_prompts
        bound._learnt = self._learnt
        bound._fields = self._fields | _known(fields)
        bound._logger = self._logger
        return bound

    def learn(self, **fields: object) -> None:
        """Put these fields into every later event, of the narrators bound from this one too."""
        self._learnt.update(_known(fields))

    def tell(
        self, event: Event, sentence: str, *, trace: BaseException | None = None, **fields: object
    ) -> None:
        """One event. `trace`: an unexpected exception, told with its traceback."""
        level = _LEVELS.get(event, "info")
        details = self._fields | self._learnt | _known(fields)
        try:
            if self._logger is not None:
                if trace is not None:
                    details["exc_info"] = (type(trace), trace, trace.__traceback__)
                getattr(self._logger, level)(event, sentence=sentence, **details)
                return
            if trace is not None:
                details["exception"] = "".join(traceback.format_exception(trace)).rstrip("\n")
            self._out.write(_json_line(level, event, sentence, details))
            self._out.flush()
        except (OSError, ValueError):  # the stream is closed, or nobody reads it any more
            return

    def warn(self, sentence: str) -> None:
        """A `warning` without fields: what other layers take as their `warn` callback."""
        self.tell("warning", sentence)

    def show(self, lines: Iterable[str]) -> None:
        """A table for people. Nothing where events are JSON: there an event's fields say the same."""
        if self.is_pretty:
            try:
                self._out.write("".join(f"{line}\n" for line in lines))
                self._out.flush()
            except (OSError, ValueError):
                return

    def text_fields(self, name: str, text: str) -> dict[str, object]:
        """What may be told of a prompt or a completion: `<name>_sha256` (a prefix) and `<name>_chars`."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        fields: dict[str, object] = {f"{name}_sha256": digest[:_DIGEST_CHARS], f"{name}_chars": len(text)}
        if self._log_prompts:
            fields[name] = text
        return fields


def _is_terminal(out: Any) -> bool:
    try:
        return bool(out.isatty())
    except ValueError:  # it is closed
        return False


def _known(fields: dict[str, object]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _pretty_logger(out: Any, *, colours: bool) -> Any:
    import structlog  # here: an engine that is told where to narrate runs where it is not installed

    if colours:
        drawn = structlog.dev.ConsoleRenderer()
    else:
        plain = structlog.dev.plain_traceback
        drawn = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=plain)
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    processors: list[Any] = [structlog.processors.add_log_level, stamp, _sentence_first, drawn]
    return structlog.wrap_logger(
        structlog.WriteLogger(out),
        processors=processors,
        wrapper_class=structlog.BoundLogger,
        context_class=dict,
    ).bind()  # or each event would make a logger of its own


def _sentence_first(_logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """People read the sentence; the fields that say the same for every event would only be in the way."""
    for name in ("worker_id", "model_ref", "device"):
        event.pop(name, None)
    event["event"] = event.pop("sentence")
    for name, value in event.items():  # what a caller wrote is shown to a terminal, not obeyed by it
        if isinstance(value, str) and not value.isprintable():
            event[name] = ascii(value)[1:-1]
    return event


def _json_line(level: str, event: Event, sentence: str, details: dict[str, Any]) -> str:
    """Without structlog, which takes the event loop several times as long for it; each job has two."""
    stamp = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    head = {"timestamp": f"{stamp}Z", "level": level, "event": event, "sentence": sentence}
    line = _encode(head | details)
    if not line.isprintable():
        line = _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    return line + "\n"
