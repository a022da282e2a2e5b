"""
What a token costs on its way from the engine to a client: the worker's server without a model.

    python benchmarks/http_cost.py                                  # 1, 64 and 256 streams of /execute
    python benchmarks/http_cost.py --against ../old/src --rounds 5  # beside another version, by turns
    python benchmarks/http_cost.py --streams 64 --profile           # and where the event loop's time goes

Engine, scheduler, event loop, application and sockets are the real ones, in a process of their own; in
place of the model a runner recites text, a token a row, a step every `--step-ms`. The client is another
process. Streams begin together; when all have had a token, everything is counted for `--seconds`. With
`--tokens` whole jobs of so many are counted instead, from the first request to the last answer; `begun ms` is
how long it takes until the last of those that come together has its first token. CPU time is each thread's
own (system calls included; `kernel us` is what they take of both), so that a busy machine changes it little;
tokens a second it does change. `gap ms` is what 99 of 100 times between two reads of one stream stay below: a
server that falls behind is cheap, since it writes many tokens at once, but it shows here. A token that has
not come is not counted, though it was computed. Of chat and completions chunks are counted, which hold as
many tokens as came at once: with `--burst-ms` use `--tokens`. Runs are alternated, and medians printed; of
jobs `--batches` are alternated between servers that both run, and lower quartiles printed: what a busy
machine adds differs from second to second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import io
import itertools
import json
import os
import pstats
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

import worker_orcd
from worker_client import HOST, Client, Exchange, require
from worker_orcd.config import EngineConfig, ServerConfig
from worker_orcd.engine.block_tables import CacheGroup
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.messages import EngineSnapshot
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.narration import Narration
from worker_orcd.sequence import RowResult, SampledToken, Step
from worker_orcd.server.app import create_app
from worker_orcd.server.client import EngineClient
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.protocol import uvicorn_config
from worker_orcd.server.status import ModelFacts, Serving, Status
from worker_orcd.synth.vocabulary import tokenizer_metadata
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = 20000
CONTEXT = 1 << 17
MAX_STREAMS = 512
TEXT = (
    "The rain had stopped before the morning came, and over the roofs of the town a thin mist was standing, "
    "as if somebody had breathed on a window - then the bells of St. Jürgen began: 1, 2, 3 … 7 times. "
)


# -- the worker --------------------------------------------------------------------------------------------


class Recital:
    """One step of a runner that knows all answers in advance."""

    def __init__(self, results: list[RowResult], due: float) -> None:
        self._results = results
        self._due = due

    def wait(self) -> Sequence[RowResult]:
        if (left := self._due - time.monotonic()) > 0:
            time.sleep(left)
        return self._results


class ReciteRunner:
    """Gives every sequence the same text. As on a GPU, a round of a step takes `step_seconds`, and a step
    begins when it is launched or when the one before it is over.
    """

    max_steps = 2
    max_draws = 16

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        ids = tokenizer.encode(TEXT, add_special=False)
        top = tuple((token, -0.5 - k) for k, token in enumerate(ids[:5])) if args.logprobs else ()
        self._tokens = [SampledToken(token, -0.25 if args.logprobs else None, top) for token in ids]
        self._step_seconds = args.step_ms / 1000
        self._num_launches = args.launches
        self._due = 0.0  # when the last step is over
        self.num_steps = 0

    def launch(self, step: Step) -> Recital:
        seconds = self._step_seconds * step.num_rounds
        due = self._due = max(self._due, time.monotonic()) + seconds
        tokens, count = self._tokens, len(self._tokens)
        self.num_steps += 1
        for _ in range(self._num_launches * step.num_rounds):
            time.sleep(0)  # lets go of the interpreter's lock and wants it back
        results: list[RowResult] = []
        for row in step.rows:
            results += [tokens[(row.end + k) % count] for k in range(row.num_draws)] or [None]
        return Recital(results, due)


class EngineThread:
    """The engine as a worker runs it."""

    def __init__(
        self, runner: ReciteRunner, client: EngineClient, metrics: Metrics, burst_seconds: float
    ) -> None:
        config = EngineConfig(max_num_seqs=MAX_STREAMS, max_num_batched_tokens=4096)
        scheduler = Scheduler(config, [CacheGroup(BlockPool(MAX_STREAMS * 600), None)])
        self._runner = runner
        self._engine = Engine(
            scheduler, runner, client.publish, observer=metrics, burst_seconds=burst_seconds
        )
        self._engine.start()
        self.send = self._engine.send

    @property
    def snapshot(self) -> EngineSnapshot:
        return self._engine.snapshot

    def counts(self) -> dict[str, float]:
        """CPU seconds and steps so far."""
        clock = time.pthread_getcpuclockid(self._engine._thread.ident)  # type: ignore[arg-type]
        return {"engine": time.clock_gettime(clock), "steps": self._runner.num_steps}


class Worker:
    """Everything that a worker has but the model."""

    def __init__(self, args: argparse.Namespace, loop: asyncio.AbstractEventLoop, port: int) -> None:
        words = tokenizer_metadata("qwen2", VOCABULARY)
        tokenizer = load_tokenizer(Metadata({"general.architecture": "qwen2", **words}))
        config = ServerConfig(host=HOST, port=port, max_queue=MAX_STREAMS, narration="json")
        status = Status(worker_id="cost", model_ref="none")
        metrics = Metrics(status)
        narration = Narration("json", stream=io.StringIO())
        self.client = EngineClient(lambda c: self.engine.send(c), loop=loop, max_queue=MAX_STREAMS)
        runner = ReciteRunner(tokenizer, args)
        self.engine = EngineThread(runner, self.client, metrics, args.burst_ms / 1000)
        app = create_app(config, status, metrics, narration=narration, request_shutdown=lambda: None)
        self.http_config = uvicorn_config(app, config)
        status.loaded(
            Serving(
                model_id="none",
                facts=ModelFacts(
                    architecture="none", quant_kind="none", tokenizer_kind=tokenizer.kind,
                    vocab_size=tokenizer.vocab_size, context_length=CONTEXT, device="none",
                    memory_bytes_used=0, memory_bytes_total=0, kv_block_size=16,
                ),
                tokenizer=tokenizer,
                chat_template=ChatTemplate(str(words["tokenizer.chat_template"])),
                client=self.client,
                snapshot=lambda: self.engine.snapshot,
            )
        )  # fmt: skip

    def counts(self) -> dict[str, float]:
        """So far: CPU seconds of loop and engine, and steps."""
        clock = time.pthread_getcpuclockid(threading.main_thread().ident)  # type: ignore[arg-type]
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        kernel = int(fields[12]) / os.sysconf("SC_CLK_TCK")
        counts = {"loop": time.clock_gettime(clock), "kernel": kernel, "at": time.monotonic()}
        return counts | self.engine.counts()


def serve(args: argparse.Namespace) -> None:
    """Until standard input ends; answers a line there with the counts, as JSON."""
    sys.setswitchinterval(args.switch_ms / 1000)
    listener = socket.create_server((HOST, 0), backlog=1024)
    listener.setblocking(False)
    profile = cProfile.Profile()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        worker = Worker(args, loop, listener.getsockname()[1])
        gc.collect()
        gc.freeze()  # as a worker does it when the model is loaded
        server = uvicorn.Server(worker.http_config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]

        def listen() -> None:
            for line in sys.stdin:
                if args.profile:
                    loop.call_soon_threadsafe(profile.disable if line == "end\n" else profile.enable)
                print(json.dumps(worker.counts()), flush=True)
            os._exit(0)

        threading.Thread(target=listen, daemon=True).start()
        print(listener.getsockname()[1], flush=True)
        await server.serve([listener])

    def dump() -> None:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(32)

    if args.profile:
        os_exit = os._exit
        os._exit = lambda code: (dump(), os_exit(code))  # type: ignore[assignment,return-value,func-returns-value]
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(run())


class ServerProcess:
    """A process that runs `serve` with the given source directory."""

    def __init__(self, source: Path, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", "--step-ms", str(args.step_ms)]
        command += ["--burst-ms", str(args.burst_ms), "--launches", str(args.launches)]
        command += ["--switch-ms", str(args.switch_ms)]
        command += ["--profile"] * args.profile + ["--logprobs"] * args.logprobs
        environment = os.environ | {"PYTHONPATH": str(source)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.port = int(self._line())

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_details: object) -> None:
        self._process.communicate()

    def counts(self, word: str) -> dict[str, float]:
        self._process.stdin.write(word + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self._line())

    def _line(self) -> str:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        require(line, "the server has ended")
        return line


# -- the client --------------------------------------------------------------------------------------------

PROMPT = list(range(1000, 1128))
BODIES: dict[str, tuple[str, bytes, Callable[[int], dict[str, Any]]]] = {
    "execute": ("/execute", b"event: token", lambda n: {"job_id": f"j{n}", "prompt_token_ids": PROMPT}),
    "completions": ("/v1/completions", b"data: ", lambda _: {"prompt": "It was", "stream": True}),
    "chat": (
        "/v1/chat/completions",
        b"data: ",
        lambda _: {"messages": [{"role": "user", "content": "How was it?"}], "stream": True},
    ),
}


def body(args: argparse.Namespace, number: int) -> dict[str, Any]:
    logprobs: dict[str, Any] = {}
    if args.logprobs:
        logprobs = {"logprobs": True, "top_logprobs": 5} if args.api == "chat" else {"logprobs": 5}
    stop = {"stop": ["\n\nUser:", "<|done|>"]} if args.stop else {}
    length = {"max_tokens": args.tokens or 100_000, "ignore_eos": True}
    return {**BODIES[args.api][2](number), **length, **logprobs, **stop}


async def measure(server: ServerProcess, size: int, args: argparse.Namespace) -> dict[str, float]:
    """One run of `size` streams: microseconds a token, tokens a second, writes a token."""
    path, mark, _ = BODIES[args.api]
    async with Client(server.port) as client:

        async def start() -> list[Exchange]:
            return [await client.start("POST", path, body(args, n), mark=mark) for n in range(size)]

        if args.tokens is not None:
            begun = server.counts("begin")
            streams = await start()
            for stream in streams:
                require((await stream.response()).status == 200, "a job was refused")
            ended = server.counts("end")
            found = figures(begun, ended, size * args.tokens, [stream.arrivals for stream in streams])
            return found | {"begun ms": 1000 * seconds_to_begin(streams)}
        streams = await start()
        for stream in streams:
            await stream.until_marks(3)
        await asyncio.sleep(0.3)
        before = server.counts("begin"), [(s.num_marks, len(s.arrivals)) for s in streams]
        await asyncio.sleep(args.seconds)
        after = server.counts("end"), [(s.num_marks, len(s.arrivals)) for s in streams]
        for stream in streams:
            stream.hang_up()
        for stream in streams:
            await stream.done
    tokens = sum(b[0] - a[0] for a, b in zip(before[1], after[1], strict=True))
    arrivals = [s.arrivals[a[1] : b[1]] for s, a, b in zip(streams, before[1], after[1], strict=True)]
    return figures(before[0], after[0], tokens, arrivals)


def seconds_to_begin(streams: Sequence[Exchange]) -> float:
    """From the first request to when the last of them has had something of its body."""
    return max(stream.first_mark_at for stream in streams) - min(stream.sent_at for stream in streams)


def figures(
    before: dict[str, float], after: dict[str, float], tokens: int, arrivals: list[list[tuple[float, int]]]
) -> dict[str, float]:
    """`arrivals`: of each stream, when something came and how many bytes."""
    gaps = sorted(b[0] - a[0] for times in arrivals for a, b in itertools.pairwise(times)) or [0.0]
    spent = {key: after[key] - before[key] for key in after}
    return {
        "tok/s": tokens / spent["at"],
        "loop us": 1e6 * spent["loop"] / tokens,
        "engine us": 1e6 * spent["engine"] / tokens,
        "kernel us": 1e6 * spent["kernel"] / tokens,
        "loop %": 100 * spent["loop"] / spent["at"],
        "step ms": 1000 * spent["at"] / max(1, spent["steps"]),
        "reads/tok": sum(map(len, arrivals)) / tokens,
        "gap ms": 1000 * gaps[len(gaps) * 99 // 100],
    }


def typical(values: list[float], args: argparse.Namespace) -> float:
    if args.tokens is None or len(values) < 4:
        return statistics.median(values)
    return statistics.quantiles(values, n=4)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument(
        "--step-ms", type=float, default=5.0, help="0: at once; the engine's thread never waits"
    )
    parser.add_argument("--burst-ms", type=float, default=0.0, help="that a step of several rounds may take")
    parser.add_argument(
        "--launches", type=int, default=0, help="a round, each without the interpreter's lock, as on a GPU"
    )
    parser.add_argument("--switch-ms", type=float, default=0.5, help="that a thread keeps the lock for")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run, after it has begun")
    parser.add_argument("--tokens", type=int, help="count whole jobs of so many tokens instead")
    parser.add_argument(
        "--batches", type=int, default=1, help="of such jobs in a round, by turns with the other's"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--api", choices=list(BODIES), default="execute")
    parser.add_argument("--logprobs", action="store_true", help="ask for 5 a token")
    parser.add_argument("--stop", action="store_true", help="with stop strings that never come")
    parser.add_argument("--against", type=Path, help="the src directory of another version")
    parser.add_argument("--profile", action="store_true", help="of the event loop's thread, by cProfile")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    sources = {"this": Path(worker_orcd.__file__).parents[1]}
    if args.against is not None:
        sources = {"other": args.against.resolve()} | sources
    for size in args.streams:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
        for _ in range(args.rounds):
            if args.tokens is None:
                for name, source in sources.items():
                    with ServerProcess(source, args) as server:
                        runs[name].append(asyncio.run(measure(server, size, args)))
                continue
            with contextlib.ExitStack() as stack:
                servers = {
                    name: stack.enter_context(ServerProcess(src, args)) for name, src in sources.items()
                }
                for server in servers.values():
                    asyncio.run(measure(server, size, args))  # once for what is done at first use
                for name, server in [*servers.items()] * args.batches:
                    runs[name].append(asyncio.run(measure(server, size, args)))
        for name, found in runs.items():
            told = "  ".join(f"{key} {typical([run[key] for run in found], args):8.2f}" for key in found[0])
            print(f"{args.api} {size:4} streams, {name:<5}  {told}", flush=True)


if __name__ == "__main__":
    main()
