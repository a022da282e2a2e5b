"""
What a worker promises while many use it, as checks against a real one: for `crowd.py` and its test.

Every check raises `Wrong` where the worker breaks a promise. Jobs and their order are the same in every run.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker_client import (
    Answer,
    Client,
    Exchange,
    WorkerProcess,
    parse_answer,
    require,
)

SPARE_QUEUE = 16  # places in the queue beyond the jobs of a crowd
GRACE_SECONDS = 30  # of the worker
EXIT_SECONDS = 120  # after its last answer
VICTIM_TOKENS = 2000  # of prompt
SEEN_BLOCKS = 100  # that a victim holds, and others cannot have taken or given back meanwhile

Job = dict[str, Any]  # the body of /execute, without job_id and cache_salt

_TEXT = """autumn rain falls on the old stone bridge while a grey cat sleeps by the warm kitchen stove and
letters arrive from distant harbours where ships wait for morning wind café naïve Größe 東京 🌧️ def return
int import 3.14 2025 however therefore because almost never always sometimes river mountain engine"""
_WORDS = _TEXT.split()

_STYLES: tuple[Job, ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.05},
    {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.3, "logprobs": 3},
    {"temperature": 0.0, "stop": [" the ", ".\n"], "ignore_eos": False},
    {"temperature": 0.9, "stop": [" and", ","], "logprobs": 2, "logit_bias": {"30": -4}, "ignore_eos": False},
)


def make_jobs(count: int, *, words: Sequence[int], tokens: tuple[int, int], longest: int) -> list[Job]:
    """Different prompts of about so many `words` in turn, `tokens` (least, most) to generate, every style.

    Every third prompt shares its beginning with others; every thirteenth answer is `longest`.
    """
    draw = random.Random(1)
    beginning = " ".join(draw.choices(_WORDS, k=40)) + " "
    jobs: list[Job] = []
    for i in range(count):
        length = words[i // len(_STYLES) % len(words)]
        prompt = " ".join(draw.choices(_WORDS, k=length))
        job = {"ignore_eos": True, **_STYLES[i % len(_STYLES)], "seed": 2**64 - 1 - i}
        job["max_tokens"] = longest if i % 13 == 0 else draw.randint(*tokens)
        if i % 16 == 5:
            job["messages"] = [{"role": "user", "content": prompt}]
        elif i % 16 == 10:
            job["prompt_token_ids"] = [draw.randint(1000, 40000) for _ in range(length)]
        else:
            job["prompt"] = beginning * (i % 3 == 0) + prompt
        jobs.append(job)
    return jobs


# -- equal to running alone --------------------------------------------------------------------------------


class Crowd:
    """Jobs for a worker, what they give alone, and checks that they give the same in company."""

    def __init__(self, client: Client, jobs: Sequence[Job], alone: Sequence[Answer] = ()) -> None:
        """`alone`: what they gave before, perhaps on another worker."""
        self.client = client
        self.jobs = list(jobs)
        self.alone = list(alone)
        self._num_sent = 0

    async def send(self, job: Job, salt: str) -> Exchange:
        self._num_sent += 1
        name = f"{salt}-{self._num_sent}"
        return await self.client.start("POST", "/execute", {**job, "job_id": name, "cache_salt": salt})

    async def run_alone(self) -> int:
        """Every job by itself, with a cold and with a warm prefix cache. The tokens found in the warm one."""
        cold = [parse_answer(await (await self.send(job, "alone")).response()) for job in self.jobs]
        warm = [parse_answer(await (await self.send(job, "alone")).response()) for job in self.jobs]
        self.alone = cold
        self.compare(warm, "with a warm cache, alone")
        found = sum(answer.started["cached_tokens"] for answer in warm)
        require(found > sum(answer.started["cached_tokens"] for answer in cold), "the cache never was warm")
        await self._check_texts()
        return found

    async def run_together(self, salt: str, *, among: Sequence[asyncio.Task[Any]] = ()) -> Round:
        """All jobs at once, equal to alone. `among`: what others do meanwhile."""
        began = time.monotonic()
        exchanges = await asyncio.gather(*[self.send(job, salt) for job in self.jobs])
        answers = [parse_answer(await exchange.response()) for exchange in exchanges]
        seconds = time.monotonic() - began
        self.compare(answers, f"in company, salt {salt!r}")
        for other in among:
            await other
        return Round(answers, exchanges, seconds)

    def compare(self, answers: Iterable[Answer], where: str) -> None:
        for i, (one, other) in enumerate(zip(self.alone, answers, strict=True)):
            require(other.error is None, f"job {i} {where}: {other.error}")
            require(one.outcome == other.outcome, f"job {i} {where}: {_difference(one, other)}")

    async def _check_texts(self) -> None:
        """The texts joined are what the ids stand for, cut before the stop string."""
        reasons = [(answer.end or {}).get("stop_reason") for answer in self.alone]
        require({"length", "stop"} <= set(reasons), f"not every way to end was met: {set(reasons)}")
        for i, (answer, reason) in enumerate(zip(self.alone, reasons, strict=True)):
            ids = answer.ids[:-1] if reason == "eos" else answer.ids
            body = {"tokens": ids, "skip_special_tokens": True}
            whole = (await self.client.fetch("POST", "/detokenize", body)).json()["prompt"]
            if reason == "stop":
                matched = (answer.end or {})["matched_stop"]
                require(whole.startswith(answer.text + matched), f"job {i}: {answer.text!r} of {whole!r}")
            else:
                require(whole == answer.text, f"job {i}: {answer.text!r}, its ids are {whole!r}")


def _difference(one: Answer, other: Answer) -> str:
    for a, b in zip(one.tokens, other.tokens, strict=False):
        if a != b:
            return f"token {a['i']} is {b}, not {a}"
    return f"{len(other.tokens)} tokens and {other.end}, not {len(one.tokens)} and {one.end}"


@dataclass
class Round:
    """One crowd, for the table."""

    answers: list[Answer]
    exchanges: list[Exchange]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds between the arrivals of each stream, the first aside: about one step each."""
        times = [[at for at, _ in exchange.arrivals[1:]] for exchange in self.exchanges]
        return [b - a for arrived in times for a, b in itertools.pairwise(arrived)]


# -- others ------------------------------------------------------------------------------------------------


def nonsense(context_length: int) -> list[tuple[str, str, object, int, str]]:
    """Requests that must be refused: method, path, body, the right status, a word of the message."""
    good = {"job_id": "nonsense", "prompt": "Hello", "max_tokens": 4}
    too_long = {**good, "prompt": "rain " * (context_length + 10)}
    chat = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
    return [
        ("POST", "/execute", b'{"job_id": "x", "prompt": ', 400, "JSON"),
        ("POST", "/execute", b"\xff\xfe{}", 400, ""),
        ("POST", "/execute", b"", 400, "empty"),
        ("POST", "/execute", {**good, "temperature": 7}, 400, "temperature"),
        ("POST", "/execute", {**good, "max_tokens": 0}, 400, "max_tokens"),
        ("POST", "/execute", {**good, "stop": ["a"] * 5}, 400, "stop"),
        ("POST", "/execute", {**good, "tempurature": 1}, 400, "tempurature"),
        ("POST", "/execute", b'{"job_id": "x", "prompt": "a", "top_p": NaN}', 400, "top_p"),
        ("POST", "/execute", too_long, 400, str(context_length)),
        ("POST", "/execute", {**good, "prompt_token_ids": [10**9], "prompt": None}, 400, "prompt"),
        ("POST", "/v1/chat/completions", {**chat, "n": 0}, 400, "n"),
        ("POST", "/v1/chat/completions", {**chat, "model": "another"}, 404, "another"),
        ("GET", "/execute", None, 405, ""),
        ("POST", "/nowhere", {}, 404, ""),
    ]


async def send_nonsense(client: Client, context_length: int) -> int:
    """Requests that are refused, each with the right status. The number of them."""
    cases = nonsense(context_length)
    for method, path, body, status, word in cases:
        response = await client.fetch(method, path, body)
        told = response.body.decode()
        require(response.status == status, f"{method} {path} {str(body)[:80]}: {response.status} {told}")
        require("error" in response.json() and word in told, f"the error does not name {word!r}: {told}")
    return len(cases)


async def overfill(client: Client, max_queue: int) -> int:
    """Fill the queue behind a running crowd and more, then cancel the fillers as they wait.

    Those too many are refused, the others end as cancelled. The number refused.
    """
    job = {"prompt": "Waiting is", "max_tokens": 1000, "ignore_eos": True, "priority": 5}
    names = [f"filler-{i}" for i in range(max_queue + 1)]
    fillers = [await client.start("POST", "/execute", {**job, "job_id": name}) for name in names]
    await client.until(lambda health: health["running"] + health["waiting"] == max_queue, "the queue is full")
    again = await client.fetch("POST", "/execute", {**job, "job_id": names[0]})
    require(again.status == 409 and names[0] in again.json()["error"]["message"], f"a duplicate: {again}")
    cancelled = [await client.fetch("POST", "/cancel", {"job_id": name}) for name in names]
    num_refused = 0
    for filler, told in zip(fillers, cancelled, strict=True):
        require(told.status == 202, f"cancelling: {told}")
        response = await filler.response()
        if response.status == 503:
            require(response.json()["error"]["code"] == "QUEUE_FULL", f"a full queue said {response}")
            require(int(response.headers.get("retry-after", "0")) > 0, "a full queue gave no Retry-After")
            num_refused += 1
        else:
            error = response.json()["error"] if response.status == 499 else parse_answer(response).error
            require((error or {}).get("code") == "CANCELLED", f"a cancelled job ended with {response}")
        require(told.json()["running"] == (response.status != 503), f"cancelling: {told}, {response}")
    require(num_refused, "nothing was refused by a full queue")
    return num_refused


async def make_mischief(client: Client) -> int:
    """What must disturb nobody. The number of requests refused."""
    health = await client.health()
    num_bad = await send_nonsense(client, health["context_length"])
    return num_bad + await overfill(client, health["max_queue"])


# -- blocks come back --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to end a job early."""

    name: str
    path: str = "/execute"
    streaming: bool = True
    cancels: bool = False  # by /cancel; otherwise by closing the connection
    reset: bool = False
    in_prompt: bool = False  # while the prompt is computed

    def victim(self, number: int) -> tuple[Job, str]:
        """A request that holds many blocks, and its name. Its tokens are words, but for a few.

        A warm cache makes its prompt short work; a cold one makes it last, where that is wanted.
        """
        name = f"victim-{self.name}-{number}"
        text = "rain" + " rain" * (VICTIM_TOKENS * (3 if self.in_prompt else 1))
        body: Job = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0.0, "cache_salt": "victims"}
        if self.in_prompt:
            body["cache_salt"] = name
        if self.path == "/execute":
            return {**body, "job_id": name, "prompt": text}, name
        return {**body, "messages": [{"role": "user", "content": text}], "stream": self.streaming}, name


WAYS = (
    Way("/cancel", cancels=True),
    Way("/execute closed"),
    Way("/execute reset", reset=True),
    Way("/execute closed in its prompt", in_prompt=True),
    Way("chat stream closed", "/v1/chat/completions"),
    Way("chat closed", "/v1/chat/completions", streaming=False),
)


@dataclass
class Freed:
    """How long blocks took to come back, one way; and the step that was under way meanwhile."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def late(self) -> list[float]:
        """Seconds beyond the step."""
        return [max(0.0, a - b) for a, b in zip(self.seconds, self.steps, strict=True)]


class Company:
    """Streams that go on all the time, each checked against the same job alone. Few blocks each."""

    def __init__(self, crowd: Crowd, size: int) -> None:
        short = [i for i, answer in enumerate(crowd.alone) if answer.started["prompt_tokens"] <= 64]
        require(len(short) >= size, "there are too few short jobs to keep company")
        self._crowd = crowd
        self._seats = [short[k::size] for k in range(size)]
        self._arrivals: list[Exchange] = []
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Company:
        self._tasks = [asyncio.create_task(self._sit(seat)) for seat in self._seats]
        return self

    async def __aexit__(self, *_details: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _sit(self, jobs: list[int]) -> None:
        turn = 0
        while not self._stopping:
            i = jobs[turn % len(jobs)]
            turn += 1
            exchange = await self._crowd.send(self._crowd.jobs[i], "company")
            self._arrivals.append(exchange)
            answer = parse_answer(await exchange.response())
            require(answer.outcome == self._crowd.alone[i].outcome, f"job {i} was disturbed: {answer}")

    def step(self, began: float, ended: float) -> float:
        """The longest time between two arrivals that overlaps this time: about a step."""
        times = sorted({at for exchange in self._arrivals for at, _ in exchange.arrivals})
        gaps = [b - a for a, b in itertools.pairwise(times) if b > began and a < ended]
        return max(gaps, default=0.0)


async def end_early(client: Client, freed: Freed, number: int, company: Company) -> None:
    """Start a job with many blocks, end it, and see them come back."""
    way = freed.way
    body, name = way.victim(number)
    mark = b"event: token" if way.path == "/execute" else b'"content"'
    before = (await client.health())["kv_blocks_free"]
    exchange = await client.start("POST", way.path, body, mark=mark)
    await client.until(
        lambda health: health["kv_blocks_free"] <= before - SEEN_BLOCKS, f"{name} has its blocks"
    )
    if way.streaming and not way.in_prompt:
        await exchange.until_marks(4)
    else:
        await asyncio.sleep(0.1)
    held = (await client.health())["kv_blocks_free"]
    require(not exchange.done.done(), f"{name} ended by itself: {bytes(exchange.data[-300:])!r}")
    began = time.monotonic()
    if way.cancels:
        cancelling = asyncio.create_task(client.fetch("POST", "/cancel", {"job_id": name}))
    else:
        exchange.hang_up(reset=way.reset)
    await client.until(
        lambda health: health["kv_blocks_free"] >= held + SEEN_BLOCKS, f"{name} gives them back"
    )
    ended = time.monotonic()
    if way.cancels:
        require((await cancelling).status == 202, "cancelling was refused")
        error = parse_answer(await exchange.response()).error or {}
        require(error.get("code") == "CANCELLED", f"a cancelled job ended with {error}")
    await asyncio.sleep(0.05)  # for the arrivals that end the step to be seen
    freed.seconds.append(ended - began)
    freed.steps.append(company.step(began, ended))


async def free_blocks(
    crowd: Crowd, samples: int, *, size: int = 8, ways: Sequence[Way] = WAYS
) -> list[Freed]:
    """End jobs early, in every way in turn, among others that go on as if nothing had happened."""
    results = [Freed(way) for way in ways]
    async with Company(crowd, size) as company:
        for number in range(samples):
            for freed in results:
                await end_early(crowd.client, freed, number, company)
    return results


# -- the end -----------------------------------------------------------------------------------------------


async def until_idle(client: Client, kv_blocks_free: int) -> None:
    """Every block is back, nothing runs, nothing waits."""

    def idle(health: dict[str, Any]) -> bool:
        return health["running"] + health["waiting"] == 0 and health["kv_blocks_free"] == kv_blocks_free

    await client.until(idle, f"all {kv_blocks_free} blocks come back")


async def drain(crowd: Crowd, worker: WorkerProcess, count: int) -> float:
    """SIGTERM while jobs run: they end as ever, new ones are refused, the exit status is 0. The seconds."""
    longest = sorted(range(len(crowd.jobs)), key=lambda i: -len(crowd.alone[i].tokens))[:count]
    exchanges = [await crowd.send(crowd.jobs[i], "last") for i in longest]
    for exchange in exchanges:
        await exchange.until_marks(1)
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    await crowd.client.until(lambda health: health["state"] == "draining", "the worker drains")
    refused = await crowd.client.fetch("POST", "/execute", {"job_id": "late", "prompt": "Hello"})
    code = refused.json()["error"]["code"]
    require((refused.status, code) == (503, "DRAINING"), f"a draining worker said {refused.status} {code}")
    require(int(refused.headers.get("retry-after", "0")) > 0, "a draining worker said nothing of Retry-After")
    require(not all(e.done.done() for e in exchanges), "no job was left running: use longer ones")
    for i, exchange in zip(longest, exchanges, strict=True):
        answer = parse_answer(await exchange.response())
        require(answer.outcome == crowd.alone[i].outcome, f"job {i} ended otherwise while draining: {answer}")
    answered = time.monotonic()
    while worker.process.poll() is None:
        require(time.monotonic() - answered < EXIT_SECONDS, "the worker does not exit")
        await asyncio.sleep(0.01)
    require(
        worker.process.returncode == 0, f"the exit status is {worker.process.returncode}:\n{worker.log()}"
    )
    return time.monotonic() - began
