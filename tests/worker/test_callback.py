"""The ready callback, against a server that answers as told."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.config import CallbackConfig
from worker_orcd.errors import Internal, InvalidConfiguration
from worker_orcd.narration import Narration
from worker_orcd.worker.callback import announce, read_token

BODY = {"worker_id": "w1", "uri": "http://localhost:1", "memory_bytes": 3, "capabilities": ["execute"]}


class Manager:
    """Answers with the given statuses, one a connection; 0 hangs up, None never answers. Then always 200."""

    def __init__(self, *statuses: int | None) -> None:
        self.statuses = list(statuses)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.pauses: list[float] = []
        self.answering: list[asyncio.Task[None]] = []
        self.log = io.StringIO()
        self.url = ""

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering = asyncio.create_task(self.answer_if_asked(reader, writer))
        self.answering.append(answering)
        await answering

    async def answer_if_asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A client may give up before it has asked."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self.answer(reader, writer)
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append((head[0], headers, body))
        status = self.statuses.pop(0) if self.statuses else 200
        if status is None:
            await reader.read()  # until the client gives up
        elif status:
            location = "location: http://localhost:1/elsewhere\r\n" if status == 307 else ""
            writer.write(f"HTTP/1.1 {status} X\r\n{location}content-length: 0\r\n\r\n".encode())
        writer.close()
        await writer.wait_closed()

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def announce(self, token: str | None = None, **settings: Any) -> None:
        config = CallbackConfig(url=self.url, **settings)
        await announce(config, token, BODY, Narration("json", stream=self.log), self.pause)


@asynccontextmanager
async def manager(*statuses: int | None) -> AsyncIterator[Manager]:
    made = Manager(*statuses)
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/pool/ready"
    try:
        yield made
    finally:
        server.close()
        await asyncio.gather(*made.answering)
        await server.wait_closed()


async def test_the_body_and_the_token_arrive():
    async with manager() as m:
        await m.announce(token="t0ken")
    [(line, headers, body)] = m.requests
    assert line == "POST /pool/ready HTTP/1.1" and body == BODY
    assert headers["authorization"] == "Bearer t0ken" and headers["content-type"] == "application/json"
    assert "t0ken" not in m.log.getvalue()


async def test_without_a_token_there_is_no_authorization():
    async with manager() as m:
        await m.announce()
    assert "authorization" not in m.requests[0][1]


async def test_what_may_be_over_is_tried_again_with_growing_pauses():
    async with manager(503, 0, 429, 500) as m:
        await m.announce(attempts=5)
    assert len(m.requests) == 5 and len(m.pauses) == 4
    for pause, longest in zip(m.pauses, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert longest / 2 <= pause <= longest
    assert m.log.getvalue().count('"warning"') == 8  # level and event


async def test_attempts_come_to_an_end():
    async with manager(*[503] * 9) as m:
        with pytest.raises(Internal, match=r"it answered 503 \(attempt 3\)"):
            await m.announce(attempts=3)
    assert len(m.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 307])
async def test_a_refusal_is_final(status: int):
    async with manager(status) as m:
        with pytest.raises(Internal, match=str(status)):
            await m.announce(attempts=5)
    assert len(m.requests) == 1 and not m.pauses


async def test_an_answer_must_come_in_time():
    async with manager(None, None) as m:
        with pytest.raises(Internal, match="no answer in time"):
            await m.announce(attempts=2, timeout_seconds=0.05)


async def test_nobody_there_is_tried_again():
    async with manager() as m:
        pass
    with pytest.raises(Internal, match="no connection"):
        await m.announce(attempts=2)
    assert len(m.pauses) == 1


async def test_what_is_no_url_is_said_without_its_secrets():
    with pytest.raises(InvalidConfiguration, match="not a URL") as caught:
        await announce(
            CallbackConfig(url="http://user:secret@[abc/ready"), None, BODY, Narration(stream=io.StringIO())
        )
    assert "secret" not in str(caught.value)


async def test_no_url_no_call():
    async with manager() as m:
        await announce(CallbackConfig(), None, BODY, Narration("json", stream=m.log), m.pause)
    assert not m.requests


def test_the_token_is_one_word(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("  t0ken\n")
    assert read_token(CallbackConfig(token_file=file)) == "t0ken"
    assert read_token(CallbackConfig()) is None
    for content in (b"", b"two words", b"line\nline", "\u00fc".encode()):
        file.write_bytes(content)
        with pytest.raises(InvalidConfiguration, match="one printable ASCII word") as caught:
            read_token(CallbackConfig(token_file=file))
        assert "words" not in str(caught.value)
    with pytest.raises(InvalidConfiguration, match="cannot be read"):
        read_token(CallbackConfig(token_file=tmp_path))


async def test_an_answer_a_byte_at_a_time_is_not_waited_for():
    """Each byte comes within the time limit; all of them never do."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for byte in "HTTP/1.1 200 OK\r\nx: " + "y" * 400:
                writer.write(byte.encode())
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    await announced(drip, r"no answer in time \(attempt 2\)")


async def test_a_body_without_an_end_is_not_read():
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 X\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                await writer.drain()
        writer.close()

    await announced(flood, r"it answered 503 \(attempt 2\)")


async def announced(answer: Any, failure: str) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(answer(reader, writer)))
        await tasks[-1]

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    config = CallbackConfig(
        url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", attempts=2, timeout_seconds=0.3
    )

    async def no_pause(_seconds: float) -> None: ...

    async with asyncio.timeout(5):
        with pytest.raises(Internal, match=failure):
            await announce(config, None, BODY, Narration("json", stream=io.StringIO()), no_pause)
        server.close()
        await asyncio.gather(*tasks)
