"""
What `soak.py` sees of a worker from outside: how soon it answers /health, and what its process takes.

    python benchmarks/soak_probe.py PORT PID

prints a line of JSON each second until standard input ends. A process of its own, with one thread that waits
for nothing else, so that what the clients do in theirs (collecting garbage, reading long answers) is not
measured as if the worker had been slow. /health and an echo server, which does next to nothing on a plain
asyncio loop in a third process, are asked by turns, each every 100 ms: what the echo takes as well is the
machine's doing, or this process's own wait for a core.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from worker_client import HOST, require

PERIOD = 0.1  # seconds between questions
PERIODS_A_LINE = 10
TIMEOUT_SECONDS = 60.0  # for one answer: the worker hangs
ECHOED = b"e" * 255 + b"\n"


@dataclass
class Sample:
    """A second of a worker's life. Seconds, bytes, counts; None: not told."""

    at: float
    health: list[float] = field(default_factory=list[float])  # how long each answer took
    echo: list[float] = field(default_factory=list[float])
    rss: int = 0
    anonymous: int = 0  # of rss: what is no file
    threads: int = 0
    files: int = 0
    running: int = 0
    waiting: int = 0
    free: int = 0  # KV blocks
    status: str = ""
    device_bytes: int | None = None  # that the worker says it holds
    gpu_bytes: int | None = None  # that the driver says are taken, by everybody


@dataclass(frozen=True)
class Look:
    """A worker's process when it has nothing to do."""

    threads: int
    files: int
    connections: int


def look(pid: int) -> Look:
    process = psutil.Process(pid)
    connections = [one for one in process.net_connections("tcp") if one.status != psutil.CONN_LISTEN]
    return Look(process.num_threads(), process.num_fds(), len(connections))


class Line:
    """A connection that is asked one thing after the other."""

    def __init__(self, port: int, request: bytes, is_whole: Callable[[bytes], bool]) -> None:
        self._connection = socket.create_connection((HOST, port), timeout=TIMEOUT_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request, self._is_whole = request, is_whole

    def ask(self) -> tuple[float, bytes]:
        """Seconds and answer."""
        began = time.perf_counter()
        self._connection.sendall(self._request)
        data = b""
        while not self._is_whole(data):
            received = self._connection.recv(65536)
            require(received, f"the connection was closed after {data[:200]!r}")
            data += received
        return time.perf_counter() - began, data


def with_late_ones(seconds: float) -> list[float]:
    """A late answer, and those to the questions that it kept from being asked: they would have been late."""
    found = [seconds]
    while (seconds := seconds - PERIOD) > 0:
        found.append(seconds)
    return found


def watch(port: int, pid: int, echo_port: int) -> None:
    """Until standard input ends."""
    request = f"GET /health HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()
    health = Line(port, request, lambda data: data.endswith(b"}"))  # JSON on one line, apart from the head
    echo = Line(echo_port, ECHOED, lambda data: data.endswith(b"\n"))
    process = psutil.Process(pid)
    due, body = time.monotonic(), b""
    while True:
        sample = Sample(time.time())
        for _ in range(PERIODS_A_LINE):
            for line, found in ((health, sample.health), (echo, sample.echo)):
                due = max(due + PERIOD / 2, time.monotonic())
                if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
                    return
                seconds, answer = line.ask()
                found += with_late_ones(seconds)
                body = answer if line is health else body
        complete(sample, process, body)
        print(json.dumps(asdict(sample)), flush=True)


def complete(sample: Sample, process: psutil.Process, answer: bytes) -> None:
    """With what the process takes, and what its last answer said."""
    head, _, body = answer.partition(b"\r\n\r\n")
    require(head.startswith(b"HTTP/1.1 200 "), f"/health said {head[:200]!r}")
    told: dict[str, Any] = json.loads(body)
    memory = process.memory_info()
    sample.rss, sample.anonymous = memory.rss, memory.rss - getattr(memory, "shared", 0)
    sample.threads, sample.files = process.num_threads(), process.num_fds()
    sample.running, sample.waiting = told["running"], told["waiting"]
    sample.free, sample.status = told["kv_blocks_free"], told["status"]
    sample.device_bytes, sample.gpu_bytes = told["vram_bytes_used"], told["gpu"].get("memory_used_bytes")


async def serve_echo() -> None:
    """Prints its port; ends when it is killed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()

    server = await asyncio.start_server(answer, HOST, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    if sys.argv[1:] == ["echo"]:
        asyncio.run(serve_echo())
        return
    port, pid = map(int, sys.argv[1:])
    with subprocess.Popen([sys.executable, __file__, "echo"], stdout=subprocess.PIPE) as echo:
        try:
            watch(port, pid, int(echo.stdout.readline()))  # type: ignore[union-attr]
        finally:
            echo.kill()


if __name__ == "__main__":
    main()
