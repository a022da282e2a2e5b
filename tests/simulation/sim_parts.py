"""What stands around the worker in the simulation: its inbox, its narrator, its socket, and who listens."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from worker_orcd.engine.messages import Cancel, Command, Submit
from worker_orcd.narration import Narration

if TYPE_CHECKING:
    from sim_world import World

_NOWHERE = logging.NullHandler()
MAX_TURNS = 1000  # of the engine, in which nothing happens


class Violation(BaseException):
    """A promise was broken. No code under test catches it."""


class Listener:
    """A socket that nobody connects to."""

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", 8080)

    def close(self) -> None: ...


class Inbox:
    """The engine's inbox, and the place where it sleeps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.commands: deque[Command | None] = deque()
        self._num_turns = 0  # without an event
        self._seen = 0  # events so far

    def put(self, command: Command | None) -> None:
        self.commands.append(command)

    def get(self, *, block: bool) -> Command | None:
        world = self._world
        if block:
            world.wait_for_command()
        else:
            self._num_turns = self._num_turns + 1 if world.num_events == self._seen else 0
            self._seen = world.num_events
            if self._num_turns > MAX_TURNS:
                raise Violation("the engine has work and does nothing")
            world.switch()
        if not self.commands:
            raise queue.Empty
        command = self.commands.popleft()
        if command is not None:
            with world.watched():
                world.checks.taken(command)
        world.event("command", _told(command))
        return command


def _told(command: Command | None) -> str:
    match command:
        case Submit():
            return f"submit {command.id}, seed {command.sampling.seed}, priority {command.priority}"
        case Cancel(id):
            return f"cancel {id}"
        case None:
            return "stop"


class Teller(Narration):
    """Listens for what nobody expects."""

    def __init__(self, world: World) -> None:
        super().__init__("json")
        self._world = world

    def tell(
        self, event: Any, sentence: str, *, trace: BaseException | None = None, **fields: object
    ) -> None:
        world = self._world
        if trace is not None and trace not in world.faults:
            world.wrong(f"{sentence} {type(trace).__name__}: {trace} {place_of(trace)}")
        elif "was ignored" in sentence or "could not be" in sentence:
            world.wrong(sentence)


def told_of(error: Exception) -> str:
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).partition(chr(10))[0]} {place_of(error)}".strip()


def place_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        "" if trace is None else f"({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
    )


@contextmanager
def uvicorn_told(world: World) -> Generator[None]:
    """What uvicorn logs as an error is one."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            is_cut = isinstance(error, asyncio.CancelledError) and world.is_closing  # it reads nothing
            if not (is_cut or record.getMessage().startswith("Cancel ")):
                world.wrong(f"uvicorn: {record.getMessage()} {error!r}")

    with silence():
        handler, logger = Handler(logging.WARNING), logging.getLogger("uvicorn.error")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


@contextmanager
def silence() -> Generator[None]:
    """Nothing that uvicorn or asyncio logs is shown."""
    loggers = [logging.getLogger("uvicorn.error"), logging.getLogger("asyncio")]
    kept = [logger.propagate for logger in loggers]
    try:
        for logger in loggers:
            logger.propagate = False
            logger.addHandler(_NOWHERE)
        yield
    finally:
        for logger, propagate in zip(loggers, kept, strict=True):
            logger.propagate = propagate
            logger.removeHandler(_NOWHERE)
