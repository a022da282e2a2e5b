"""Faults of the device and of memory: kernels that fail, logits that are no numbers, no memory."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_worker import FROM_START, POISON, SECONDS, Bench, FaultWorker, Innocents, Row
from worker_client import Answer, Client, Exchange, Wrong, parse_answer, require

MOST_SITES = 2000
MOST_FAILING_STEPS = 3  # in a row, of which the last ends the worker
VICTIM = {"prompt": "the victim", "temperature": 0.0, "ignore_eos": True}


async def begin_victims(client: Client, count: int, tokens: int = 3000) -> list[Exchange]:
    """Long jobs that have begun to answer."""
    jobs = [{**VICTIM, "job_id": f"victim-{i}", "max_tokens": tokens} for i in range(count)]
    exchanges = [await client.start("POST", "/execute", job) for job in jobs]
    for exchange in exchanges:
        await exchange.until_marks(2)
    return exchanges


async def ended_with(exchanges: Sequence[Exchange], code: str) -> list[Answer]:
    answers = [parse_answer(await exchange.response()) for exchange in exchanges]
    for answer in answers:
        found = (answer.error or {}).get("code")
        require(found == code, f"a victim ended with {answer.error or answer.end}, not {code}")
    return answers


# -- kernels -----------------------------------------------------------------------------------------------

STEP_FAULTS = (
    ("launch", "kernel", "INTERNAL", "a step cannot be launched"),
    ("step", "kernel", "INTERNAL", "a kernel fails in a step of decodes"),
    ("step", "memory", "VRAM_OOM", "a step runs out of memory"),
)


async def kernel(bench: Bench) -> list[Row]:
    """Two jobs run, four wait for a seat: those that run end with the code, the others never know."""
    rows: list[Row] = []
    with FaultWorker(bench, "--max-num-seqs", "2", orders={}) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            free = (await client.health())["kv_blocks_free"]
            for call, error, code, fault in STEP_FAULTS:
                victims = await begin_victims(client, 2)
                async with innocents:
                    begun = time.monotonic()
                    worker.orders.write(call, {"error": error})
                    await ended_with(victims, code)
                    await innocents.next_answer()
                    seconds = time.monotonic() - begun
                lost = innocents.require_unharmed()
                rows.append(Row(fault, f"2 jobs of that step: `{code}`", seconds, "answer", lost))
                await client.until(lambda health: health["kv_blocks_free"] == free, "blocks are back")
            rows.append(await first_step(worker, client, innocents))
        require(worker.process.poll() is None, "the worker has ended")
    return rows


async def first_step(worker: FaultWorker, client: Client, innocents: Innocents) -> Row:
    """The step that computes a prompt."""
    begun = time.monotonic()
    worker.orders.write("step", {"error": "kernel"})
    victim = await client.start("POST", "/execute", {**VICTIM, "job_id": "first", "max_tokens": 5})
    [answer] = await ended_with([victim], "INTERNAL")
    require(not answer.tokens, "a token came of a step that failed")
    await innocents.next_answer()
    seconds = time.monotonic() - begun
    return Row("a kernel fails in the step of a prompt", "that job: `INTERNAL`", seconds, "answer", "nothing")


async def device(bench: Bench) -> list[Row]:
    """What the worker does not outlive."""
    faults = (
        ({"error": "device"}, "CUDA_ERROR", "the device is lost"),
        ({"error": "kernel", "times": MOST_FAILING_STEPS}, "INTERNAL", "three steps in a row fail"),
    )
    rows: list[Row] = []
    for order, code, fault in faults:
        with FaultWorker(bench, "--max-num-seqs", "2", orders={}) as worker:
            worker.until_ready()
            async with Client(worker.port) as client:
                victims = await begin_victims(client, 2)
                waiting = [
                    await client.start("POST", "/execute", {**VICTIM, "job_id": f"w{i}", "max_tokens": 9})
                    for i in range(4)
                ]
                await client.until(lambda health: health["waiting"] == 4, "four wait")
                begun = time.monotonic()
                worker.orders.write("step", order)
                await ended_with(victims + waiting, code)
                found, seconds = await worker.ended(begun)
            require(found == 1, f"exit code {found}")
            worker.require_one_sentence(code)
            told = f"every stream: `{code}`, flushed; `failed`"
            rows.append(Row(fault, told, seconds, "exit 1", "all 6 jobs, as it must"))
    return rows


async def hang(bench: Bench) -> list[Row]:
    """A step that never ends cannot be taken back: the worker ends in bounded time when it is told to."""
    with FaultWorker(bench, "--shutdown-grace-seconds", "0.2", orders={}) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            [victim] = await begin_victims(client, 1)
            worker.orders.write("step", {"seconds": 3600})
            await asyncio.sleep(0.3)
            health = await client.health()
            require(health["running"] == 1, f"/health does not answer as it should: {health}")
            begun = worker.signal(signal.SIGTERM)
            code, seconds = await worker.ended(begun, 60)
            await ended_with([victim], "DRAINING")
        require(code == 0, f"exit code {code}")
    told = "`/health` answers; after SIGTERM the stream: `DRAINING`"
    return [Row("a step that never ends", told, seconds, f"exit {code}", "the job")]


# -- numbers -----------------------------------------------------------------------------------------------


async def numbers(bench: Bench) -> list[Row]:
    """Logits that are no numbers cost the row they are of, also where its KV blocks are used again."""
    rows: list[Row] = []
    for architecture in ("llama", "gpt-oss"):  # one without experts and windows, one with
        options = ("--kv-cache-size-mb", "4", "--max-model-len", "1024", "--max-num-seqs", "8")
        model = bench.model(architecture, poisoned=True)
        with FaultWorker(bench, *options, model=model, orders={}) as worker:
            worker.until_ready()
            async with Client(worker.port) as client:
                innocents = Innocents(client)
                await innocents.learn()
                rows.append(await poison(client, innocents, architecture))
                rows.append(await use_blocks_again(client, innocents, architecture))
                for value in ("nan", "inf") if architecture == "llama" else ():
                    worker.orders.write("row", {"seed": 666, "value": value})
                    job = {**VICTIM, "seed": 666, "max_tokens": 5}
                    rows.append(
                        await spoil(client, innocents, job, f"one logit of a row is {value} (injected)")
                    )
    return rows


async def poison(client: Client, innocents: Innocents, architecture: str) -> Row:
    prompt = [POISON + 1 + i % 50 for i in range(700)]
    prompt[20] = POISON
    job = {"prompt_token_ids": prompt, "max_tokens": 5}
    return await spoil(client, innocents, job, f"{architecture}: the embedding of a token is NaN (real)")


async def use_blocks_again(client: Client, innocents: Innocents, architecture: str) -> Row:
    """All that are free, so also those that hold NaN now."""
    total = (await client.health())["kv_blocks_total"]
    async with innocents:
        for number in range(2 + total * 16 // 700):
            job = {
                "job_id": f"fill-{number}",
                "prompt_token_ids": [POISON + 60 + number] * 700,
                "max_tokens": 2,
            }
            answer = parse_answer(await client.fetch("POST", "/execute", job))
            require(answer.error is None, f"a job in blocks that held NaN: {answer.error}")
        seconds = await innocents.next_answer()
    lost = innocents.require_unharmed()
    fault = f"{architecture}: every KV block is used again after that"
    return Row(fault, "answers as if it had never been", seconds, "answer", lost)


async def spoil(client: Client, innocents: Innocents, job: dict[str, Any], fault: str) -> Row:
    async with innocents:
        begun = time.monotonic()
        victim = await client.start("POST", "/execute", {**job, "job_id": "poisoned"})
        [answer] = await ended_with([victim], "INTERNAL")
        message = (answer.error or {})["message"]
        require("not finite numbers" in message, f"the error does not name it: {message}")
        await innocents.next_answer()
        seconds = time.monotonic() - begun
    told = "that job: `INTERNAL`, “logits that are not finite numbers”"
    return Row(fault, told, seconds, "answer", innocents.require_unharmed())


# -- memory ------------------------------------------------------------------------------------------------


async def load_memory(bench: Bench) -> list[Row]:
    """Each allocation of loading fails once; the worker says so and ends with 1."""
    with FaultWorker(bench, orders={"allocate": {"at": 0}}) as worker:
        worker.until_ready()
        count = json.loads(worker.orders.told("allocate").read_text())
    with FaultWorker(bench, orders={"each": {"count": 5 if bench.quick else count}}) as worker:
        await worker.ended(0.0, 10 * SECONDS)
        codes: list[int] = json.loads(worker.orders.told("each").read_text())
        for at, code in enumerate(codes, 1):
            log = worker.orders.told(f"each-{at}").read_text()
            require(code == 1, f"allocation {at} of {count}: exit code {code}\n{log}")
            errors = [json.loads(line) for line in log.splitlines() if '"level": "error"' in line]
            found = [error["code"] for error in errors]
            require(found == ["INSUFFICIENT_VRAM"], f"allocation {at} of {count}: {found}\n{log}")
            require("Traceback" not in log, f"allocation {at} of {count}: a traceback\n{log}")
    with FaultWorker(bench, orders={"allocate": {"at": count // 2}}) as worker:
        _code, seconds = await worker.ended(worker.begun)
    fault = f"an allocation fails while the model loads, each of {len(codes)}"
    return [Row(fault, "`INSUFFICIENT_VRAM` in a sentence", seconds, f"exit 1{FROM_START}", "the start")]


async def step_memory(bench: Bench) -> list[Row]:
    """Each call that a step makes in runner and kernels fails once, of a prompt's step and of a decode's."""
    rows: list[Row] = []
    with FaultWorker(bench, "--max-num-seqs", "1", orders={}) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client, tokens=8, seats=2)
            await innocents.learn()
            free = (await client.health())["kv_blocks_free"]
            for fault, tokens in (("prompt", 1), ("decode", 3000)):
                longest, sites = 0.0, 0
                for at in range(1, MOST_SITES, 20 if bench.quick else 1):
                    seconds = await fail_site(worker, client, at, tokens)
                    if seconds is None:
                        break
                    sites, longest = sites + 1, max(longest, seconds)
                    if at % 10 == 1:
                        await innocents.next_answer()
                        await client.until(lambda health: health["kv_blocks_free"] == free, "blocks are back")
                told = f"a step of a {fault} runs out of memory, at each of {sites} calls"
                async with innocents:
                    pass
                lost = innocents.require_unharmed()
                rows.append(Row(told, "that job: `VRAM_OOM`", longest, "the job's error", lost))
    return rows


async def fail_site(worker: FaultWorker, client: Client, at: int, tokens: int) -> float | None:
    """Seconds to the error of the job; None where the step has fewer calls than that."""
    told = worker.orders.told("site")
    told.unlink(missing_ok=True)
    job = {**VICTIM, "job_id": f"site-{at}", "max_tokens": tokens}
    begun = time.monotonic()
    if tokens == 1:
        worker.orders.write("site", {"at": at})
        victim = await client.start("POST", "/execute", job)
    else:
        victim = await client.start("POST", "/execute", job)
        await victim.until_marks(2)
        begun = time.monotonic()
        worker.orders.write("site", {"at": at})
    await client.until(lambda _health: told.exists(), "the site is reached")
    if int(told.read_text()) < at:
        victim.hang_up()
        return None
    await ended_with([victim], "VRAM_OOM")
    return time.monotonic() - begun


async def limit(bench: Bench) -> list[Row]:
    """The system gives a running worker no more memory (RLIMIT_AS), then does again."""
    with FaultWorker(bench, "--kv-cache-size-mb", "64") as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client)
            await innocents.learn()
            told = Counter[str]()
            give_memory(worker, 1 << 20)
            for number in range(16):
                job = {"job_id": f"ids-{number}", "prompt_token_ids": [10 + number] * 3500, "max_tokens": 3}
                told[await outcome(client, job)] += 1
            give_memory(worker, None)
            seconds = await innocents.next_answer()
            async with innocents:
                await asyncio.sleep(0.2)
            lost = innocents.require_unharmed()
            words = ", ".join(f"{count} {name}" for name, count in sorted(told.items()))
            fault, happened = "the system gives no more memory, then again", f"16 long prompts: {words}"
            rows = [Row(fault, happened, seconds, "answer", lost)]
            rows.append(await tokenizing(worker, client, innocents))
    return rows


def give_memory(worker: FaultWorker, num_bytes: int | None) -> None:
    """So much more than it has; None: any."""
    pid, most = worker.process.pid, resource.RLIM_INFINITY
    if num_bytes is not None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + num_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


async def tokenizing(worker: FaultWorker, client: Client, innocents: Innocents) -> Row:
    """The library that makes tokens of text may end the process when it gets no memory; then it says so."""
    fault = "likewise, while a prompt of 4 MB is made tokens of"
    give_memory(worker, 1 << 20)
    begun = time.monotonic()
    told = await outcome(client, {"prompt": "rain " * 800_000, "job_id": "text", "max_tokens": 3})
    give_memory(worker, None)
    await asyncio.sleep(2.0 if told == "cut off" else 0.0)  # it may be dying
    if worker.process.poll() is None:
        seconds = await innocents.next_answer()
        return Row(fault, f"that job: {told}", seconds, "answer", "nothing")
    code, seconds = await worker.ended(begun)
    require(code == -signal.SIGABRT, f"exit code {code}")
    require("Fatal Python error: Aborted" in worker.log(), "the process died without a word")
    happened = "the tokenizer aborts; the log says where"
    return Row(fault, happened, seconds, f"signal {-code}", "all jobs: the process ends")


async def outcome(client: Client, job: dict[str, Any]) -> str:
    """A word for what became of a job: a code, "answered", or "cut off"."""
    try:
        response = await client.fetch("POST", "/execute", job)
    except (OSError, Wrong):
        return "cut off"
    if response.status != 200:
        try:
            return f"`{response.json()['error']['code']}`"
        except ValueError:  # there was no memory for an error either
            return f"status {response.status}"
    error = parse_answer(response).error
    return "answered" if error is None else f"`{error['code']}`"
