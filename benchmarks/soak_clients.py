"""
Clients of `soak.py`: each lives by a seed of its own and does one thing after the other, well or badly.

What a worker says is checked as it comes, and what it must have counted is written into a `Ledger`. Nothing
that a client meets ends the soak: it is noted as wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from crowd_checks import nonsense
from soak_asks import EXECUTE, Ask, Subject, ask_anything, ask_long, ask_subject, code_of, outcome_of
from worker_client import HOST, Client, Exchange, Response, Wrong, encode_request, parse_response, require

_TEXT = "rain bridge cat stove letter harbour ship wind café naïve Größe 東京 🌧️ return 3.14 river"
WORDS = _TEXT.split()
ABSENT = ""  # the outcome of what was no job to the worker
UNKNOWN = frozenset({"success", "cancelled", "timeout", "rejected", ABSENT})  # nobody waited for it
PATIENCE_SECONDS = 600.0  # for one answer
SMALL_BUFFER = 4096  # bytes that the system of a slow reader takes for it
MOST_SHOWN = 50  # of what was wrong
WAVE_SECONDS = 40.0  # from calm to crowded and back
CALM_SHARE = 0.25  # of the clients that are there in calm times


@dataclass
class Ledger:
    """What all clients have seen. `may_be`: by correlation id, what the worker may have counted it as."""

    may_be: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    num_wrong: int = 0

    def note(self, ask: Ask, outcome: str) -> None:
        self.may_be[ask.id] = frozenset({outcome, ABSENT} if outcome == "rejected" else {outcome})
        self.counts[outcome] += 1
        if outcome == "success" and ask.alone is not None:
            self.counts["compared"] += 1
            self.counts["compared, greedy"] += ask.body["temperature"] == 0

    def note_wrong(self, what: str) -> None:
        self.num_wrong += 1
        if len(self.wrong) < MOST_SHOWN:
            self.wrong.append(what[:500])


@dataclass
class Town:
    """What the clients have in common."""

    port: int
    seed: int
    num_clients: int
    subjects: Sequence[Subject]
    context_length: int
    began: float
    until: float  # nothing is begun later
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def longest_stop(self) -> float:
        """Seconds that a reader stops for at most: more than the worker has patience for, in a long soak."""
        return min(45.0, (self.until - self.began) / 6)

    def share_present(self, now: float) -> float:
        """The clients come and go in waves, so that the queue is full, and is not."""
        wave = min(WAVE_SECONDS, (self.until - self.began) / 2)
        up = (1 - math.cos(2 * math.pi * (now - self.began) / wave)) / 2
        return CALM_SHARE + (1 - CALM_SHARE) * up


async def run_clients(town: Town) -> None:
    """All of them, until each has ended what it began."""
    async with Client(town.port) as client:
        visitors = [Visitor(town, client, number) for number in range(town.num_clients)]
        await asyncio.gather(*[visitor.live() for visitor in visitors])


class Visitor:
    """One client."""

    def __init__(self, town: Town, client: Client, number: int) -> None:
        self._town, self._client, self._number = town, client, number
        self._draw = random.Random(f"{town.seed} {number}")
        self._num_asked = 0
        self._was_refused = False

    async def live(self) -> None:
        town, draw = self._town, self._draw
        acts, weights = list(ACTS), list(ACTS.values())
        while (now := time.monotonic()) < town.until:
            if self._number >= town.num_clients * town.share_present(now):
                await asyncio.sleep(0.2)
                continue
            (act,) = draw.choices(acts, weights)
            name = act.__name__
            town.ledger.counts[f"did {name}"] += 1
            self._was_refused = False
            try:
                await act(self)
            except (Wrong, OSError, TimeoutError, ValueError, LookupError) as problem:
                town.ledger.note_wrong(f"{name}: {type(problem).__name__}: {problem}")
            # who was refused comes again after a while, as a full queue says
            await asyncio.sleep(draw.uniform(0.2, 1.0) if self._was_refused else draw.expovariate(20))

    # asking

    def _name(self) -> str:
        self._num_asked += 1
        return f"soak-{self._number}-{self._num_asked}"

    def _subject(self, path: str | None = None) -> Ask:
        return ask_subject(self._draw, self._name(), self._draw.choice(self._town.subjects), path=path)

    async def _start(self, ask: Ask) -> Exchange:
        self._town.ledger.may_be[ask.id] = UNKNOWN  # until it is known
        return await self._client.send(ask.encode(self._town.port), mark=ask.mark)

    async def _settle(self, ask: Ask, exchange: Exchange) -> str:
        async with asyncio.timeout(PATIENCE_SECONDS):
            response = await exchange.response()
        outcome = outcome_of(ask, response)
        self._was_refused = outcome == "rejected"
        self._town.ledger.note(ask, outcome)
        return outcome

    async def _fetch(self, method: str, path: str, body: object = None) -> Response:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._client.fetch(method, path, body)

    async def _a_while(self, exchange: Exchange) -> None:
        """Until some tokens have come, or for some time, or until the end."""
        num_marks, seconds = self._draw.choice((0, 1, 5, 30)), self._draw.expovariate(1)
        with contextlib.suppress(Wrong, TimeoutError):  # it has ended; it takes longer
            async with asyncio.timeout(seconds):
                await exchange.until_marks(num_marks)

    # doing well

    async def read_it(self) -> None:
        """A subject, in any way; mostly it is as alone."""
        ask = self._subject()
        await self._settle(ask, await self._start(ask))

    async def read_anything(self) -> None:
        ask = ask_anything(self._draw, self._name(), WORDS)
        await self._settle(ask, await self._start(ask))

    async def look_around(self) -> None:
        """What costs little."""
        messages = [{"role": "user", "content": "Hi"}]
        method, path, body, statuses = self._draw.choice(LOOKS)
        if path == "/apply-template":
            body = {"messages": messages}
        response = await self._fetch(method, path, body)
        require(response.status in statuses, f"{path}: {response.status} {response.body[:200]!r}")

    # ending early

    async def cancel_it(self) -> None:
        ask = self._subject(EXECUTE) if self._draw.random() < 0.5 else self._long()
        ask.may.add("CANCELLED")
        exchange = await self._start(ask)
        await self._a_while(exchange)
        for _ in range(self._draw.choice((1, 1, 3))):
            told = await self._fetch("POST", "/cancel", {"job_id": ask.id})
            require(told.status == 202, f"cancelling: {told.status}")
        await self._settle(ask, exchange)

    async def hang_up(self) -> None:
        ask = self._draw.choice((self._subject, self._anything, self._long))()
        exchange = await self._start(ask)
        await self._a_while(exchange)
        self._leave(exchange)

    def _leave(self, exchange: Exchange) -> None:
        """In order or not, if it has not ended by itself."""
        if not exchange.done.done():
            exchange.hang_up(reset=self._draw.random() < 0.5)
            self._town.ledger.counts["hung up"] += 1

    def _long(self) -> Ask:
        return ask_long(self._draw, self._name(), WORDS)

    def _anything(self) -> Ask:
        return ask_anything(self._draw, self._name(), WORDS)

    # reading badly

    async def read_slowly(self) -> None:
        """Less than the worker sends, for some seconds; then all of it."""
        ask = self._long()
        ask.may.add("CANCELLED")  # if too much of it waits
        exchange = await self._start_slow(ask)
        until = time.monotonic() + self._draw.uniform(0.1, 0.5) * self._town.longest_stop
        while not exchange.done.done() and time.monotonic() < until:
            exchange.transport.pause_reading()  # type: ignore[union-attr]
            await asyncio.sleep(self._draw.uniform(0.1, 0.5))
            exchange.transport.resume_reading()  # type: ignore[union-attr]
            await asyncio.sleep(0)
        await self._settle(ask, exchange)

    async def stop_reading(self) -> None:
        """For longer than the worker waits, perhaps, and then it is gone."""
        ask = self._long()
        exchange = await self._start_slow(ask)
        await self._a_while(exchange)
        if not exchange.done.done():
            exchange.transport.pause_reading()  # type: ignore[union-attr]
            await asyncio.sleep(self._draw.choice((0.1, 0.4, 1.0)) * self._town.longest_stop)
        self._leave(exchange)

    async def _start_slow(self, ask: Ask) -> Exchange:
        """On a connection that holds little in the kernel."""
        loop = asyncio.get_running_loop()
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self._town.ledger.may_be[ask.id] = UNKNOWN
        try:
            await loop.sock_connect(connection, (HOST, self._town.port))
            request = ask.encode(self._town.port)
            _, exchange = await loop.create_connection(lambda: Exchange(request, ask.mark), sock=connection)
        except BaseException:
            connection.close()
            raise
        return exchange

    # sending badly

    async def send_in_pieces(self) -> None:
        """All of it in the end, or a part and then nothing."""
        ask, draw = self._subject(), self._draw
        data = ask.encode(self._town.port)
        cuts = sorted(draw.randrange(1, len(data)) for _ in range(draw.choice((1, 3, 8))))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        is_cut = draw.random() < 0.3
        self._town.ledger.may_be[ask.id] = UNKNOWN
        exchange = await self._client.send(b"", mark=ask.mark)
        for piece in pieces[: -1 if is_cut else None]:
            exchange.transport.write(piece)  # type: ignore[union-attr]
            await asyncio.sleep(draw.uniform(0, 0.2))
        if not is_cut:
            await self._settle(ask, exchange)
            return
        if draw.random() < 0.2:  # until the worker has had enough of it: 10 or 30 seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._town.longest_stop):
                    await asyncio.shield(exchange.done)
        self._leave(exchange)

    async def talk_nonsense(self) -> None:
        """JSON that is refused, with the right status and a word that says why."""
        method, path, body, status, word = self._draw.choice(nonsense(self._town.context_length))
        name = self._name()
        if isinstance(body, dict) and "job_id" in body:
            body = {**body, "job_id": name}
        self._town.ledger.may_be[name] = frozenset({"rejected", ABSENT})
        request = encode_request(self._town.port, method, path, body, X_Correlation_Id=name)
        async with asyncio.timeout(PATIENCE_SECONDS):
            response = await (await self._client.send(request)).response()
        if response.status == 503:
            require(code_of(response) == "QUEUE_FULL", f"{path}: {response.body[:200]!r}")
        else:
            require(response.status == status, f"{path}: {response.status} instead of {status}")
            require(word in response.body.decode(), f"the error does not name {word!r}")
        self._town.ledger.counts["refused as nonsense"] += 1

    async def send_garbage(self) -> None:
        """What is hardly HTTP. 0: the connection is closed without an answer."""
        name, data, statuses = self._draw.choice(garbage(self._town.port))
        exchange = await self._client.send(data)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await exchange.done
        status = parse_response(bytes(exchange.data)).status if exchange.data else 0
        require(status in statuses, f"{name}: {status}, {bytes(exchange.data[:200])!r}")
        self._town.ledger.counts["refused as garbage"] += 1

    async def ask_twice(self) -> None:
        """Under a job_id that is in use, perhaps."""
        first, second = self._long(), self._subject(EXECUTE)
        second.body["job_id"] = first.id
        second.may.add("INVALID_REQUEST")
        exchange = await self._start(first)
        await asyncio.sleep(self._draw.uniform(0, 0.1))
        await self._settle(second, await self._start(second))
        self._leave(exchange)


Act = Callable[[Visitor], Awaitable[None]]
ACTS: dict[Act, float] = {  # how often each is done
    Visitor.read_it: 50,
    Visitor.read_anything: 8,
    Visitor.look_around: 6,
    Visitor.cancel_it: 8,
    Visitor.hang_up: 8,
    Visitor.read_slowly: 2,
    Visitor.stop_reading: 2,
    Visitor.send_in_pieces: 5,
    Visitor.talk_nonsense: 6,
    Visitor.send_garbage: 4,
    Visitor.ask_twice: 2,
}
LOOKS: list[tuple[str, str, object, set[int]]] = [
    ("GET", "/", None, {200}),
    ("GET", "/livez", None, {200}),
    ("GET", "/ready", None, {200, 503}),
    ("GET", "/metrics", None, {200}),
    ("GET", "/v1/models", None, {200}),
    ("POST", "/tokenize", {"prompt": "Hello wörld " * 50}, {200}),
    ("POST", "/detokenize", {"tokens": [5, 6, 7, 300]}, {200}),
    ("POST", "/apply-template", None, {200}),
    ("POST", "/cancel", {"job_id": "nobody's"}, {202}),
]


def garbage(port: int) -> list[tuple[str, bytes, set[int]]]:
    """(what it is, bytes, statuses that are right)."""
    body = json.dumps({"job_id": "garbage", "prompt": "x", "max_tokens": 1}).encode()
    host = f"Host: {HOST}:{port}\r\n".encode()

    def post(**headers: str) -> bytes:
        return encode_request(port, "POST", EXECUTE, body, **headers)

    chunked = b"POST /execute HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    chunked += b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    get = b"GET /livez HTTP/1.1\r\n" + host
    return [
        ("no HTTP", bytes(range(256)), {400}),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        ("no Host", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", {400}),
        ("two Hosts", get + host + b"Connection: close\r\n\r\n", {400}),
        ("another Host", b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", {403}),
        ("a header without a colon", get + b"nonsense\r\n\r\n", {400}),
        # Whoever is still sending when the connection is closed may lose the answer.
        ("large headers", get + b"X-A: " + b"a" * (80 << 10) + b"\r\n\r\n", {0, 431}),
        ("no length", post(Content_Length="a lot"), {400}),
        ("a length of a gigabyte", post(Content_Length=str(10**9)), {413}),
        ("plain text", post(Content_Type="text/plain"), {415}),
        ("compressed", post(Content_Encoding="gzip"), {415}),
        ("a page of another origin", post(Origin="http://evil.example"), {403}),
        ("a bad chunk", chunked + b"zz\r\n{}\r\n0\r\n\r\n", {0, 400}),
        ("two requests at once", 2 * (get + b"Connection: close\r\n\r\n"), {200}),
    ]
