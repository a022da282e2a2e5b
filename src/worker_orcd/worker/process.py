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
import gc
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Generator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import Command
from worker_orcd.errors import EngineError, InsufficientMemory, Internal, LoadError, WorkerError
from worker_orcd.hub import Progress
from worker_orcd.narration import Narration
from worker_orcd.server.app import create_app
from worker_orcd.server.client import EngineClient
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.protocol import uvicorn_config
from worker_orcd.server.status import CAPABILITIES, ModelFacts, Serving, Status
from worker_orcd.version import VERSION
from worker_orcd.worker.callback import announce, read_token
from worker_orcd.worker.listening import address_of, listen, uri_of
from worker_orcd.worker.priority import answer_first, give_way
from worker_orcd.worker.progress import LoadProgress, LoadStopped

if TYPE_CHECKING:
    from worker_orcd.runner.plan import MemoryPlan
    from worker_orcd.worker.loading import LoadedModel

WORKER_TYPE = "gguf"
_CANCEL_SECONDS = 2.0  # for streams to say that they were cancelled
_CLOSE_SECONDS = 3.0  # for connections to close
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
    ) -> None:
        self._config = config
        self._narration = narration
        self._listener = listener
        self._token = token
        self._drawing = drawing or contextlib.nullcontext
        self._status = status
        self._metrics = Metrics(self._status)
        app = create_app(
            config.server,
            self._status,
            self._metrics,
            narration=narration,
            request_shutdown=lambda: self._end(0, "Somebody asked for it"),
        )
        self.http_config = uvicorn_config(app, config.server)
        self.http_config.timeout_graceful_shutdown = int(_CLOSE_SECONDS)
        self._progress: LoadProgress | None = None
        self._loaded: LoadedModel | None = None
        self._engine: Engine | None = None
        self._client: EngineClient | None = None
        self._ended: asyncio.Future[int] | None = None
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
        self._narration.tell("shutdown", f"The worker has stopped with exit code {code}.", exit_code=code)
        return code

    # -- beginning -----------------------------------------------------------------------------------------

    async def _start(self, uri: str) -> None:
        """Load, open for jobs, announce. Whatever goes wrong ends the worker."""
        try:
            self._loaded = loaded = await self._load()
            if self._ended is None or self._ended.done():  # told to stop meanwhile
                return
            self._open(loaded, uri)
            await announce(
                self._config.callback, self._token, self._announcement(loaded, uri), self._narration
            )
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

    async def _load(self) -> LoadedModel:
        """The loaded model, loaded in a thread of its own: nothing waits for it if it hangs."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[LoadedModel] = loop.create_future()

        def on_percent(percent: float) -> None:
            loop.call_soon_threadsafe(self._status.loading, percent)

        def settle(loaded: LoadedModel | None, error: BaseException | None) -> None:
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
                from worker_orcd.worker.loading import (
                    load,
                )  # here: torch takes seconds, and HTTP is up already

                with self._drawing() as draw:
                    progress = self._progress = LoadProgress(self._narration, on_percent, draw)
                    loaded = load(
                        self._config,
                        warn=self._narration.warn,
                        on_progress=progress,
                        on_plan=self._tell_plan,
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
        from worker_orcd.worker.loading import start_engine

        loop = asyncio.get_running_loop()
        # What loading left behind lives as long as the process: keep the collector from walking it again and
        # again while streams wait.
        gc.collect()
        gc.freeze()

        def send(command: Command) -> None:
            engine.send(command)

        def on_failure(error: EngineError) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(self._engine_failed, error)

        client = EngineClient(send, loop=loop, max_queue=self._config.server.max_queue)
        engine = start_engine(
            loaded,
            client.publish,
            self._metrics,
            narration=self._narration,
            on_failure=on_failure,
        )
        if loaded.backend.name != "cuda" and engine.native_id is not None:
            give_way(engine.native_id)  # and with it the kernels' threads, which it has yet to start
        self._engine, self._client = engine, client
        self._tell_loaded(loaded)
        if loaded.backend.name == "cpu-reference":
            self._status.degraded = "the fast CPU kernels are not available; a slow reference runs instead"
        self._status.loaded(
            Serving(
                model_id=loaded.model_id,
                facts=_facts(loaded),
                tokenizer=loaded.tokenizer,
                chat_template=loaded.chat_template,
                no_chat_template=loaded.no_chat_template,
                client=client,
                snapshot=lambda: engine.snapshot,
            )
        )
        bound = address_of(self._listener)
        self._narration.tell(
            "ready",
            f"Ready after {self._status.uptime_seconds:.1f} s: {loaded.model_id} on {bound}.",
            uri=uri,
            context_length=loaded.plan.max_model_len,
        )

    def _tell_plan(self, plan: MemoryPlan) -> None:
        """On the thread that loads."""
        pretty = self._narration.is_pretty
        self._narration.tell(
            "memory_plan",
            f"The model takes {plan.weights_bytes / _MIB:,.0f} MiB of weights and"
            f" {plan.workspace_bytes / _MIB:,.0f} MiB of workspace on {plan.device};"
            f" {plan.kv_cache_bytes / _MIB:,.0f} MiB of KV cache are reserved and filled as needed.",
            bytes=None if pretty else {what: num_bytes for what, num_bytes, _remark in plan.rows()},
            max_model_len=None if pretty else plan.max_model_len,
        )
        width = max(len(what) for what, _bytes, _remark in plan.rows())
        self._narration.show(
            f"  {what:<{width}}{num_bytes / _MIB:>14,.1f} MiB  {remark}"
            for what, num_bytes, remark in plan.rows()
        )

    def _tell_loaded(self, loaded: LoadedModel) -> None:
        self._narration.learn(device=loaded.backend.name)
        self._narration.tell(
            "model_load_complete",
            f"{loaded.model_id} ({loaded.config.architecture}, {loaded.quant_kind}) is loaded on"
            f" {loaded.backend.name}: {loaded.backend.description}.",
            seconds=round(loaded.timings.total, 3),
        )

    def _announcement(self, loaded: LoadedModel, uri: str) -> dict[str, object]:
        return {
            "worker_id": self._status.worker_id,
            "model_ref": self._status.model_ref,
            "memory_bytes": loaded.plan.total_bytes,
            "memory_architecture": "vram-only" if loaded.backend.name == "cuda" else "host-memory",
            "uri": uri,
            "worker_type": f"{WORKER_TYPE}-{'cuda' if loaded.backend.name == 'cuda' else 'cpu'}",
            "capabilities": list(CAPABILITIES),
        }

    # -- ending --------------------------------------------------------------------------------------------

    def _end(self, code: int, sentence: str, *, is_told: bool = False) -> None:
        """The first reason to end decides the exit code. `is_told`: there is no more to say than that."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(code)
            running = 0 if self._client is None else self._client.num_admitted
            grace = self._config.server.shutdown_grace_seconds
            left = f"; {running} jobs have {grace:g} s to finish" if running else ""
            if running or not is_told:
                self._narration.tell("shutdown", f"{sentence}: shutting down{left}.", running=running)

    def _signalled(self, number: signal.Signals) -> None:
        if self._ended is None or self._ended.done():
            self._narration.tell("shutdown", f"{number.name} again: the worker ends at once.")
            os._exit(128 + number)
        self._end(0, f"{number.name} received")

    def _fail(self, error: WorkerError) -> None:
        self._status.fail(error)
        self._narration.tell("error", f"The worker has failed: {error.message}.", code=error.code)
        self._end(1, "The worker has failed", is_told=True)

    def _engine_failed(self, error: EngineError) -> None:
        """The engine has narrated it and told every sequence."""
        self._status.fail(error)
        if self._client is not None:
            self._client.fail(error)
        self._end(1, "The engine has failed")

    def _unserved(self, http: asyncio.Task[None]) -> None:
        """The HTTP server has ended; that is a failure unless it was asked to."""
        if not http.cancelled() and (error := http.exception()) is not None:
            self._narration.tell("error", "The HTTP server has failed.", trace=error)
        self._end(1, "The HTTP server has stopped")

    async def _drain(self) -> None:
        self._status.begin_drain()
        if self._client is None:
            return
        if not await self._client.wait_idle(self._config.server.shutdown_grace_seconds):
            cancelled = self._client.num_admitted
            self._narration.tell("cancel", f"{cancelled} jobs did not finish in time and are cancelled.")
            self._client.cancel_all()
            await self._client.wait_idle(_CANCEL_SECONDS)

    async def _abandon(self, start: asyncio.Task[None]) -> None:
        """Make the start end, whether it loads or announces."""
        if self._loaded is None and self._progress is not None:
            self._progress.stop()
            _done, pending = await asyncio.wait({start}, timeout=_STEP_SECONDS)
            self.is_stuck = bool(pending)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)

    def _close(self) -> None:
        """On a thread, since it waits for the engine's."""
        if self._engine is not None and not self._engine.stop(_STEP_SECONDS):
            self._narration.tell("error", "The device does not answer; the engine could not be stopped.")
            self.is_stuck = True
        elif self._loaded is not None:
            self._loaded.close()

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


def _facts(loaded: LoadedModel) -> ModelFacts:
    plan = loaded.plan
    return ModelFacts(
        architecture=loaded.config.architecture,
        quant_kind=loaded.quant_kind,
        tokenizer_kind=loaded.tokenizer.kind,
        vocab_size=loaded.tokenizer.vocab_size,
        context_length=plan.max_model_len,
        trained_context_length=loaded.config.context_length,
        device=f"{loaded.backend.name}, {loaded.backend.description}",
        memory_bytes_used=plan.total_bytes,
        memory_bytes_total=psutil.virtual_memory().total,
        kv_block_size=plan.block_size,
        model_sha256=loaded.sha256,
    )
