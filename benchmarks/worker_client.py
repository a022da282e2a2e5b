"""
A real worker in a process of its own, and a client that costs little: for `crowd.py` and its test.

The client keeps the raw bytes of a response with the times they came at, and takes them apart afterwards, so
that it competes with the worker for the cores as little as it can. It reads HTTP/1.1 and server-sent events
strictly: what is not exactly as it should be is `Wrong`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import worker_orcd

HOST = "127.0.0.1"
START_SECONDS = 300.0
PATIENCE_SECONDS = 900.0  # for a response, and for what a test waits for


class Wrong(Exception):
    """The worker did not do what it should."""


def require(condition: object, what: str) -> None:
    """Raises Wrong unless the condition holds."""
    if not condition:
        raise Wrong(what)


# -- the worker --------------------------------------------------------------------------------------------


class WorkerProcess:
    """`worker-orcd serve` on a free port, ready when made. Use as a context manager."""

    def __init__(self, model: str, *options: str) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "worker_orcd", "serve", "--model", model, "--host", HOST]
        command += ["--port", str(self.port), "--narration", "json", *options]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WORKER_ORCD_")}
        paths = str(Path(worker_orcd.__file__).parents[1]), environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a GET, on a connection of its own."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        return self.get("/health")[1]

    def cpu_seconds(self) -> dict[str, float]:
        """So far: of the event loop (the main thread), of all other threads, and how long the loop has
        waited for a core.
        """
        task = Path(f"/proc/{self.process.pid}/task")
        tick = os.sysconf("SC_CLK_TCK")
        seconds = {"loop": 0.0, "others": 0.0, "loop waited": 0.0}
        for thread in task.iterdir():
            with contextlib.suppress(OSError):  # it has ended
                fields = (thread / "stat").read_text().rpartition(")")[2].split()
                name = "loop" if thread.name == str(self.process.pid) else "others"
                seconds[name] += (int(fields[11]) + int(fields[12])) / tick
                if name == "loop":
                    seconds["loop waited"] = int((thread / "schedstat").read_text().split()[1]) / 1e9
        return seconds

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            require(self.process.poll() is None, f"the worker ended before it was ready:\n{self.log()}")
            with contextlib.suppress(OSError, ValueError):
                if self.get("/ready")[0] == 200:
                    return
            time.sleep(0.05)
        raise Wrong(f"the worker was not ready after {START_SECONDS:.0f} s:\n{self.log()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


# -- HTTP --------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """What came back, taken apart. `body` has been put together where it came in chunks."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange(asyncio.Protocol):
    """One request on one connection, which the worker closes after its response.

    `arrivals` are (time.monotonic(), number of bytes); `num_marks` counts `mark` in what has come, for those
    who wait for so many tokens.
    """

    def __init__(self, request: bytes, mark: bytes) -> None:
        self._request = request
        self._mark = mark
        self._news = asyncio.Event()
        self.data = bytearray()
        self.arrivals: list[tuple[float, int]] = []
        self.num_marks = 0
        self.sent_at = self.first_mark_at = self.ended_at = 0.0
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.sent_at = time.monotonic()
        self.transport.write(self._request)  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.monotonic(), len(data)))
        self.data += data
        num_marks = data.count(self._mark)  # a mark cut in two is not counted: nobody needs it exact
        if num_marks and not self.num_marks:
            self.first_mark_at = self.arrivals[-1][0]
        self.num_marks += num_marks
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_at = time.monotonic()
        self._news.set()
        if not self.done.done():
            self.done.set_result(None)

    async def response(self) -> Response:
        """The whole response, once the worker has closed the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.done
        return parse_response(bytes(self.data))

    async def until_marks(self, count: int) -> None:
        """Wait until so many tokens have come. Raises Wrong if the response ends before that."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.num_marks < count:
                require(not self.done.done(), f"the response ended early: {bytes(self.data[-300:])!r}")
                self._news.clear()
                await self._news.wait()

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection now: in order, or by a reset as a killed client's system sends it."""
        require(self.transport is not None, "there is no connection to close")
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(  # type: ignore[union-attr]
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self.transport.abort()  # type: ignore[union-attr]


def encode_request(port: int, method: str, path: str, body: object = None, **headers: str) -> bytes:
    """A request after which the connection is closed. In the names of headers `_` stands for `-`."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    told = {"Host": f"{HOST}:{port}", "Connection": "close", "Content-Type": "application/json"}
    told |= {"Content-Length": str(len(content))}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Client:
    """Sends requests to a worker: each on a connection of its own, but /health on a lasting one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._asking: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_details: object) -> None:
        if self._asking is not None:
            self._asking[1].close()
            self._asking = None

    async def start(
        self, method: str, path: str, body: object = None, *, mark: bytes = b"event: token"
    ) -> Exchange:
        """Send a request. `body` is JSON, or bytes that are sent as they are."""
        return await self.send(encode_request(self.port, method, path, body), mark=mark)

    async def send(self, request: bytes, *, mark: bytes = b"event: token") -> Exchange:
        """Connect, and send bytes as they are."""
        loop = asyncio.get_running_loop()
        _, exchange = await loop.create_connection(lambda: Exchange(request, mark), HOST, self.port)
        return exchange

    async def fetch(self, method: str, path: str, body: object = None) -> Response:
        return await (await self.start(method, path, body)).response()

    async def health(self) -> dict[str, Any]:
        """One at a time; on a new connection if the worker has closed the last one after a long silence."""
        try:
            return await self._ask()
        except (asyncio.IncompleteReadError, ConnectionError):
            self._asking = None
            return await self._ask()

    async def _ask(self) -> dict[str, Any]:
        if self._asking is None:
            self._asking = await asyncio.open_connection(HOST, self.port)
        reader, writer = self._asking
        writer.write(f"GET /health HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")
        )
        body = await reader.readexactly(int(length))
        return parse_response(head + body).json()

    async def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Ask /health every two milliseconds until the condition holds; that body."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(body := await self.health()):
            require(time.monotonic() < deadline, f"{what}: not after {PATIENCE_SECONDS:.0f} s: {body}")
            await asyncio.sleep(0.002)
        return body


def parse_response(data: bytes) -> Response:
    """Raises Wrong for anything but one whole HTTP/1.1 response."""
    head, found, rest = data.partition(b"\r\n\r\n")
    require(found, f"there is no whole head in the response: {data[:200]!r}")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = status_line.partition(" ")
    require(version == "HTTP/1.1", f"the response begins with {status_line!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        rest = b"".join(_chunks(rest))
    else:
        length = int(headers.get("content-length", "0"))
        require(len(rest) == length, f"{len(rest)} bytes of body, content-length says {length}")
    return Response(int(status[:3]), headers, rest)


def _chunks(data: bytes) -> Iterator[bytes]:
    position = 0
    while True:
        end = data.find(b"\r\n", position)
        require(end >= 0, "the last chunk of the body is missing")
        size = int(data[position:end], 16)
        require(data[end + 2 + size : end + 4 + size] == b"\r\n", "a chunk of the body is cut")
        yield data[end + 2 : end + 2 + size]
        position = end + 4 + size
        if size == 0:
            require(position == len(data), "there are bytes after the end of the body")
            return


# -- events ------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A stream of /execute, checked for form. `outcome` is what must be equal however the job was run."""

    started: dict[str, Any]
    tokens: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return "".join([token["t"] for token in self.tokens])

    @property
    def ids(self) -> list[int]:
        return [token["id"] for token in self.tokens]

    @property
    def outcome(self) -> tuple[object, ...]:
        end = self.end or {}
        return (self.tokens, end.get("stop_reason"), end.get("matched_stop"), end.get("tokens_out"))


def events(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each event; comments are left out. Raises Wrong for a malformed frame."""
    text = body.decode("utf-8")
    require(not text or text.endswith("\n\n"), f"the last event is cut: {text[-200:]!r}")
    for frame in text.split("\n\n")[:-1]:
        if frame.startswith(":"):
            require("\n" not in frame, f"a comment with more behind it: {frame!r}")
            continue
        name, _, data = frame.partition("\n")
        well = name.startswith("event: ") and data.startswith("data: ") and "\n" not in data
        require(well, f"a malformed event: {frame[:200]!r}")
        yield name[7:], json.loads(data[6:])


def parse_answer(response: Response) -> Answer:
    """Raises Wrong unless this is one `started`, tokens in order, metrics among them, and one last event."""
    require(response.status == 200, f"status {response.status}: {response.body[:300]!r}")
    told = iter(events(response.body))
    name, data = next(told, ("nothing", {}))
    require(name == "started", f"the stream begins with {name}")
    answer = Answer(data)
    num_metrics = 0
    for name, data in told:
        require(answer.end is None and answer.error is None, f"{name} after the last event")
        match name:
            case "token":
                require(data["i"] == len(answer.tokens), f"token {data['i']} is number {len(answer.tokens)}")
                answer.tokens.append(data)
            case "metrics":
                num_metrics += 1
                require(data["tokens_out"] == len(answer.tokens), "metrics count other tokens than came")
            case "end":
                answer.end = data
                require(data["tokens_out"] == len(answer.tokens), "the end counts other tokens than came")
            case "error":
                answer.error = data
            case _:
                raise Wrong(f"an unknown event {name!r}")
    require(answer.end or answer.error, "the stream has no end")
    require(num_metrics or answer.error, "the stream has no metrics")
    return answer


# -- polling -----------------------------------------------------------------------------------------------


class HealthPoller:
    """Asks /health on one connection at a fixed rate, in a process of its own, until stopped."""

    def __init__(self, port: int, hertz: float = 50.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(port), str(hertz)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._process.stdout.readline()  # type: ignore[union-attr]  # it has begun

    def stop(self) -> list[float]:
        """Seconds that each answer took. Raises Wrong if one was not as it should be."""
        out, _ = self._process.communicate(b"stop\n", timeout=START_SECONDS)
        require(self._process.returncode == 0, f"polling /health failed: {out.decode()}")
        return json.loads(out)


def poll(port: int, hertz: float) -> list[float]:
    """Until standard input has something. A tick that an answer was too late for counts as late too."""
    import select

    with socket.create_connection((HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = f"GET /health HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()
        seconds: list[float] = []
        print("begun", flush=True)
        due = time.perf_counter()
        while True:
            due += 1 / hertz
            if select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
                return seconds
            began = time.perf_counter()
            connection.sendall(request)
            data = b""
            while not data.endswith(b"}"):  # the head comes apart from the body, which is JSON on one line
                data += connection.recv(65536) or b"}"
            took = time.perf_counter() - began
            if not (data.startswith(b"HTTP/1.1 200 ") and b'"kv_blocks_free"' in data):
                raise SystemExit(f"/health said {data[:300]!r}")
            seconds.append(took)
            while took > 1 / hertz:  # or slow answers would hide behind the questions that were not asked
                took -= 1 / hertz
                due += 1 / hertz
                seconds.append(took)


if __name__ == "__main__":
    print(json.dumps(poll(int(sys.argv[1]), float(sys.argv[2]))))
