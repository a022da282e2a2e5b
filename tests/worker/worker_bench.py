"""What the tests of the worker share: a tiny model that speaks, and a worker that lives in this process."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import httpx
from text_vocabularies import tiny_spm
from tiny_models import Tiny, TinyFile

from worker_orcd.worker.process import Worker

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tiny_file(**changes: Any) -> TinyFile:
    """A llama of two layers that speaks bytes, a, b and ab. `changes` replace metadata; None drops a key."""
    words = tiny_spm()
    vocabulary = {key: words.raw(key) for key in words if key.startswith("tokenizer.")}
    metadata = vocabulary | {"tokenizer.chat_template": TEMPLATE} | changes
    return TinyFile(Tiny(architecture="llama", vocab=265, tied=True, metadata=metadata))


@dataclass
class Running:
    """A worker that lives in this process."""

    worker: Worker
    client: httpx.AsyncClient
    log: io.StringIO
    task: asyncio.Task[int]

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [event for event in told if name in (None, event["event"])]

    async def health(self) -> dict[str, Any]:
        return (await self.client.get("/health")).json()

    async def until_ready(self) -> None:
        async with asyncio.timeout(120):
            while (await self.client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)

    async def exit_code(self) -> int:
        async with asyncio.timeout(120):
            return await self.task

    def job(self, name: str, **fields: Any) -> AbstractAsyncContextManager[httpx.Response]:
        body = {"job_id": name, "prompt": "ab", "ignore_eos": True, "seed": 7, **fields}
        return self.client.stream("POST", "/execute", json=body)


Start = Callable[..., AbstractAsyncContextManager[Running]]


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each server-sent event."""
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])
