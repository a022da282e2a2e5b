"""A server without a model: application, client, tokenizer and template are real, the engine recites."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from worker_orcd.clock import MONOTONIC
from worker_orcd.config import ServerConfig
from worker_orcd.engine.messages import Command, EngineSnapshot, GroupBlocks, Output, StepStats, Submit
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.narration import Narration
from worker_orcd.sequence import FinishReason, SampledToken
from worker_orcd.server.app import create_app
from worker_orcd.server.client import EngineClient
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.protocol import BoundedProtocol, uvicorn_config
from worker_orcd.server.status import ModelFacts, Serving, Status
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_LENGTH = 512


def byte_letters() -> list[str]:
    """The 256 letters by which byte-level vocabularies write bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """256 bytes, two merges and three control tokens: ids below 256 are bytes."""
    letters = byte_letters()
    tokens = [*letters, "he", "ll", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return load_tokenizer(
        Metadata(
            {
                "general.architecture": "llama",
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "smollm",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": np.array([1] * 258 + [3] * 3),
                "tokenizer.ggml.merges": ["h e", "l l"],
                "tokenizer.ggml.bos_token_id": 258,
                "tokenizer.ggml.eos_token_id": 259,
                "tokenizer.ggml.add_bos_token": False,
            }
        )
    )


@pytest.fixture(scope="session")
def chat_template() -> Iterator[ChatTemplate]:
    template = ChatTemplate(CHATML)
    yield template
    template.close()


@dataclass(eq=False)
class Recital:
    """One sequence: the tokens it will give, one a step, or a last output in place of one."""

    submit: Submit
    script: list[int | Output]
    position: int = 0


class Reciter:
    """Stands in for the engine: same thread, same messages, but the answers are written in advance."""

    def __init__(self, answer: list[int], *, num_blocks: int = 100) -> None:
        self.answer: Callable[[Submit], list[int | Output]] = lambda _: list(answer)
        self.publish: Callable[[list[Output]], None] = lambda _: None
        self.observer: Any = None
        self.step_seconds = 0.0005
        self.go = threading.Event()  # cleared: everything waits
        self.go.set()
        self.submitted: list[Submit] = []
        self.cancelled: list[int] = []
        self.snapshot = EngineSnapshot(kv_groups=_groups(num_blocks, num_blocks))
        self._num_blocks = num_blocks
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._running: dict[int, Recital] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        if isinstance(command, Submit):
            self.submitted.append(command)
        else:
            self.cancelled.append(command.id)
        self._inbox.put(command)

    def stop(self) -> None:
        self.go.set()
        self._inbox.put(None)
        self._thread.join(60)

    def _run(self) -> None:
        while True:
            busy = bool(self._running) and self.go.is_set()
            with contextlib.suppress(queue.Empty):
                while True:
                    command = self._inbox.get(timeout=None if not self._running else 0 if busy else 0.01)
                    if command is None:
                        return
                    self._take(command)
                    busy = busy or self.go.is_set()
            if self.go.is_set() and self._running:
                time.sleep(self.step_seconds)
                self._step()

    def _take(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._running[command.id] = Recital(command, self.answer(command))
        elif self._running.pop(command.id, None) is not None:
            self.publish([Output(command.id, finish_reason=FinishReason.CANCELLED)])
        self._note()

    def _step(self) -> None:
        outputs = [self._next(recital) for recital in tuple(self._running.values())]
        rows = len(outputs)
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.id]
        self._note()
        if self.observer is not None:
            self.observer.on_step(_stats(rows, self.snapshot))
        self.publish(outputs)

    def _next(self, recital: Recital) -> Output:
        submit = recital.submit
        item = recital.script[recital.position % len(recital.script)]
        if submit.deadline is not None and time.monotonic() >= submit.deadline:
            return Output(submit.id, finish_reason=FinishReason.DEADLINE)
        if isinstance(item, Output):
            return Output(submit.id, item.tokens, 0, item.finish_reason, item.error_code, item.error)
        recital.position += 1
        finish = None
        if item in submit.stop_token_ids and recital.position > submit.min_tokens:
            finish = FinishReason.STOP
        elif recital.position == submit.max_tokens:
            finish = FinishReason.LENGTH
        token = SampledToken(item, *_logprobs(item, submit.sampling.logprobs))
        return Output(submit.id, (token,), 16, finish, queue_seconds=0.001)

    def _note(self) -> None:
        self.snapshot = EngineSnapshot(
            num_running=len(self._running),
            num_waiting=0,
            kv_groups=_groups(self._num_blocks - len(self._running), self._num_blocks),
        )


def _groups(free: int, total: int) -> tuple[GroupBlocks, ...]:
    """A fifth of the blocks belongs to layers with a window; they are the last to be held."""
    windowed = total // 5
    return (
        GroupBlocks(window=None, free=free - windowed, total=total - windowed),
        GroupBlocks(window=128, free=windowed, total=windowed),
    )


def _logprobs(token: int, asked: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if asked is None:
        return None, ()
    return -0.25, tuple(((token + k) % 256, -0.25 - k) for k in range(asked))


def _stats(rows: int, snapshot: EngineSnapshot) -> StepStats:
    return StepStats(
        seconds=0.001,
        num_rows=rows,
        num_tokens=rows,
        num_prompt_tokens=0,
        num_sampled=rows,
        num_preempted=0,
        prefix_query_tokens=2,
        prefix_hit_tokens=1,
        num_running=snapshot.num_running,
        num_waiting=0,
        kv_groups=snapshot.kv_groups,
    )


@dataclass
class World:
    """One worker's server side. `log` holds its narration."""

    config: ServerConfig
    status: Status
    metrics: Metrics
    engine: Reciter
    client: EngineClient
    app: Any
    log: io.StringIO
    shutdowns: list[bool]
    serving: Serving
    protocol: type[BoundedProtocol] = BoundedProtocol
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def http(self, **options: Any) -> httpx.AsyncClient:
        """In process: no sockets, whole responses."""
        options.setdefault("base_url", "http://127.0.0.1:8080")
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, **options)

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[int]:
        """On a loopback socket, served by uvicorn as in production. Gives the port."""
        config = uvicorn_config(self.app, self.config)
        config.port, config.http, config.timeout_graceful_shutdown = 0, self.protocol, 1
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await task

    def narrated(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def count(self, name: str) -> float:
        """The value of one line of /metrics, such as `worker_requests_total{outcome="success"}`."""
        lines = self.metrics.exposition().decode().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])


@pytest.fixture
async def world(tokenizer: Tokenizer, chat_template: ChatTemplate) -> AsyncIterator[Callable[..., World]]:
    """Makes a World; settings of ServerConfig, `template=None` for a model without one, `loaded=False`, and
    `vocabulary` for a tokenizer of another kind.
    """
    engines: list[Reciter] = []

    def make(
        *,
        template: ChatTemplate | None = chat_template,
        vocabulary: Tokenizer = tokenizer,
        loaded: bool = True,
        **settings: Any,
    ) -> World:
        buffered = settings.pop("max_buffered_outputs", 4096)
        clock = settings.pop("clock", MONOTONIC)
        settings.setdefault("metrics_interval_ms", 3_600_000)  # only at the end, however slow a stream is
        config = ServerConfig(**settings)
        status = Status(worker_id="w-1", model_ref="small.gguf")
        metrics = Metrics(status)
        engine = Reciter([*tokenizer.encode("hello world"), 259])
        engines.append(engine)
        client = EngineClient(
            engine.send,
            loop=asyncio.get_running_loop(),
            max_queue=config.max_queue,
            max_buffered_outputs=buffered,
        )
        engine.publish, engine.observer = client.publish, metrics
        log = io.StringIO()
        shutdowns: list[bool] = []
        app = create_app(
            config,
            status,
            metrics,
            narration=Narration("json", stream=log, log_prompts=config.log_prompts),
            request_shutdown=lambda: shutdowns.append(True),
            clock=clock,
        )
        serving = Serving(
            model_id="small",
            facts=FACTS,
            tokenizer=vocabulary,
            chat_template=template,
            client=client,
            snapshot=lambda: engine.snapshot,
        )
        if loaded:
            status.loaded(serving)
        return World(config, status, metrics, engine, client, app, log, shutdowns, serving)

    yield make
    for engine in engines:
        engine.stop()


FACTS = ModelFacts(
    architecture="llama",
    quant_kind="Q4_1",
    tokenizer_kind="gguf-bpe",
    vocab_size=261,
    context_length=CONTEXT_LENGTH,
    device="cpu, 1 thread",
    memory_bytes_used=1000,
    memory_bytes_total=2000,
    kv_block_size=16,
    trained_context_length=2048,
)


def read_events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream: (name, data); comments left out."""
    events = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        fields = dict(line.split(": ", 1) for line in lines)
        data = fields["data"]
        events.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


@pytest.fixture
def events_of() -> Callable[[str], list[tuple[str, Any]]]:
    return read_events


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Any]:
    """Waits until something is so, for a minute at most."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.002)

    return wait
