"""
Whether a request gets the same bits whatever happens around it: the part `same` of gpu_engine.py.

Requests are computed alone, nothing cached, then again in every way that the engine has of computing them.
"""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine_client import GREEDY, Answer, Model, OneAtATime, RunningEngine, random_prompt
from gpu_report import Session
from worker_orcd.sequence import SampledToken, SamplingParams

STEPS_BETWEEN = 12  # of those preempted, before they are again


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int


@dataclass(slots=True)
class Compared:
    """A row is a sampled token with its log probability and those of the most likely."""

    rows: int = 0
    differing: int = 0
    bits: int = 0

    def add(self, wanted: Sequence[SampledToken], found: Sequence[SampledToken]) -> None:
        """A row that one side lacks differs in all the bits of the other's."""
        for place in range(max(len(wanted), len(found))):
            a, b = (row_bits(side[place]) if place < len(side) else b"" for side in (wanted, found))
            width = max(len(a), len(b))
            if b"" in (a, b) or len(a) != len(b):
                count = 8 * width
            else:
                count = (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()
            self.rows += 1
            self.differing += count > 0
            self.bits += count


def row_bits(token: SampledToken) -> bytes:
    pairs = ((token.token_id, token.logprob), *token.top_logprobs)
    return b"".join(struct.pack(">qd", number, 0.0 if p is None else p) for number, p in pairs)


def make_requests(model: Model, count: int, longest: int, output: int, seed: str) -> list[Request]:
    """Short and long prompts, greedy and drawn, filtered and penalised."""
    generator = random.Random(seed)
    made: list[Request] = []
    for number in range(count):
        drawn = SamplingParams(
            temperature=0.8,
            seed=generator.getrandbits(64),
            top_p=0.9 if number % 4 == 2 else 1.0,
            top_k=40 if number % 4 == 3 else 0,
            repetition_penalty=1.2 if number % 8 in (3, 7) else 1.0,
            frequency_penalty=0.5 if number % 8 in (5, 7) else 0.0,
            logit_bias=((generator.randrange(100), 4.0),) if number % 8 == 7 else (),
            logprobs=5,
        )
        ids = random_prompt(model, generator.randint(1, longest), f"{seed} {number}")
        made.append(Request(ids, drawn if number % 4 else replace(GREEDY, logprobs=5), output))
    return made


def send(engine: RunningEngine, request: Request, *, salt: bytes = b"", priority: int = 0) -> int:
    return engine.send(
        request.prompt, request.sampling, max_tokens=request.max_tokens, salt=salt, priority=priority
    )


def check_same(session: Session, model: Model) -> None:
    args, name = session.args, model.path.name
    longest = min(200, model.max_len - args.watched - 1)
    requests = make_requests(model, args.subjects, longest, args.watched, "subject")
    alone = answers_alone(model, requests)
    checks: dict[str, Callable[[], Iterator[tuple[Compared, str, bool]]]] = {
        "ahead": lambda: one_at_a_time(model, requests, alone),
        "others": lambda: among_others(model, requests, alone),
        "again": lambda: again_and_again(model, requests, alone, args.again),
        "chunks": lambda: in_chunks(model, requests, alone),
        "preempted": lambda: preempted(model, requests, alone),
        "prefixes": lambda: behind_prefixes(model, args.watched),
    }
    for check, run in checks.items():

        def work(check: str = check, run: Callable[[], Any] = run) -> None:
            for number, (compared, what, real) in enumerate(run()):
                session.keep(f"same {name} {check} {number}", asdict(compared) | {"what": what, "real": real})
                told = f"{compared.differing} of {compared.rows} rows differ, {compared.bits} bits"
                session.say(
                    f"{name}: {what}: {told}" + ("" if real else "; but that was not put to the test"),
                    ok=compared.rows > 0 and not compared.differing and real,
                )

        session.guarded(f"{name}: same, {check}", work)


def answers_alone(model: Model, requests: Sequence[Request]) -> list[Answer]:
    """Each on an idle engine, nothing cached."""
    engine_config = replace(model.engine, enable_prefix_caching=False)
    with RunningEngine(model, engine=engine_config) as engine:
        return [engine.answer(send(engine, request)) for request in requests]


def compare(engine: RunningEngine, numbers: Sequence[int], wanted: Sequence[Answer]) -> Compared:
    compared = Compared()
    for number, answer in zip(numbers, wanted, strict=True):
        compared.add(answer.tokens, engine.answer(number).tokens)
    return compared


def one_at_a_time(
    model: Model, requests: list[Request], alone: list[Answer]
) -> Iterator[tuple[Compared, str, bool]]:
    """All at once, each step launched when the one before is over; then ahead of it. On a device that takes
    one step there is nothing to compare.
    """
    if model.runner.max_steps == 1:
        return
    for runner in (OneAtATime(model.runner), model.runner):
        with RunningEngine(model, runner=runner) as engine:
            compared = compare(engine, [send(engine, request) for request in requests], alone)
        ahead = sum(step.ahead for step in engine.steps)
        most = max(step.num_rounds for step in engine.steps)
        what = (
            f"all at once, {ahead} of {len(engine.steps)} steps launched while one was under way,"
            f" up to {most} tokens a row"
        )
        if runner is model.runner:
            real = ahead > len(engine.steps) // 2 and most > 1
        else:
            real = ahead == 0 and most == 1
        yield compared, what, real


def among_others(
    model: Model, requests: list[Request], alone: list[Answer]
) -> Iterator[tuple[Compared, str, bool]]:
    """At random places among random others, which come at random moments and some of which are cancelled."""
    for turn, count in enumerate((len(requests) // 2, len(requests), 4 * len(requests))):
        generator = random.Random(f"others {turn}")
        others = make_requests(model, count, model.max_len // 4, 40, f"others {turn}")
        order = list(range(len(requests) + len(others)))
        generator.shuffle(order)
        with RunningEngine(model) as engine:
            subjects: dict[int, int] = {}
            strangers: list[int] = []
            for index in order:
                if index < len(requests):
                    subjects[index] = send(engine, requests[index], salt=b"subject")
                else:
                    strangers.append(send(engine, others[index - len(requests)]))
                    if generator.random() < 0.2:
                        engine.cancel(generator.choice(strangers))
                if generator.random() < 0.3:
                    time.sleep(generator.random() * 0.003)
            compared = compare(engine, [subjects[index] for index in range(len(requests))], alone)
            for number in strangers:
                engine.cancel(number)
        most = max(step.num_rows for step in engine.steps)
        yield compared, f"among {count} others, up to {most} rows a step", most > 1


def again_and_again(
    model: Model, requests: list[Request], alone: list[Answer], times: int
) -> Iterator[tuple[Compared, str, bool]]:
    """Among as many others that change each time. For a million rows: `--only same --again 100 --subjects 128
    --watched 100`.
    """
    compared, most, rounds = Compared(), 0, 0
    for turn in range(times):
        generator = random.Random(f"again {turn}")
        order = list(range(len(requests)))
        generator.shuffle(order)
        with RunningEngine(model) as engine:
            subjects: list[int] = []
            strangers: list[int] = []
            for index in order:
                subjects.append(send(engine, requests[index], salt=b"subject"))
                other = random_prompt(
                    model, generator.randint(1, model.max_len // 4), f"again {turn} {index}"
                )
                strangers.append(engine.send(other, GREEDY, max_tokens=generator.randint(1, 64)))
            for number, index in zip(subjects, order, strict=True):
                compared.add(alone[index].tokens, engine.answer(number).tokens)
            for number in strangers:
                engine.answer(number)
        most = max(most, *(step.num_rows for step in engine.steps))
        rounds = max(rounds, *(step.num_rounds for step in engine.steps))
    what = f"{times} times among others, up to {most} rows a step and {rounds} tokens a row"
    yield compared, what, times > 0 and most > 1


def in_chunks(
    model: Model, requests: list[Request], alone: list[Answer]
) -> Iterator[tuple[Compared, str, bool]]:
    """All at once, with a small budget of tokens for a step."""
    for budget in (7, 48):
        few = replace(model.engine, max_num_batched_tokens=budget)
        with RunningEngine(model, engine=few) as engine:
            compared = compare(engine, [send(engine, request) for request in requests], alone)
        cut = any(len(request.prompt) > budget for request in requests)
        yield compared, f"in steps of up to {budget} tokens", cut


def small_pools(model: Model, longest: int) -> list[int]:
    """Blocks of each cache group: a little more than two sequences of this length take."""
    size = model.engine.block_size
    full = 2 * -(-longest // size) + 2
    return [
        full if group.window is None else max(full, -(-group.window // size) + 3)
        for group in model.plan.kv_groups
    ]


def preempted(
    model: Model, requests: list[Request], alone: list[Answer]
) -> Iterator[tuple[Compared, str, bool]]:
    """On a small pool, which is taken by requests of better priority again and again."""
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    for cached in (True, False):
        config = replace(model.engine, enable_prefix_caching=cached)
        with RunningEngine(model, engine=config, blocks=small_pools(model, longest)) as engine:
            numbers = [send(engine, request, priority=1) for request in requests]
            for turn in itertools.count():
                after = len(engine.steps) + STEPS_BETWEEN
                while engine.busy(numbers) and len(engine.steps) < after:
                    time.sleep(0.0005)
                if not engine.busy(numbers):
                    break
                rude = random_prompt(model, longest - 2, f"rude {turn}")
                engine.answer(engine.send(rude, GREEDY, max_tokens=2))
            compared = compare(engine, numbers, alone)
        times = sum(step.num_preempted for step in engine.steps)
        what = f"preempted {times} times, {'with' if cached else 'without'} the prefix cache"
        yield compared, what, times > 0


def behind_prefixes(model: Model, output: int) -> Iterator[tuple[Compared, str, bool]]:
    """The first blocks of a prompt are cached: 1, 2, … up to all but the last."""
    size = model.engine.block_size
    blocks = min(12, (model.max_len - output - 5) // size)
    for kind in (0, 1):  # greedy, drawn
        request = make_requests(model, 2, 1, output, "prefix")[kind]
        request = replace(request, prompt=random_prompt(model, blocks * size + 5, f"prefix {kind}"))
        alone = answers_alone(model, [request])
        compared, hits = Compared(), 0
        with RunningEngine(model) as engine:
            for cached in range(1, blocks + 1):
                salt = f"{kind} {cached}".encode()
                first = Request(request.prompt[: cached * size], GREEDY, 1)
                engine.answer(send(engine, first, salt=salt))
                number = send(engine, request, salt=salt)
                compared.add(alone[0].tokens, engine.answer(number).tokens)
                hits += engine.answer(number).num_cached_tokens == cached * size
        what = (
            f"{'drawn' if kind else 'greedy'} behind cached prefixes of 1 to {blocks} blocks ({hits} found)"
        )
        yield compared, what, hits == blocks
