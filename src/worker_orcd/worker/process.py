"""
The life of a worker process: listen, load, announce, serve, drain, exit.

* HTTP answers from the first moment (`/health`: loading, with a percentage); the model loads in a thread.
* It ends by SIGTERM, SIGINT or POST /shutdown (exit 0), or by a failure: of loading, of the ready callback,
  of the engine (exit 1). Either way new jobs are refused, those admitted have the grace period, then they are
  cut off (DRAINING); the last bytes of every stream are sent before the process exits. A second signal ends
  it at once.
* Failures are narrated in a sentence; a traceback is narrated only for what nobody expected.

Threads: the main thread runs the event loop, one thread runs the engine, one loads and then ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import uvicorn

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import (
    DeviceError,
    EngineError,
    InsufficientMemory,
    Internal,
    LoadError,
    Paused,
    WorkerError,
)
from worker_orcd.hub import Progress
from worker_orcd.narration import Narration
from worker_orcd.nvml import open_nvml
from worker_orcd.runner.residency import DriverProbe
from worker_orcd.server.app import create_app
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.protocol import uvicorn_config
from worker_orcd.server.status import CAPABILITIES, PAUSE_RETRY_SECONDS, Status
from worker_orcd.version import VERSION
from worker_orcd.worker.ahead import import_torch, imported
from worker_orcd.worker.callback import announce, read_token
from worker_orcd.worker.gpu_watch import GpuWatch, OpenNvml
from worker_orcd.worker.guard import Guard, OpenProbe, ResidencyWatch
from worker_orcd.worker.listening import address_of, listen, uri_of
from worker_orcd.worker.off_loop import off_loop
from worker_orcd.worker.plan_words import tell_held, tell_plan
from worker_orcd.worker.priority import answer_first
from worker_orcd.worker.progress import LoadProgress, LoadStopped
from worker_orcd.worker.session import Session, facts_of

if TYPE_CHECKING:
    from worker_orcd.worker.loading import LoadedModel

WORKER_TYPE = "gguf"
_CANCEL_SECONDS = 2.0  # for streams to say that they were cancelled
_CLOSE_SECONDS = 3.0  # for connections to close
_GPU_SECONDS = 1.0  # for NVML to be left
_MIB = 1 << 20
_STEP_SECONDS = 10.0  # for the step in flight, and for loading to notice that it should stop

Drawing = Callable[[], contextlib.AbstractContextManager[Progress]]


def serve(config: WorkerConfig, *, drawing: Drawing | None = None) -> int:
    """Serve until told to stop; the exit code. On the main thread: it takes SIGTERM and SIGINT.

    `drawing` opens a progress bar for loading, in place of `model_load_progress` events.
    """
    status = Status(worker_id=config.worker_id or str(uuid.uuid4()), model_ref=model_ref(config.model))
    narration = Narration(
        config.server.narration,
        log_prompts=config.server.log_prompts,
        worker_id=status.worker_id,
        model_ref=status.model_ref,
    )
    try:
        token = read_token(config.callback)
        listener = listen(config.server)
    except WorkerError as error:
        narration.tell("error", f"The worker cannot start: {error.message}.", code=error.code)
        return 1
    # Every token wakes the event loop while the engine's thread wants the interpreter too, and with the
    # default of 5 ms each hand-over may cost a step that much. Measured with 256 streams and a
    # device step of 10 ms: 20 ms a step with the default, 12.8 ms with this.
    sys.setswitchinterval(0.0005)
    answer_first()
    with listener, _told_by(narration):
        worker = Worker(config, status, narration, listener, token, drawing)
        with asyncio.Runner(loop_factory=worker.http_config.get_loop_factory()) as runner:
            code = runner.run(worker.run())
    if worker.is_stuck:  # a thread that does not end would keep the interpreter from ending
        os._exit(code)
    return code


def model_ref(model: str) -> str:
    """The model as the user wrote it, but without a directory."""
    if model.startswith("hf:") or model == "demo":
        return model
    return PurePath(model.removeprefix("file:")).name


@dataclass(frozen=True, slots=True)
class Doors:
    """What opens NVML and the driver."""

    open_library: OpenNvml = open_nvml
    open_probe: OpenProbe = DriverProbe


_DOORS = Doors()


class Worker:
    """Everything, while it lives. All methods run on the event loop but those that say otherwise."""

    def __init__(
        self,
        config: WorkerConfig,
        status: Status,
        narration: Narration,
        listener: socket.socket,
        token: str | None,
        drawing: Drawing | None,
        *,
        doors: Doors = _DOORS,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._config = config
        self._narration = narration
        self._listener = listener
        self._token = token
        self._drawing = drawing or contextlib.nullcontext
        self._status = status
        self._clock = clock
        self._metrics = Metrics(self._status)
        app = create_app(
            config.server,
            self._status,
            self._metrics,
            narration=narration,
            request_shutdown=lambda: self._end(0, "Somebody asked for it"),
            clock=clock,
        )
        self.http_config = uvicorn_config(app, config.server)
        self.http_config.timeout_graceful_shutdown = int(_CLOSE_SECONDS)
        self._progress: LoadProgress | None = None
        self._session: Session | None = None
        self._gpu = GpuWatch(status, narration, doors.open_library)
        self._residency = ResidencyWatch(status, narration, doors.open_probe)
        self._ended: asyncio.Future[int] | None = None
        self._was_signalled = False  # who asked by POST /shutdown, or sees it fail, may send one as well
        self.is_stuck = False  # a thread did not end when it should

    async def run(self) -> int:
        """Live and end; the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._stray)
        self._ended = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        uri = uri_of(self._listener, self._config.server)
        bound = address_of(self._listener)
        self._narration.tell(
            "startup", f"worker-orcd {VERSION} listens on {bound}.", version=VERSION, uri=uri
        )
        server = _Server(self.http_config)
        http = loop.create_task(server.serve([self._listener]), name="http")
        http.add_done_callback(self._unserved)
        start = loop.create_task(self._start(uri), name="start")
        code = await self._ended
        await self._drain()
        await self._abandon(start)
        server.should_exit = True
        await asyncio.gather(http, return_exceptions=True)
        await loop.run_in_executor(None, self._close)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GPU_SECONDS):
                await self._gpu.close()
        self._narration.tell("shutdown", f"The worker has stopped with exit code {code}.", exit_code=code)
        return code

    # -- beginning -----------------------------------------------------------------------------------------

    async def _start(self, uri: str) -> None:
        """Load, open for jobs, announce, and look after it all. Whatever goes wrong ends the worker."""
        try:
            if self._config.device.device != "cpu":
                await self._gpu.prepare()
            announcement = await self._load_and_open(uri)
            if announcement is None:  # told to stop meanwhile
                return
            await announce(self._config.callback, self._token, announcement, self._narration)
            await Guard(self._config.watch, self._status, self._gpu, self._residency, self).run()
        except LoadStopped:
            return
        except (LoadError, EngineError) as error:
            self._fail(error)
        except MemoryError:
            self._fail(InsufficientMemory("there is not enough memory to load the model"))
        except Exception as error:
            reference = uuid.uuid4().hex[:12]
            self._narration.tell("error", "An unexpected fault at start.", trace=error, reference=reference)
            self._fail(Internal(f"internal error, reference {reference}"))

    async def _load_and_open(self, uri: str) -> dict[str, object] | None:
        """What to announce; None, and nothing opened, where the worker is to end."""
        loaded = await self._load()
        if self._ended is None or self._ended.done():
            await off_loop(loaded.close, name="close")
            return None
        self._open(loaded, uri)
        await self._gpu.open(loaded.backend.memory.facts.uuid)
        await self._residency.open(loaded.backend.memory)
        return self._announcement(loaded, uri)

    async def _load(self) -> LoadedModel:
        """The loaded model, loaded in a thread of its own: nothing waits for it if it hangs."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[LoadedModel] = loop.create_future()

        def on_percent(percent: float) -> None:
            loop.call_soon_threadsafe(self._status.loading, percent)

        def settle(loaded: LoadedModel | None, error: BaseException | None) -> None:
            self._progress = None
            if result.cancelled():  # given up: nobody will close it but we
                if loaded is not None:
                    loaded.close()
            elif error is not None:
                result.set_exception(error)
            elif loaded is not None:
                result.set_result(loaded)

        def work() -> None:
            loaded: LoadedModel | None = None
            failure: BaseException | None = None
            try:
                import_torch()  # here: it takes seconds, and HTTP is up already
                from worker_orcd.worker.loading import load

                imported()
                with self._drawing() as draw:
                    progress = self._progress = LoadProgress(self._narration, on_percent, draw)
                    loaded = load(
                        self._config,
                        warn=self._narration.warn,
                        on_progress=progress,
                        on_plan=partial(tell_plan, self._narration),
                    )
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has ended without us
                loop.call_soon_threadsafe(settle, loaded, failure)

        self._narration.tell("model_load_start", f"Loading {self._status.model_ref}.")
        threading.Thread(target=work, name="load", daemon=True).start()
        return await result

    def _open(self, loaded: LoadedModel, uri: str) -> None:
        """Start the engine and accept jobs."""
        self._session = session = Session(
            loaded,
            max_queue=self._config.server.max_queue,
            observer=self._metrics,
            narration=self._narration,
            on_failure=self._engine_failed,
            clock=self._clock,
        )
        self._tell_loaded(loaded)
        if loaded.backend.name == "cpu-reference":
            self._status.slow = "the fast CPU kernels are not available; a slow reference runs instead"
        self._status.loaded(session.serving)
        bound = address_of(self._listener)
        self._narration.tell(
            "ready",
            f"Ready after {self._status.uptime_seconds:.1f} s: {loaded.model_id} on {bound}.",
            uri=uri,
            context_length=loaded.plan.max_model_len,
        )

    def _tell_loaded(self, loaded: LoadedModel) -> None:
        self._narration.learn(device=loaded.backend.name)
        self._narration.tell(
            "model_load_complete",
            f"{loaded.model_id} ({loaded.config.architecture}, {loaded.quant_kind}) is loaded on"
            f" {loaded.backend.name}: {loaded.backend.description}.",
            seconds=round(loaded.timings.total, 3),
        )
        if loaded.held is not None:
            tell_held(self._narration, loaded.plan, loaded.held)

    def _announcement(self, loaded: LoadedModel, uri: str) -> dict[str, object]:
        return {
            "worker_id": self._status.worker_id,
            "model_ref": self._status.model_ref,
            "memory_bytes": facts_of(loaded).memory_bytes_used,
            "memory_architecture": "vram-only" if loaded.backend.name == "cuda" else "host-memory",
            "uri": uri,
            "worker_type": f"{WORKER_TYPE}-{'cuda' if loaded.backend.name == 'cuda' else 'cpu'}",
            "capabilities": list(CAPABILITIES),
        }

    # -- leaving the device for a while (Pausable) ---------------------------------------------------------

    async def pause(self, reason: str) -> None:
        """End running jobs with an error that says to try again, give up the model, free the device."""
        session, self._session = self._session, None
        if session is None:
            return
        running = session.client.num_admitted
        self._status.pause(reason)
        self._residency.close()
        session.end_jobs(Paused(reason, retry_after=PAUSE_RETRY_SECONDS))
        try:
            left = await off_loop(lambda: session.close(_STEP_SECONDS), name="close")
        except TimeoutError:
            self.is_stuck = True
            self._fail(DeviceError("the device does not answer and could not be left"))
            return
        kept = "" if not left else f" {left / _MIB:,.1f} MiB could not be freed."
        self._narration.tell(
            "paused", f"Paused: {reason}; {running} jobs were ended.{kept}", running=running, bytes_left=left
        )

    async def resume(self) -> bool:
        """Load the model again. False where there is no room for it yet."""
        self._narration.tell("resumed", "The GPU is free again; the model is loaded once more.")
        try:
            await self._load_and_open(uri_of(self._listener, self._config.server))
        except InsufficientMemory as error:
            self._narration.warn(f"There is no room for the model yet: {error.message}.")
            return False
        return True

    # -- ending --------------------------------------------------------------------------------------------

    def _end(self, code: int, sentence: str, *, is_told: bool = False) -> None:
        """The first reason to end decides the exit code. `is_told`: there is no more to say than that."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(code)
            running = 0 if self._session is None else self._session.client.num_admitted
            grace = self._config.server.shutdown_grace_seconds
            left = f"; {running} jobs have {grace:g} s to finish" if running else ""
            if running or not is_told:
                self._narration.tell("shutdown", f"{sentence}: shutting down{left}.", running=running)

    def _signalled(self, number: signal.Signals) -> None:
        if self._was_signalled:
            self._narration.tell("shutdown", f"{number.name} again: the worker ends at once.")
            os._exit(128 + number)
        self._was_signalled = True
        self._end(0, f"{number.name} received")

    def _fail(self, error: WorkerError) -> None:
        self._status.fail(error)
        self._narration.tell("error", f"The worker has failed: {error.message}.", code=error.code)
        self._end(1, "The worker has failed", is_told=True)

    def _engine_failed(self, error: EngineError) -> None:
        """The engine has narrated it and told every sequence."""
        self._status.fail(error)
        if self._session is not None:
            self._session.end_jobs(error)
        self._end(1, "The engine has failed")

    def _unserved(self, http: asyncio.Task[None]) -> None:
        """The HTTP server has ended; that is a failure unless it was asked to."""
        if not http.cancelled() and (error := http.exception()) is not None:
            self._narration.tell("error", "The HTTP server has failed.", trace=error)
        self._end(1, "The HTTP server has stopped")

    async def _drain(self) -> None:
        self._status.begin_drain()
        if self._session is None:
            return
        client = self._session.client
        if not await client.wait_idle(self._config.server.shutdown_grace_seconds):
            self._narration.tell(
                "cancel", f"{client.num_admitted} jobs did not finish in time and are cancelled."
            )
            client.cancel_all()
            await client.wait_idle(_CANCEL_SECONDS)

    async def _abandon(self, start: asyncio.Task[None]) -> None:
        """Make the start end, whether it loads or announces."""
        if self._progress is not None:  # it loads
            self._progress.stop()
            _done, pending = await asyncio.wait({start}, timeout=_STEP_SECONDS)
            self.is_stuck = bool(pending)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)

    def _close(self) -> None:
        """On a thread, since it waits for the engine's."""
        if self._session is None:
            return
        try:
            self._session.close(_STEP_SECONDS)
        except TimeoutError:
            self._narration.tell("error", "The device does not answer; the engine could not be stopped.")
            self.is_stuck = True

    def _stray(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._narration.tell("error", f"A stray fault on the event loop: {context['message']}.", trace=error)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker drains before the server stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Teller(logging.Handler):
    """What libraries log as a warning or worse is narrated."""

    def __init__(self, narration: Narration) -> None:
        super().__init__(logging.WARNING)
        self._narration = narration

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        event = "error" if record.levelno >= logging.ERROR else "warning"
        self._narration.tell(event, f"{record.name}: {record.getMessage()}", trace=error)


@contextlib.contextmanager
def _told_by(narration: Narration) -> Generator[None]:
    teller = _Teller(narration)
    logging.getLogger().addHandler(teller)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(teller)
