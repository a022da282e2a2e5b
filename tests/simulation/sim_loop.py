"""
An event loop in virtual time: nothing sleeps, and who runs when is decided by the seed.

Ready callbacks run in the order in which they became ready, as asyncio promises; timers that are due at the
same moment fire in an order drawn from the seed, and a callback takes a little virtual time. What runs in an
executor takes virtual time too, and then runs on the one thread there is.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import signal
from asyncio import events
from collections import deque
from collections.abc import Callable
from typing import Any


class NotYetError(Exception):
    """Raised by what an executor runs where a thread would wait now: it is run again, a little later."""


class VirtualServer:
    """What `create_server` gives: connections are made by the simulated clients."""

    def __init__(self, protocol_factory: Callable[[], asyncio.BaseProtocol]):
        self.protocol_factory = protocol_factory
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    async def wait_closed(self) -> None:
        return


class VirtualLoop(asyncio.AbstractEventLoop):
    """What of a loop asyncio, uvicorn and the worker use. Turned by `step`."""

    def __init__(self, rng: random.Random, *, callback_seconds: float = 0.0):
        self.now = 1000.0
        self.strays: list[dict[str, Any]] = []  # what went to no exception handler
        self.server: VirtualServer | None = None
        self.num_callbacks = 0
        self._rng = rng
        self._callback_seconds = callback_seconds
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self._handler: Any = None
        self._signals: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}

    # -- turning -------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether something can run now."""
        return bool(self._ready)

    def step(self, until: float) -> bool:
        """Run one callback; where none is ready, go to the next timer up to `until`. False: there is none."""
        if not self._ready and not self._fire(until):
            return False
        handle = self._ready.popleft()
        if handle.cancelled():
            return True
        self.num_callbacks += 1
        events._set_running_loop(self)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)
        self.now += self._callback_seconds
        self._fire(self.now)
        return True

    def run_until(self, until: float) -> None:
        """Let time pass to that moment."""
        while self.now < until and self.step(until):
            pass
        self.now = max(self.now, until)

    def _fire(self, until: float) -> bool:
        while self._timers and self._timers[0][3].cancelled():
            heapq.heappop(self._timers)
        if not self._timers or self._timers[0][0] > until:
            return False
        self.now = max(self.now, self._timers[0][0])
        while self._timers and self._timers[0][0] <= self.now:
            self._ready.append(heapq.heappop(self._timers)[3])
        return True

    # -- asyncio -------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._rng.random(), self._num_timers, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is thrown away when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            events._set_running_loop(None)
            try:
                result = func(*args)
            except NotYetError:
                self.call_later(0.0005, work)
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)
            finally:
                events._set_running_loop(self)

        self.call_later(self._rng.choice((0.0, 0.0001, 0.003, 0.02)), work)
        return future

    def set_exception_handler(self, handler: Any) -> None:
        self._handler = handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.strays.append(context)
        if self._handler is not None:
            self._handler(self, context)

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        self._signals[sig] = (callback, args)

    def signal(self, sig: signal.Signals) -> None:
        """As if the process got it."""
        callback, args = self._signals[sig]
        self.call_soon(callback, *args)

    async def create_server(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        self.server = VirtualServer(protocol_factory)
        return self.server
