"""The process in which a chat template is compiled and rendered: a program of its own, run by
`template_process`.

A template is a program that came with a model file. Here it has Jinja's immutable sandbox around it, no
loader, and limits that the kernel keeps, because nothing inside an interpreter can interrupt `'a' * 10**10`
or `2 ** 10**10`: an alarm that ends the process, a bound on its address space, no file of more than 0 bytes.
Imports nothing of worker_orcd, so that starting it takes a tenth of a second.

Frames on stdin and stdout are a length in 8 bytes, big-endian, and that much JSON in UTF-8 (lone surrogates
pass). The first request is `{"source": …}`, the others are `{"variables": {…}, "now": "2026-11-25T12:00"}`; a
reply is `{"text": …}` or `{"error": …}`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

if __name__ == "__main__":  # started with -I -S: the parent says where packages are
    sys.path[:] = json.loads(sys.argv[1])["path"]

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TooLarge(Exception):
    """The output is longer than allowed."""


class Generation(Extension):
    """`{% generation %}`, by which templates mark what a model was trained to write; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Templates are written for this one, which unlike Jinja's own does not escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Clock:
    """What time it is for templates: that of the request, so that it does not depend on who renders when."""

    def __init__(self) -> None:
        self.now = datetime.min

    def strftime_now(self, form: str) -> str:
        return self.now.strftime(form)


def environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    """What `transformers` gives to templates, without Jinja's text generators."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = tojson
    for name in ("lipsum", "cycler", "joiner"):
        made.globals.pop(name, None)
    ours: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": clock.strftime_now}
    cast("dict[str, Any]", made.globals).update(ours)
    return made


def render(template: Template, variables: dict[str, Any], max_chars: int) -> str:
    pieces: list[str] = []
    room = max_chars
    for piece in template.generate(variables):
        room -= len(piece)
        if room < 0:
            raise TooLarge(f"the prompt is longer than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def _attempt(
    work: Callable[[dict[str, Any]], str], request: dict[str, Any], seconds: float
) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return {"text": work(request)}
    except MemoryError:
        return {"error": "it needs more memory than allowed"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except (TemplateError, TooLarge) as error:
        return {"error": str(error)[:500] or type(error).__name__}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def confine(memory_bytes: int) -> None:
    """The kernel's limits on this process, from now on."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also in the middle of a C function
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(OSError, ValueError):  # where the kernel does not know a limit, the others hold
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    size = int.from_bytes(stream.read(8), "big")
    return json.loads(stream.read(size).decode("utf-8", "surrogatepass")) if size else None


def _write(stream: BinaryIO, reply: dict[str, str]) -> None:
    data = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    seconds, max_chars = float(settings["seconds"]), int(settings["max_chars"])
    clock = Clock()
    env = environment(clock)
    confine(int(settings["memory_bytes"]))
    compiled: list[Template] = []

    def answer(request: dict[str, Any]) -> str:
        if "source" in request:
            compiled.append(env.from_string(request["source"]))
            return ""
        clock.now = datetime.fromisoformat(request["now"])
        return render(compiled[0], request["variables"], max_chars)

    while (request := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, _attempt(answer, request, seconds))


if __name__ == "__main__":
    main()
