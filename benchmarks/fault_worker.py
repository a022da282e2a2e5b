"""
Workers that faults happen to, and innocent streams that run meanwhile: for `faults.py`.

A worker is a process of its own, started by the command line (through `fault_launcher.py` where it takes
orders), with a folder for temporary files and a log of its own. Innocents run the same few jobs again and
again; every answer must be the one that the job had when it ran alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import worker_orcd
from fault_launcher import Orders
from worker_client import HOST, Answer, Client, Wrong, free_port, parse_answer, require
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.synth import shape_named, write_model

LAUNCHER = Path(__file__).with_name("fault_launcher.py")
POISON = 500  # the token whose embedding is no number
FROM_START = ", from the start of the process"
SECONDS = 120.0  # that anything may take on a busy machine


@dataclass(frozen=True)
class Row:
    """Of the table."""

    fault: str
    happened: str
    seconds: float | None  # to the next answer, or to the end of the process; None where `until` says all
    until: str  # "answer" or "exit N"
    lost: str  # what others than the named job have lost

    def cells(self) -> tuple[str, str, str, str]:
        took = self.until if self.seconds is None else f"{1000 * self.seconds:,.0f} ms to {self.until}"
        return self.fault, self.happened, took, self.lost


class Bench:
    """What cases share: a folder, models, and whether to do little of what there is much of."""

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        self.quick = quick
        self._folder = folder
        self._numbers = itertools.count()

    def fresh(self, name: str) -> Path:
        """A folder."""
        path = self._folder / f"{name}-{next(self._numbers)}"
        path.mkdir()
        return path

    def model(self, architecture: str = "llama", *, poisoned: bool = False) -> Path:
        """A tiny one. Poisoned, the embedding of `POISON` is NaN: so is what kernels compute from it."""
        path = self._folder / f"{architecture}{'-poisoned' * poisoned}.gguf"
        if path.exists():
            return path
        shape = shape_named(architecture, "tiny")
        require(shape is not None, f"{architecture} has no tiny shape")
        # Untied, or every answer would have a logit that is no number.
        write_model(path, replace(shape, tied=False, context_length=4096), "tiny", "F16", threads=1)
        if poisoned:
            with GGUFFile(path) as file:
                table = file.tensors["token_embd.weight"]
            row_bytes = table.nbytes // table.shape[0]
            with path.open("r+b") as writer:
                writer.seek(table.offset + POISON * row_bytes)
                writer.write(b"\x00\x7e" * (row_bytes // 2))
        return path


class FaultWorker:
    """`worker-orcd serve` on a free port. Nothing is waited for when it is made. A context manager."""

    def __init__(
        self,
        bench: Bench,
        *options: str,
        model: Path | None = None,
        orders: dict[str, dict[str, Any]] | None = None,
        environment: dict[str, str] | None = None,
        stderr: Any = None,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.folder = bench.fresh("worker")
        self.orders = Orders(self.folder)
        for name, order in (orders or {}).items():
            self.orders.write(name, order)
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self._log = self.folder / "log"
        command = [sys.executable, "-m", "worker_orcd"]
        if orders is not None:
            command = [sys.executable, str(LAUNCHER), str(self.folder)]
        command += ["serve", "--model", str(model or bench.model()), "--host", HOST, "--port", str(self.port)]
        command += ["--device", "cpu", "--narration", "json", "--kv-cache-size-mb", "8", *options]
        env = {k: v for k, v in os.environ.items() if not k.startswith("WORKER_ORCD_")}
        paths = str(Path(worker_orcd.__file__).parents[1]), env.get("PYTHONPATH")
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(self.temporary)}
        with self._log.open("wb") as log:
            self.begun = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log if stderr is None else stderr,
                env=env | (environment or {}),
            )

    def __enter__(self) -> FaultWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        if kind is not None:  # a promise was broken: what the worker said of it
            told = [line for line in self.log().splitlines() if '"level": "info"' not in line]
            print("\n".join(line[:500] for line in told[-20:]), file=sys.stderr)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    # -- what it says --------------------------------------------------------------------------------------

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for line in self.log().splitlines():
            with contextlib.suppress(ValueError):
                told.append(json.loads(line))
        return [event for event in told if event["event"] == name]

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            require(self.process.poll() is None, f"the worker ended, not {what}:\n{self.log()}")
            require(time.monotonic() < deadline, f"not {what} after {SECONDS:g} s:\n{self.log()}")
            time.sleep(0.005)

    def until_listening(self) -> None:
        self.until(lambda: self._answers("/health"), "listening")

    def until_ready(self) -> None:
        self.until(lambda: self._answers("/ready"), "ready")

    def until_told(self, order: str) -> None:
        self.until(self.orders.told(order).exists, f"at {order}")

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            return self.get(path)[0] == 200
        return False

    def maps(self) -> str:
        """What is in its memory."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/maps").read_text()
        return ""

    # -- how it ends ---------------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> float:
        """When it was sent."""
        self.process.send_signal(number)
        return time.monotonic()

    def exit_code(self, seconds: float = SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"the worker has not ended after {seconds:g} s:\n{self.log()}") from None

    async def ended(self, since: float, seconds: float = SECONDS) -> tuple[int, float]:
        """Exit code, and seconds since then."""
        code = await asyncio.to_thread(self.exit_code, seconds)
        return code, time.monotonic() - since

    def require_one_sentence(self, code: str, *words: str) -> str:
        """The log has an error with this code and these words and no traceback; its sentence."""
        errors = [event["sentence"] for event in self.events("error") if event.get("code") == code]
        start = f"error {code}: "  # what the command line finds before there is a worker
        errors += [line.removeprefix(start) for line in self.log().splitlines() if line.startswith(start)]
        require(errors, f"no error {code} was told:\n{self.log()}")
        require("Traceback" not in self.log(), f"a traceback was told:\n{self.log()}")
        sentence = str(errors[0])
        for word in words:
            require(word in sentence, f"the error does not say {word!r}: {sentence}")
        return sentence

    def require_no_traces(self, children: set[int]) -> None:
        """No process, no temporary file and no listening socket is left of it."""
        deadline = time.monotonic() + 10
        while (left := {pid for pid in children if is_alive(pid)}) and time.monotonic() < deadline:
            time.sleep(0.01)
        require(not left, f"processes are left: {left}")
        files = [path.name for path in self.temporary.iterdir()]
        require(not files, f"temporary files are left: {files}")

    def children(self) -> set[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = set[int]()
        with contextlib.suppress(OSError):
            for task in path.parent.parent.iterdir():
                pids |= {int(pid) for pid in (task / "children").read_text().split()}
        return pids


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# -- innocents ---------------------------------------------------------------------------------------------

INNOCENT: tuple[dict[str, Any], ...] = (
    {"prompt": "rain on the bridge", "temperature": 0.0},
    {"prompt": "a grey cat", "temperature": 0.9, "logprobs": 2},
    {"prompt": "rain on the bridge at night", "temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.1},
    {"prompt": "letters from a harbour", "temperature": 0.7, "top_k": 20},
)


class Innocents:
    """Jobs that nobody may disturb. As a context manager they run until it ends, each over and over."""

    def __init__(self, client: Client, *, tokens: int = 60, seats: int = len(INNOCENT)) -> None:
        self._client = client
        self._jobs = [
            {
                **job,
                "seed": 11 + i,
                "max_tokens": tokens,
                "ignore_eos": True,
                "logit_bias": {str(POISON): -100},
            }
            for i, job in enumerate(INNOCENT[:seats])
        ]
        self._alone: list[Answer] = []
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self.num_whole = 0
        self.ended: list[str] = []  # codes of errors
        self.num_cut = 0  # connections without an end

    async def learn(self) -> None:
        """What each job answers alone."""
        self._alone = [await self.run(number) for number in range(len(self._jobs))]
        errors = [answer.error for answer in self._alone if answer.error]
        require(not errors, f"innocents end with {errors}")

    async def run(self, number: int, name: str = "innocent") -> Answer:
        job = {**self._jobs[number], "job_id": f"{name}-{next(self._numbers)}"}
        return parse_answer(await self._client.fetch("POST", "/execute", job))

    async def next_answer(self) -> float:
        """Seconds that a fresh job takes from now to its last event, which is the right one."""
        begun = time.monotonic()
        answer = await self.run(0, "next")
        self._compare(0, answer)
        return time.monotonic() - begun

    async def __aenter__(self) -> Innocents:
        if not self._alone:
            await self.learn()
        self.num_whole, self.ended, self.num_cut, self._stopped = 0, [], 0, False
        self._tasks = [asyncio.create_task(self._over_and_over(i)) for i in range(len(self._jobs))]
        await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        self._stopped = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)

    async def _over_and_over(self, number: int) -> None:
        while not self._stopped:
            try:
                answer = await self.run(number)
            except (OSError, Wrong):
                self.num_cut += 1
                return
            if answer.error is not None:
                self.ended.append(answer.error["code"])
            else:
                self._compare(number, answer)
                self.num_whole += 1

    def _compare(self, number: int, answer: Answer) -> None:
        alone = self._alone[number].outcome
        require(answer.error is None, f"innocent {number} ended with {answer.error}")
        require(answer.outcome == alone, f"innocent {number} has another answer than alone")

    def require_unharmed(self) -> str:
        """Words for the table."""
        require(not self.ended and not self.num_cut, f"innocents ended with {self.ended}, {self.num_cut} cut")
        require(self.num_whole > 0, "no innocent has run")
        return f"nothing: {self.num_whole} answers of others as alone"
