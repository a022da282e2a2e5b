"""What clients do and when, drawn from the seed as the simulation goes on."""

from __future__ import annotations

import json
import random
import signal
from typing import TYPE_CHECKING, Any

from sim_clients import STOPS, Caller, Cancelling, Completion, Execute, JobCaller, Plain, Question
from sim_network import Pipe
from sim_plan import ANSWERS, LONGEST

if TYPE_CHECKING:
    from sim_world import World

_SEEDS_A_JOB = 16


class Director:
    """Makes clients, and makes them misbehave. A callback of the loop, again and again."""

    def __init__(self, world: World) -> None:
        self.world, self.plan = world, world.plan
        self.rng = random.Random(f"director {world.plan.seed}")
        self.callers: list[Caller] = []
        self.is_done = False  # nobody asks for anything new
        self._num_jobs = 0
        self._prefixes: list[tuple[int, ...]] = [()]
        self._was_told_to_end = False

    @property
    def jobs(self) -> list[JobCaller]:
        return [caller for caller in self.callers if isinstance(caller, JobCaller)]

    def turn(self) -> None:
        """One thing that happens, and when the next does."""
        world, plan, rng = self.world, self.plan, self.rng
        if world.is_broken:
            return
        if plan.ends_early is not None and world.num_events >= plan.ends_early:
            self._end()
        if world.num_events >= plan.num_events or world.is_over:
            self._finish()
            return
        number = rng.randint(3, 12) if rng.random() < plan.bursts else 1
        for _ in range(number):
            self._arrive()
        if rng.random() < plan.cancels:
            self._cancel()
        if rng.random() < plan.hang_ups:
            self._hang_up()
        if rng.random() < plan.slow:
            self._read_slowly()
        if rng.random() < plan.oddities:
            self._ask_oddly()
        world.loop.call_later(rng.expovariate(1 / plan.gap), self.turn)

    def _finish(self) -> None:
        """Let what there is come to its end, or not."""
        self.is_done = True
        if self.world.is_broken:
            return
        if self.plan.waits and not all(caller.is_over for caller in self.callers):
            self.world.loop.call_later(0.05, self._finish)
        else:
            self._end()

    def _end(self) -> None:
        if self._was_told_to_end or self.world.is_over:
            return
        self._was_told_to_end = self.world.is_ending = True
        if self.rng.random() < 0.5:
            self.world.event("signal", "SIGTERM")
            self.world.loop.signal(signal.SIGTERM)
            return
        self._send(Plain(self.world, "/shutdown"), "POST", {})
        if self.rng.random() < 0.5:  # as supervisors do it
            self.world.loop.call_later(self.plan.gap, self.world.loop.signal, signal.SIGTERM)

    # -- jobs ----------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        rng = self.rng
        self._num_jobs += 1
        deadline = None
        if rng.random() < self.plan.deadlines:
            deadline = max(1, int(1000 * self.plan.step_seconds * rng.choice((1, 5, 20, 100))))
        common: dict[str, Any] = {}
        if self.plan.priorities:
            common["priority"] = rng.choice((0, 0, 0, 1, -1))
        if rng.random() < 0.2:
            common["cache_salt"] = "other"
        if rng.random() < 0.15:
            self._complete(common, deadline)
            return
        question = self._question()
        job = Execute(self.world, f"job-{self._num_jobs}", question, deadline)
        self._execute(job, common)

    def _execute(self, job: Execute, common: dict[str, Any]) -> None:
        (question,) = job.questions
        body = {
            "job_id": job.job_id,
            "prompt_token_ids": list(question.prompt),
            **question.fields(),
            **common,
        }
        headers: dict[str, str] = {}
        if job.deadline_ms is not None and self.rng.random() < 0.5:
            headers["X-Deadline"] = str(job.deadline_ms)
        elif job.deadline_ms is not None:
            body["deadline_ms"] = job.deadline_ms
        if job.is_bad:
            self._spoil(body, headers)
        self._send(job, "POST", body, path="/execute", headers=headers)

    def _complete(self, common: dict[str, Any], deadline: int | None) -> None:
        rng = self.rng
        first = self._question()
        number = rng.choice((1, 1, 2, 3))
        fields = {
            name: getattr(first, name) for name in ("prompt", "max_tokens", "min_tokens", "penalises", "stop")
        }
        windows = first.windows
        questions = [Question(**fields, seed=first.seed + k, windows=windows) for k in range(number)]
        job = Completion(self.world, f"cmpl-{self._num_jobs}", questions, deadline)
        job.streams = rng.random() < 0.6
        body = {"prompt": list(first.prompt), "n": number, "stream": job.streams, **first.fields(), **common}
        if deadline is not None:
            body["deadline_ms"] = deadline
        job.is_bad = number > self.plan.max_queue
        self._send(job, "POST", body, path="/v1/completions")

    def _question(self) -> Question:
        rng = self.rng
        prompt = self._prefix() + tuple(rng.randrange(24) for _ in range(rng.randint(1, 10)))
        most = min(rng.choice(ANSWERS), LONGEST - len(prompt))
        return Question(
            prompt=prompt,
            max_tokens=most,
            min_tokens=min(most, rng.choice((0, 0, 0, 4))),
            seed=self._num_jobs * _SEEDS_A_JOB,
            penalises=rng.random() < 0.1,
            stop=tuple(rng.sample(STOPS, rng.choice((1, 2)))) if rng.random() < 0.2 else (),
            windows=tuple(window for window, _num_blocks in self.plan.groups),
        )

    def _prefix(self) -> tuple[int, ...]:
        """Nothing, or what others begin with as well: a new beginning, a longer one, or an old one."""
        rng = self.rng
        known = rng.choice(self._prefixes[-4:])
        if rng.random() < 0.2:
            kept = known if rng.random() < 0.5 else ()
            known = (*kept, *(rng.randrange(24) for _ in range(rng.randint(1, 12))))[:24]
            self._prefixes.append(known)
        return known

    def _spoil(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        match self.rng.randrange(5):
            case 0:
                body["max_tokens"] = LONGEST
            case 1:
                body["prompt_token_ids"] = [1000]
            case 2:
                body["temperature"] = 7
            case 3:
                headers["X-Deadline"] = "soon"
            case _:
                body["no_such_field"] = 1

    # -- misbehaviour --------------------------------------------------------------------------------------

    def _some(self, jobs: list[JobCaller]) -> JobCaller | None:
        return self.rng.choice(jobs) if jobs else None

    def _live(self) -> list[JobCaller]:
        return [job for job in self.jobs if not job.is_over]

    def _cancel(self) -> None:
        job = self._some(self._live() if self.rng.random() < 0.8 else self.jobs)
        job_id = "nobody" if job is None else job.job_id
        self.world.cancelled_jobs.add(job_id)
        self._send(Cancelling(self.world, job_id), "POST", {"job_id": job_id}, path="/cancel")

    def _hang_up(self) -> None:
        if (job := self._some(self._live())) is not None:
            for seed in job.seeds():
                self.world.gone[seed] = self.world.loop.now
            job.hang_up()

    def _read_slowly(self) -> None:
        """Stop reading: for ever, for a while, or but for a few bytes at a time."""
        job = self._some([job for job in self._live() if job.pipe is not None and job.pipe.reads])
        if job is None or job.pipe is None:
            return
        pipe, rng = job.pipe, self.rng
        pipe.reads, job.was_slow = False, True
        self.world.event("stops reading", job.name)
        match rng.randrange(3):
            case 0:
                return
            case 1:
                self.world.loop.call_later(self.plan.gap * rng.choice((3, 30, 300)), self._read_again, pipe)
            case _:
                self._sip(pipe)

    def _read_again(self, pipe: Pipe) -> None:
        pipe.reads = True
        pipe.read()

    def _sip(self, pipe: Pipe) -> None:
        pipe.read(self.rng.randint(1, 200))
        if pipe.peer is not None and not self.world.is_broken:
            self.world.loop.call_later(self.plan.step_seconds * self.rng.choice((1, 5)), self._sip, pipe)

    def _ask_oddly(self) -> None:
        rng = self.rng
        what = rng.randrange(5)
        if what == 0 and (job := self._some([j for j in self._live() if isinstance(j, Execute)])) is not None:
            self._num_jobs += 1
            again = Execute(self.world, job.job_id, self._question(), None)
            self.world.duplicated.add(job.job_id)  # whose body comes first runs
            self._execute(again, {})
        elif what == 1:
            self._num_jobs += 1
            bad = Execute(self.world, f"bad-{self._num_jobs}", self._question(), None)
            bad.is_bad = True
            self._execute(bad, {})
        else:
            path = ("/health", "/ready", "/metrics")[what - 2]
            self._send(Plain(self.world, path), "GET", None)

    # -- connections ---------------------------------------------------------------------------------------

    def _send(
        self,
        caller: Caller,
        method: str,
        body: dict[str, Any] | None,
        *,
        path: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        world, rng = self.world, self.rng
        self.callers.append(caller)
        caller.sent_at = world.loop.now
        content = b"" if body is None else json.dumps(body).encode()
        fields = {
            "host": "127.0.0.1:8080",
            "content-type": "application/json",
            "content-length": str(len(content)),
            "x-correlation-id": f"c-{len(self.callers)}",
            **(headers or {}),
        }
        path = path or caller.name
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
        world.event("ask", f"{caller.name}: {method} {path} {content.decode()}")
        pipe = world.connect()
        if pipe is None:
            caller.is_over = True
            return
        caller.pipe = pipe
        data = head.encode() + content
        if rng.random() < 0.1:
            cut = rng.randrange(len(data))
            pipe.request(data[:cut], caller)
            world.loop.call_later(rng.choice((0.0, self.plan.gap)), pipe.send, data[cut:])
        else:
            pipe.request(data, caller)
