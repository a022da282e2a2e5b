"""A loaded model, the engine on it, and the client that the server talks to, from opening to close."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

from worker_orcd.clock import MONOTONIC, Clock
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import Command, EngineSnapshot, StepObserver, Submit
from worker_orcd.errors import EngineError, NotReady, WorkerError
from worker_orcd.narration import Narration
from worker_orcd.server.client import EngineClient
from worker_orcd.server.status import ModelFacts, Serving
from worker_orcd.worker.priority import give_way

if TYPE_CHECKING:
    from worker_orcd.worker.loading import LoadedModel


class EngineLink:
    """What the server holds of an engine. Once cut, it holds nothing: a request that is slow to go away must
    not keep the device's memory.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def send(self, command: Command) -> None:
        if self.engine is not None:
            self.engine.send(command)
        elif isinstance(command, Submit):
            raise NotReady("the model has been given up for now")

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot() if self.engine is None else self.engine.snapshot

    def cut(self) -> Engine | None:
        """The engine that was linked."""
        engine, self.engine = self.engine, None
        return engine


class Session:
    """Owns the loaded model and its engine. On the event loop, but for `close`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_queue: int,
        observer: StepObserver,
        narration: Narration,
        on_failure: Callable[[EngineError], None],
        clock: Clock = MONOTONIC,
    ) -> None:
        """`on_failure` is called on the event loop."""
        from worker_orcd.worker.loading import start_engine  # here: it brings torch

        loop = asyncio.get_running_loop()
        # What loading left behind lives until the end, and walking all of it stops every thread for half a
        # second or more. This once it is walked, before streams wait; then the collector leaves it alone.
        gc.collect()
        gc.freeze()

        def failed(error: EngineError) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(on_failure, error)

        self._loaded: LoadedModel | None = loaded
        self._link = link = EngineLink()
        self.client = EngineClient(link.send, loop=loop, max_queue=max_queue)
        engine = start_engine(
            loaded, self.client.publish, observer, narration=narration, on_failure=failed, clock=clock
        )
        link.engine = engine
        if loaded.backend.name != "cuda" and engine.native_id is not None:
            give_way(engine.native_id)  # and with it the kernels' threads, which it has yet to start
        self._serving = Serving(
            model_id=loaded.model_id,
            facts=facts_of(loaded),
            tokenizer=loaded.tokenizer,
            chat_template=loaded.chat_template,
            no_chat_template=loaded.no_chat_template,
            client=self.client,
            snapshot=link.snapshot,
        )

    @property
    def serving(self) -> Serving:
        return self._serving

    @property
    def snapshot(self) -> EngineSnapshot:
        return self._link.snapshot()

    def end_jobs(self, error: WorkerError) -> None:
        """Every job ends with this error, and so does whatever comes."""
        self.client.fail(error)

    def close(self, seconds: float) -> int | None:
        """Stop the engine, free the device, end the template's process. On a thread, since it waits.

        Bytes that are still allocated on the device, None where that is not counted. Raises TimeoutError for
        a device that does not answer; then nothing is freed.
        """
        engine, loaded = self._link.engine, self._loaded
        if engine is not None and not engine.stop(seconds):
            raise TimeoutError("the device does not answer")
        self._link.cut()
        self._loaded = None
        if loaded is None:
            return None
        loaded.close()
        memory = loaded.backend.memory
        del engine, loaded
        gc.unfreeze()  # or what refers to itself, as a compiled step does, would stay
        gc.collect()
        return memory.release()


def facts_of(loaded: LoadedModel) -> ModelFacts:
    plan, device = loaded.plan, loaded.backend.memory.facts
    return ModelFacts(
        architecture=loaded.config.architecture,
        quant_kind=loaded.quant_kind,
        tokenizer_kind=loaded.tokenizer.kind,
        vocab_size=loaded.tokenizer.vocab_size,
        context_length=plan.max_model_len,
        trained_context_length=loaded.config.context_length,
        device=f"{loaded.backend.name}, {loaded.backend.description}",
        memory_bytes_used=plan.total_bytes if loaded.held is None else loaded.held.total_bytes,
        memory_bytes_total=device.memory_bytes,
        kv_block_size=plan.block_size,
        model_sha256=loaded.sha256,
        sm=device.sm,
        cuda_runtime_version=device.cuda_runtime_version,
    )
