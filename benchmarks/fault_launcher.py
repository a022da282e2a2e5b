"""
`worker-orcd` with faults that cannot be had otherwise: `python fault_launcher.py ORDERS serve --model …`.

The process is a worker as it is, but for a few calls that look into the folder ORDERS before they do what
they do. A file there is an order (JSON) for the call of that name; it is carried out once, or `times`, and
removed by the last. What the worker then makes of it is its own code.

| order | whose call | what it does |
|---|---|---|
| `load` | a report of loaded weights beyond `fraction` | waits until the order is taken away |
| `allocate` | number `at` of the allocations of loading | raises MemoryError |
| `each` | the beginning | a process for each `at` from 1 to `count`, forked when all is imported |
| `launch`, `step` | launching a step; computing it | raises `error`, or hangs for `seconds` |
| `site` | number `at` of the calls into C that a step makes in runner and kernels | raises MemoryError |
| `row` | the draw of the sequence with seed `seed` | puts `value` among its logits |
| `pace` | every step | takes `seconds` more |
| `wall` | `time.time`, `datetime.now` | adds `seconds` |
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SITES = ("/worker_orcd/runner/", "/worker_orcd/kernels/")
WITHOUT_MEMORY = {"popleft", "len", "isinstance"}
POLL_SECONDS = 0.002
_wall = time.time


class Orders:
    """What is to go wrong now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def standing(self, name: str) -> dict[str, Any] | None:
        """The order, which stays."""
        try:
            return json.loads((self._folder / name).read_text())
        except FileNotFoundError:
            return None

    def take(self, name: str) -> dict[str, Any] | None:
        """The order, one time less."""
        order = self.standing(name)
        if order is None:
            return None
        left = order.get("times", 1) - 1
        if left > 0:
            self.write(name, order | {"times": left})
        else:
            self.drop(name)
        return order

    def write(self, name: str, order: object) -> None:
        """All of it or nothing: the other side may look at any moment."""
        part = self._folder / f".{name}"
        part.write_text(json.dumps(order))
        part.replace(self._folder / name)

    def tell(self, name: str, count: int = 0) -> None:
        """The worker is there; there were so many."""
        self.write(f"{name}.told", count)

    def drop(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).unlink()

    def told(self, name: str) -> Path:
        """Where it says so."""
        return self._folder / f"{name}.told"


def obey(order: dict[str, Any] | None) -> None:
    """Raise or hang, as ordered."""
    from worker_orcd import errors

    if order is None:
        return
    time.sleep(order.get("seconds", 0.0))
    match order.get("error"):
        case None:
            return
        case "memory":
            raise MemoryError
        case "kernel":
            raise RuntimeError("a kernel has failed")
        case "device":
            raise errors.DeviceError("the device is lost")
        case other:
            raise SystemExit(f"no such error: {other}")


# -- loading -----------------------------------------------------------------------------------------------


def slow_down_loading(orders: Orders) -> None:
    from worker_orcd.worker.progress import LOADING, LoadProgress

    report = LoadProgress.__call__

    def reported(self: LoadProgress, stage: str, done: int, total: int) -> None:
        report(self, stage, done, total)
        order = orders.standing("load")
        if order and stage == LOADING and total and done / total >= order["fraction"]:
            orders.tell("load")
            while orders.standing("load"):
                time.sleep(POLL_SECONDS)
                report(self, stage, done, total)  # who wants loading to stop says so here

    LoadProgress.__call__ = reported  # type: ignore[method-assign]


def fail_allocations(orders: Orders) -> None:
    """Of numpy, by the thread that loads: weights, KV cache, buffers, scratch."""
    import numpy as np

    order = orders.standing("allocate")
    if order is None:
        return
    count = 0

    def counting(name: str) -> None:
        original = getattr(np, name)

        def allocate(*args: Any, **named: Any) -> Any:
            nonlocal count
            if threading.current_thread().name.startswith(("load", "ThreadPool", "words")):
                count += 1
                orders.tell("allocate", count)
                if count == order["at"]:
                    raise MemoryError
            return original(*args, **named)

        setattr(np, name, allocate)

    for name in ("zeros", "empty", "array", "concatenate"):
        counting(name)


def start_for_each(orders: Orders, command_line: Callable[[], None]) -> None:
    """So that a start takes no seconds. The exit codes are told; what each says is in a file of its own."""
    order = orders.standing("each")
    if order is None:
        return
    from worker_orcd.worker import process  # noqa: F401 (for what it imports)
    from worker_orcd.worker.ahead import import_torch

    import_torch()
    from worker_orcd.worker import loading  # noqa: F401 (likewise)

    codes: list[int] = []
    for at in range(1, order["count"] + 1):
        child = os.fork()
        if child == 0:
            log = os.open(orders.told(f"each-{at}"), os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 2)
            orders.write("allocate", {"at": at})
            fail_allocations(orders)
            command_line()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    orders.write("each.told", codes)
    sys.exit(0)


# -- steps -------------------------------------------------------------------------------------------------


def fail_steps(orders: Orders) -> None:
    from worker_orcd.runner.runner import ModelRunner

    launch, build = ModelRunner.launch, ModelRunner.__init__

    def built(self: ModelRunner, *args: Any, **named: Any) -> None:
        build(self, *args, **named)
        compute: Callable[[Any], Any] = self._compiled

        def computed(counts: Any) -> Any:
            if pace := orders.standing("pace"):
                time.sleep(pace["seconds"])
            obey(orders.take("step"))
            return compute(counts)

        self._compiled = computed  # type: ignore[assignment]

    def launched(self: ModelRunner, step: Any) -> Any:
        obey(orders.take("launch"))
        return launch(self, step)

    ModelRunner.__init__ = built  # type: ignore[method-assign]
    ModelRunner.launch = launched  # type: ignore[method-assign]


def fail_sites(orders: Orders) -> None:
    """Whatever runner and kernels call during a step that is not written in Python is a site."""
    from worker_orcd.engine.engine import Engine

    turn = Engine._turn

    def turned(self: Engine) -> None:
        order = orders.take("site")
        if order is None:
            turn(self)
            return
        count = 0

        def look(frame: Any, event: str, what: Any) -> None:
            nonlocal count
            ours = event == "c_call" and any(site in frame.f_code.co_filename for site in SITES)
            if ours and what.__name__ not in WITHOUT_MEMORY:
                count += 1
                if count == order["at"]:
                    raise MemoryError

        sys.setprofile(look)
        try:
            turn(self)
        finally:
            sys.setprofile(None)
            orders.tell("site", count)

    Engine._turn = turned  # type: ignore[method-assign]


def spoil_rows(orders: Orders) -> None:
    from worker_orcd.runner.sampler import Sampler

    sample = Sampler.sample

    def sampled(self: Sampler, logits: Any, draw: Any) -> Any:
        order = orders.standing("row")
        if order and draw.params.seed == order["seed"]:
            logits = logits.copy()
            logits[len(logits) // 2] = float(order["value"])
        return sample(self, logits, draw)

    Sampler.sample = sampled  # type: ignore[method-assign]


# -- clocks ------------------------------------------------------------------------------------------------


def jump_wall_clock(orders: Orders) -> None:
    """What Python code asks; before anything else is imported."""

    def offset() -> float:
        order = orders.standing("wall")
        return order["seconds"] if order else 0.0

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Jumping:
            return cls.fromtimestamp(_wall() + offset(), tz)

        @classmethod
        def utcnow(cls) -> Jumping:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    time.time = lambda: _wall() + offset()
    datetime.datetime = Jumping  # type: ignore[misc]


def main() -> None:
    orders = Orders(Path(sys.argv.pop(1)))
    if orders.standing("wall"):
        jump_wall_clock(orders)
    from worker_orcd.cli import main as command_line

    start_for_each(orders, command_line)
    slow_down_loading(orders)
    fail_allocations(orders)
    fail_steps(orders)
    fail_sites(orders)
    spoil_rows(orders)
    command_line()


if __name__ == "__main__":
    main()
