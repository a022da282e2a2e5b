"""
A whole worker in virtual time, on one thread: everything is real but the device, the sockets and the clock.

The engine's loop runs as it is, and is what runs at first: wherever it waits (for the device, or for
commands) or hands something over, the event loop gets its turn, for as long as the wait takes or for as many
callbacks as the seed says. So each thread is seen to stop at every place where it meets the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import zlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from sim_checks import Checks
from sim_device import SimulatedRunner
from sim_director import Director
from sim_loop import NotYetError, VirtualLoop
from sim_network import Pipe
from sim_parts import Inbox, Listener, Teller, Violation, silence, told_of, uvicorn_told
from sim_plan import LONGEST, Plan
from sim_tokenizer import tokenizer

from worker_orcd.config import DeviceConfig, EngineConfig, ServerConfig, WorkerConfig
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import Output
from worker_orcd.errors import LoadError
from worker_orcd.kernels.memory import DeviceFacts
from worker_orcd.server.client import EngineClient
from worker_orcd.server.status import Status
from worker_orcd.worker import guard, loading, process, session

LAST_SECONDS = 3600.0  # nothing takes longer
MOST_EVENTS = 50  # times those that were asked for
MAX_CALLBACKS = 200_000  # of the loop; a few thousand are usual
_TAIL = 60  # events that are kept to be shown


class World:
    """One seed, from the first event to the last."""

    def __init__(self, plan: Plan, *, show: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.rng = random.Random(f"world {plan.seed}")
        self.loop = VirtualLoop(random.Random(f"loop {plan.seed}"), callback_seconds=plan.callback_seconds)
        self.num_events = 0
        self.digest = 0  # of all events: equal for equal seeds
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._show = show
        self._broken: str | None = None
        self.runner = SimulatedRunner(self)
        self.checks = Checks(self)
        self.director = Director(self)
        self.engine: Engine | None = None
        self.faults: list[Exception] = []
        self.gone: dict[int, float] = {}  # seed of a sequence -> when its client hung up
        self.cancelled_jobs: set[str] = set()
        self.duplicated: set[str] = set()  # ids of jobs that were asked for twice
        self.is_ending = False  # somebody told it to
        self.has_ended = False  # the engine's thread
        self.is_over = False  # the worker
        self.closing_at: float | None = None  # when the worker began to end
        self.last_full = -1.0
        self._ready_at: float | None = None
        self.inbox = Inbox(self)
        self.narration = Teller(self)

    # -- what the parts share ------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        return self._started._scheduler

    @property
    def _started(self) -> Engine:
        assert self.engine is not None
        return self.engine

    @property
    def pools(self) -> list[Any]:
        return [group.pool for group in self.scheduler._tables.groups]

    @property
    def client(self) -> EngineClient:
        assert self.worker._session is not None
        return self.worker._session.client

    @property
    def has_failed(self) -> bool:
        return self.worker._status.failure is not None

    @property
    def collapse_codes(self) -> set[str]:
        """What anybody may be told once the engine has ended for good."""
        failure = self.engine and self.engine._failure
        return {failure.code} if failure else set()

    @property
    def is_closing(self) -> bool:
        """The connections may be cut."""
        return self.worker._ended is not None and self.worker._ended.done()

    def was_ready_at(self, when: float) -> bool:
        return self._ready_at is not None and self._ready_at <= when

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def wrong(self, message: str) -> None:
        """Remember the first broken promise; it is raised where no code under test can catch it."""
        self._broken = self._broken or message

    @contextmanager
    def watched(self) -> Generator[None]:
        """What fails in here is a broken promise."""
        try:
            yield
        except Exception as error:
            self.wrong(told_of(error))
            if self.engine is not None and self._in_engine:
                raise Violation(self._broken) from error

    def event(self, kind: str, details: str) -> None:
        """Something happened; then everything must be in order."""
        if self._broken is not None:
            return
        self.num_events += 1
        if self.num_events > MOST_EVENTS * (self.plan.num_events + 100):
            self.wrong("it does not end")
            if self._in_engine:
                raise Violation(self._broken)
        if self.closing_at is None and self.is_closing:
            self.closing_at = self.loop.now
        line = f"{self.loop.now - 1000.0:10.6f} {kind:14} {details}"
        self.digest = zlib.crc32(
            line.partition('"started_at"')[0].encode(), self.digest
        )  # that is of a wall clock
        self.tail.append(line)
        if self._show is not None:
            self._show(line)
        if self.engine is not None and self.worker._session is not None:
            with self.watched():
                self.checks.look()
            if self.client.num_admitted + 3 > self.plan.max_queue:
                self.last_full = self.loop.now

    # -- time ----------------------------------------------------------------------------------------------

    _in_engine = False  # not in a callback of the loop

    def _step(self, until: float) -> bool:
        self._in_engine = False
        done = self.loop.step(until)
        self._in_engine = True
        if self.loop.num_callbacks > MAX_CALLBACKS:
            self.wrong("it does not end")
        if self._broken is not None:
            raise Violation(self._broken)
        return done

    def pass_time(self, until: float) -> None:
        while self.loop.now < until and self._step(until):
            pass
        self.loop.now = max(self.loop.now, until)

    def switch(self) -> None:
        """Perhaps the other thread goes on for a while."""
        if self.rng.random() < self.plan.switches:
            for _ in range(self.rng.randint(1, 4)):
                if not self._step(self.loop.now):
                    return

    def wait_for_command(self) -> None:
        """The engine sleeps until there is one."""
        while not self.inbox.commands:
            if not self.loop.is_busy:
                with self.watched():
                    self._check_nobody_waits()
            if not self._step(self.loop.now + LAST_SECONDS):
                raise Violation("everything waits, and nothing will happen")

    def _check_nobody_waits(self) -> None:
        """Nothing is computed and nothing can run: then every stream has been told its end."""
        for stream in self.client._streams.values():
            assert stream.finished, "a stream waits for an engine that has nothing to do"
            if stream.outputs:
                assert any(c.was_slow for c in self.director.callers if not c.is_over), "nobody was woken"

    # -- the life of a worker ------------------------------------------------------------------------------

    def connect(self) -> Pipe | None:
        server = self.loop.server
        if server is None or not server.is_open:
            return None
        return Pipe(self.loop, server.protocol_factory(), high_water=self.plan.high_water, wrong=self.wrong)

    def run(self) -> None:
        """Raises Violation."""
        try:
            code = self._live()
        except Violation:
            self._wind_up()
            raise
        self._check_end(code)

    def _wind_up(self) -> None:
        """Let tasks end without a word, as far as they do."""
        self._in_engine = False
        with silence():
            for _ in range(3):
                for task in asyncio.all_tasks(self.loop):
                    task.cancel()
                for _ in range(10_000):
                    if not self.loop.step(self.loop.now + 1.0):
                        break

    def _live(self) -> int:
        """The exit code."""
        self._in_engine = True
        with ExitStack() as stack:
            for owner, name, stand_in in self._stand_ins():
                stack.enter_context(patch.object(owner, name, stand_in))
            stack.enter_context(uvicorn_told(self))
            self.worker = self._make_worker()
            life = self.loop.create_task(self.worker.run(), name="life")
            self.loop.call_later(0.0, self.director.turn)
            while self.engine is None and not life.done():
                if not self._step(self.loop.now + LAST_SECONDS):
                    raise Violation("the worker never began")
            if self.engine is not None:
                self.engine._run()
                self.has_ended = True
            self.is_over = life.done()
            while not life.done() and self._step(self.loop.now + LAST_SECONDS):
                pass
            self.is_over = True
            for caller in self.director.callers:
                if not caller.is_over and caller.pipe is not None:
                    caller.pipe.abort()  # as the system does when the process is gone
            while self._step(self.loop.now + 60.0):
                pass
        return life.result()

    def _stand_ins(self) -> list[tuple[Any, str, Any]]:
        world = self

        class SimulatedEngine(Engine):
            def __init__(self, scheduler: Any, runner: Any, publish: Any, **named: Any) -> None:
                super().__init__(scheduler, runner, partial(world._publish, publish), **named)
                self._inbox = world.inbox  # type: ignore[assignment]

            def stop(self, timeout: float | None = None) -> bool:
                super().stop(timeout)
                if not world.has_ended:
                    raise NotYetError
                return True

            def start(self) -> None:
                """It runs on the one thread there is."""
                world.engine = self
                world._ready_at = world.loop.now

        class SimulatedClient(EngineClient):
            def follow(self, admission: Any, request: Any, wake: Any) -> Generator[Output | None, None, None]:
                return world._followed(self, partial(super().follow, admission, request), wake)

        nothing = SimpleNamespace(collect=lambda: None, freeze=lambda: None, unfreeze=lambda: None)
        buffered = partial(SimulatedClient, max_buffered_outputs=self.plan.max_buffered)
        return [
            (session, "gc", nothing),
            (process, "off_loop", _in_virtual_time),
            (guard, "off_loop", _in_virtual_time),
            (os, "_exit", lambda code: self.wrong(f"the process ends at once with exit code {code}")),
            (session, "EngineClient", buffered),
            (loading, "Engine", SimulatedEngine),
        ]

    def _followed(self, client: Any, follow: Any, wake: Any) -> Generator[Output | None, None, None]:
        """The same outputs. A reader that leaves too many for a whole turn must have lost its stream."""
        left = 0  # of the outputs that waited when it was last woken

        def told() -> None:
            nonlocal left
            stream = next((s for s in client._streams.values() if s.wake is told), None)
            if stream is not None:
                with self.watched():
                    assert left < self.plan.max_buffered or stream.failure, "a stream that nobody reads grows"
                left = len(stream.outputs)
            wake()

        with closing(follow(told)) as outputs:
            for output in outputs:
                left -= output is not None
                yield output

    def _publish(self, publish: Callable[[Sequence[Output]], None], outputs: list[Output]) -> None:
        with self.watched():
            self.checks.published(outputs)
        publish(outputs)
        self.event(
            "publish",
            f"{[(o.id, len(o.tokens), o.finish_reason and o.finish_reason.value) for o in outputs]}",
        )
        self.switch()

    def _make_worker(self) -> process.Worker:
        plan, world = self.plan, self
        server = ServerConfig(
            max_queue=plan.max_queue,
            keep_alive_seconds=plan.keep_alive,
            metrics_interval_ms=plan.metrics_ms,
            shutdown_grace_seconds=plan.grace,
            narration="json",
        )
        status = Status(worker_id="simulated", model_ref="none", clock=self.loop.time)

        class SimulatedWorker(process.Worker):
            async def _load(self) -> Any:
                for percent in (10.0, 100.0):
                    await asyncio.sleep(world.rng.choice((0.0, plan.gap, 5 * plan.gap)))
                    self._status.loading(percent)
                if plan.load_fails:
                    raise LoadError("the file is broken")
                return world._loaded()

        config = WorkerConfig(
            model="none", worker_id="simulated", device=DeviceConfig(device="cpu"), server=server
        )
        listener: Any = Listener()
        return SimulatedWorker(config, status, self.narration, listener, None, None, clock=self.loop.time)

    def _loaded(self) -> Any:
        plan = self.plan
        groups = [SimpleNamespace(window=window, num_blocks=number) for window, number in plan.groups]
        return SimpleNamespace(
            engine_config=EngineConfig(
                max_num_seqs=plan.max_seqs,
                max_num_batched_tokens=plan.budget,
                max_model_len=LONGEST,
                block_size=plan.block_size,
                enable_prefix_caching=plan.caching,
                decode_burst_ms=plan.burst_ms,
            ),
            plan=SimpleNamespace(
                kv_groups=groups, max_model_len=LONGEST, total_bytes=1, block_size=plan.block_size
            ),
            runner=self.runner,
            backend=SimpleNamespace(
                name="simulated",
                description="a hash",
                memory=SimpleNamespace(facts=DeviceFacts(memory_bytes=2), release=lambda: None),
            ),
            held=None,
            model_id="none",
            config=SimpleNamespace(architecture="none", context_length=LONGEST),
            quant_kind="none",
            tokenizer=tokenizer(),
            chat_template=None,
            no_chat_template="there is none",
            sha256=None,
            timings=SimpleNamespace(total=0.0),
            close=lambda: None,
        )

    # -- the end -------------------------------------------------------------------------------------------

    def _check_end(self, code: int) -> None:
        try:
            self._check_ended(code)
        except Exception as error:
            raise Violation(told_of(error)) from error

    def _check_ended(self, code: int) -> None:
        must_fail = self.plan.load_fails or self.checks.must_collapse
        assert code == 0 or must_fail, "the worker failed without a reason"
        assert code == 1 or self.is_ending, "the worker ended without a reason"
        assert code == 1 or not self.checks.must_exit_with_1, "the worker does not say that it has failed"
        assert not self.loop.strays, f"a stray fault: {self.loop.strays[0]}"
        for caller in self.director.callers:
            assert caller.is_over, f"{caller.name} waits for ever"
        if self.engine is not None:
            self.checks.over()
            assert self.client.num_admitted == 0 and not self.client._jobs and not self.client._streams
        context = self.worker.http_config.app.state.context
        assert context.bodies.held_bytes == 0, "bodies are held for ever"
        self._check_counts(context.metrics._outcomes)

    def _check_counts(self, counted: dict[str, int]) -> None:
        jobs = self.director.jobs
        unknown = sum(job.outcome in (None, "any") for job in jobs)
        assert sum(counted.values()) <= len(jobs), "requests are counted twice"
        assert sum(counted.values()) >= sum(job.is_complete for job in jobs), "requests are not counted"
        for outcome, number in counted.items():
            told = sum(job.outcome == outcome for job in jobs)
            assert told <= number <= told + unknown, (
                f"{number} requests counted as {outcome}, {told} were told"
            )


async def _in_virtual_time(work: Callable[[], Any], *, name: str) -> Any:
    """Stands in for `off_loop`."""
    return await asyncio.get_running_loop().run_in_executor(None, work)
