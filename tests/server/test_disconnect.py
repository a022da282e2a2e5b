"""Work that is done for a client, and a client that hangs up meanwhile."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from fastapi import Request

from worker_orcd.errors import Cancelled
from worker_orcd.server.disconnect import unless_gone
from worker_orcd.server.peer import PEER


class Client:
    """As the server sees it: as a peer, or by ASGI alone."""

    def __init__(self, *, as_peer):
        self.on_gone = None
        self._gone = asyncio.Event()
        extensions = {PEER: self} if as_peer else {}
        self.request = Request({"type": "http", "extensions": extensions}, self.receive)

    @property
    def has_gone(self):
        return self._gone.is_set()

    def hang_up(self):
        self._gone.set()
        if self.on_gone is not None:
            self.on_gone()

    async def receive(self):
        await self._gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture(params=[True, False], ids=["peer", "asgi"])
async def client(request):
    return Client(as_peer=request.param)


class Work:
    """Lasts until `go`, or for ever; `ended` says how."""

    def __init__(self):
        self.go = asyncio.Event()
        self.ended = None

    async def __call__(self):
        try:
            await self.go.wait()
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        return self.ended


async def begin(client, work):
    task = asyncio.create_task(unless_gone(client.request, work))
    await asyncio.sleep(0.01)
    return task


async def test_work_is_done(client):
    work = Work()
    task = await begin(client, work)
    work.go.set()
    assert await task == "done"
    client.hang_up()
    await asyncio.sleep(0.01)
    assert client.on_gone is None and work.ended == "done"


async def test_work_for_nobody_is_cancelled(client):
    work = Work()
    task = await begin(client, work)
    client.hang_up()
    with pytest.raises(Cancelled, match="the client closed the connection"):
        await task
    assert work.ended == "cancelled"


async def test_who_has_gone_before_wants_nothing(client):
    client.hang_up()
    work = Work()
    with pytest.raises(Cancelled):
        async with asyncio.timeout(60):
            await unless_gone(client.request, work)
    assert work.ended == "cancelled"


async def test_what_is_done_at_once_is_kept_though_the_client_has_gone(client):
    client.hang_up()

    async def work():
        return 1

    assert await unless_gone(client.request, work) == 1
    await asyncio.sleep(0.01)  # and nothing that comes later is cancelled


async def test_cancelling_from_outside_is_not_taken_for_the_client(client):
    work = Work()
    task = await begin(client, work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended == "cancelled" and client.on_gone is None


async def test_both_at_once_end_the_task(client):
    work = Work()
    task = await begin(client, work)
    client.hang_up()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_fault_of_the_work_is_raised(client):
    async def work():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        raise ZeroDivisionError

    task = await begin(client, work)
    client.hang_up()
    with pytest.raises(ZeroDivisionError):
        await task
