"""
The soak: that the command runs and can fail, and that what judges it finds what is wrong.

Each judging function is shown a worker that is as it should be and then one that is not.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from soak_asks import (
    COMPLETIONS,
    EXECUTE,
    Ask,
    Subject,
    ask_anything,
    ask_subject,
    make_subjects_jobs,
    outcome_of,
)
from soak_clients import ABSENT, UNKNOWN, WORDS, Ledger, Town
from soak_probe import Look, Sample, with_late_ones
from soak_verdict import (
    Limits,
    bad_end,
    device_changes,
    fifths,
    growth,
    leaks,
    left_open,
    read_log,
    slow_health,
    too_calm,
    wrong_answers,
    wrong_ends,
)
from worker_client import Answer, Response, Wrong, parse_answer

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--model", "tiny", "--clients", "48")
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src")}

# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_soak_finds_nothing(tmp_path: Path):
    """The limits of what only a long soak on a quiet machine can tell are wide."""
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [
            *COMMAND,
            "--seconds",
            "12",
            "--seed",
            "3",
            "--health-ms",
            "2000",
            "--rss-percent",
            "50",
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything as promised" in done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["broken"] == []
    seen, counted = told["as clients saw them"], told["requests by outcome"]
    assert seen["compared, greedy"] > 5 and seen["refused as garbage"] and seen["refused as nonsense"]
    assert counted["rejected"] > 0 and counted["cancelled"] > 0 and counted["error"] == 0
    written = json.loads(out.read_text())
    assert len(written["samples"]) >= 8 and written["/health asked"] >= 80


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_nothing_is_left_running():
    with subprocess.Popen(
        [*COMMAND, "--seconds", "120"], stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    ) as soak:
        try:
            while not (soak.stdout.readline()).startswith("minute"):
                assert soak.poll() is None
            time.sleep(1)
            family = psutil.Process(soak.pid).children(recursive=True)
            (worker,) = [one for one in family if "serve" in one.cmdline()]
            assert any(one.cmdline()[-1] == "echo" for one in family)
            os.kill(worker.pid, signal.SIGKILL)
            told = soak.communicate(timeout=60)[0]
        finally:
            soak.kill()
    assert soak.returncode == 1
    assert "BROKEN: the worker died with status -9" in told
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert alive == [] and len(gone) == len(family)


# -- what judges it ----------------------------------------------------------------------------------------


def samples(count: int = 50, **changes: Callable[[int], Any]) -> list[Sample]:
    """As they should be, but for `changes` by number."""
    made = [
        Sample(
            float(k), [0.002] * 10, [0.001] * 10, rss=10**8, anonymous=10**7, threads=9, files=40, running=16,
            waiting=16, free=3, status="healthy", device_bytes=7 << 30, gpu_bytes=9 << 30,
        )
        for k in range(count)
    ]  # fmt: skip
    return [
        replace(one, **{name: change(k) for name, change in changes.items()}) for k, one in enumerate(made)
    ]


def test_flat_memory_is_flat():
    assert growth(samples(), 5) == []
    warming = samples(rss=lambda k: 10**8 - 10**7 * (9 - k) * (k < 9))  # in the first fifth
    assert growth(warming, 5) == []
    assert growth(samples(rss=lambda k: 10**8 + 10**8 * (k == 49)), 5) == []  # a moment is no trend
    assert fifths(samples(10, rss=lambda k: k), lambda one: one.rss) == [0.5, 2.5, 4.5, 6.5, 8.5]


@pytest.mark.parametrize(
    ("rss", "word"),
    [
        (lambda k: 10**8 + k * 200_000, r"\+5\.\d %"),
        (lambda k: 10**8 * (1 + (k >= 40) * 0.06), r"\+6\.0 %"),
        (lambda k: 10**8 * (1 - (k >= 40) * 0.06), r"-6\.0 %"),
    ],
)
def test_growing_memory_is_told(rss: Callable[[int], float], word: str):
    (told,) = growth(samples(rss=rss), 5)
    assert re.search(word, told)
    assert growth(samples(rss=rss), 10) == []


def test_too_few_samples_show_nothing():
    assert growth(samples(4), 5)


def test_slow_health_is_told_with_what_the_echo_took():
    assert slow_health(samples(), 10) == []
    few = samples(health=lambda k: [0.002] * 9 + [0.5] * (k % 25 == 0))
    assert slow_health(few, 10) == []
    late = samples(health=lambda k: [0.002] * 9 + [0.0101] * (k % 4 == 0))
    (told,) = slow_health(late, 10)
    assert "10.1 ms" in told and "echo server beside it 1.0" in told
    assert slow_health(late, 11) == []
    assert slow_health([], 10) == ["/health was never asked"]


def test_a_late_answer_counts_for_the_questions_that_it_kept_from_being_asked():
    assert with_late_ones(0.05) == [0.05]
    assert with_late_ones(0.35) == pytest.approx([0.35, 0.25, 0.15, 0.05])


def gpu_body(device: int, gpu: int | None) -> dict[str, Any]:
    return {"vram_bytes_used": device, "gpu": {} if gpu is None else {"memory_used_bytes": gpu}}


def test_device_memory_is_the_same_to_the_byte():
    body = gpu_body(7 << 30, 9 << 30)
    assert device_changes([body, body], samples()) == []
    (told,) = device_changes([body], samples(gpu_bytes=lambda k: (9 << 30) + (k == 30)))
    assert told.startswith("the driver told of 2 sizes")
    (told,) = device_changes([body], samples(device_bytes=lambda k: (7 << 30) + k))
    assert told.startswith("the worker told of 50 sizes")
    (told,) = device_changes([body, gpu_body(7 << 30, (9 << 30) + 1)], samples())  # what only the end shows
    assert told.startswith("the driver told of 2 sizes")


def test_device_memory_that_nobody_tells_is_told():
    (told,) = device_changes([gpu_body(7 << 30, None)], samples())
    assert told == "the driver does not tell how much device memory is taken"
    assert device_changes([gpu_body(7 << 30, 9 << 30)], samples(gpu_bytes=lambda _: None))


IDLE: dict[str, Any] = {
    "running": 0,
    "waiting": 0,
    "status": "healthy",
    "state": "ready",
    "kv_blocks_free": 30,
    "kv_groups": [{"window": None, "free": 20, "total": 20}, {"window": 64, "free": 10, "total": 10}],
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"running": 1}, "1 are still running"),
        ({"waiting": 2}, "2 are still waiting"),
        ({"kv_blocks_free": 29}, "29 blocks are free, 30 were"),
        ({"kv_groups": [{"window": None, "free": 19, "total": 20}]}, "1 of 20 blocks are leaked"),
        ({"kv_groups": [{"window": 64, "free": 7, "total": 10}]}, "3 of 10 blocks of window 64 are leaked"),
        ({"status": "degraded"}, "degraded"),
        ({"state": "busy"}, "busy"),
    ],
)
def test_what_has_not_come_back_is_told(change: dict[str, Any], word: str):
    assert leaks(IDLE, IDLE) == []
    (told,) = leaks(IDLE, IDLE | change)
    assert word in told


def test_what_is_left_open_is_told():
    before = Look(threads=9, files=20, connections=0)
    assert left_open(before, before) == []
    assert left_open(before, Look(9, 20, 2)) == ["2 connections are still open"]
    assert left_open(before, Look(10, 20, 0)) == ["10 threads, 9 at the start"]
    assert left_open(before, Look(9, 21, 0)) == ["21 files, 20 at the start"]


def test_a_soak_without_overload_shows_nothing():
    assert too_calm(samples(), 32, 1) == []
    assert too_calm(samples(), 32, 0) and too_calm(samples(waiting=lambda _: 5), 32, 1)


# -- ends --------------------------------------------------------------------------------------------------


def event(name: str, outcome: str | None = None, job: str = "a", level: str = "info") -> str:
    told = {"event": name, "level": level, "sentence": f"{name} happened", "correlation_id": job}
    return json.dumps(told | ({} if outcome is None else {"outcome": outcome}))


ENDS = [
    event("ready"),
    event("execute_start"),
    event("execute_end", "success"),
    event("cancel", "cancelled", "b"),
    event("execute_end", "timeout", "c"),
    event("shutdown"),
]
COUNTED = {"success": 1, "error": 0, "cancelled": 1, "timeout": 1, "rejected": 4}


def ledger() -> Ledger:
    made = Ledger()
    made.may_be = {
        "a": frozenset({"success"}),
        "b": UNKNOWN,
        "c": frozenset({"timeout"}),
        "d": frozenset({"rejected", ABSENT}),
    }
    return made


def test_every_job_has_one_end():
    assert wrong_ends(ledger(), read_log("\n".join(ENDS)), COUNTED) == []


@pytest.mark.parametrize(
    ("lines", "counted", "words"),
    [
        ([*ENDS, ENDS[2]], {"success": 2}, ["1 jobs ended more than once: a"]),
        (ENDS[:2] + ENDS[3:], {"success": 0}, ["1 jobs that clients saw end are not in the log: a"]),
        ([*ENDS, event("execute_end", "success", "x")], {"success": 2}, ["that nobody asked for: x"]),
        ([*ENDS[:4], event("cancel", "cancelled", "c")], {"cancelled": 2, "timeout": 0}, ["another way"]),
        (
            [*ENDS, event("error", "error", "d")],
            {"error": 1},
            ["another way than their clients were told: d"],
        ),
        (ENDS, {"success": 2}, ["/metrics counts 2 of success, the log tells 1"]),
        (ENDS, {"cancelled": 0}, ["/metrics counts 0 of cancelled, the log tells 1"]),
        (
            [*ENDS, event("execute_end", "rejected", "d")],
            {"rejected": 0},
            ["counts 0 rejected, the log tells 1"],
        ),
    ],
)
def test_wrong_ends_are_told(lines: Sequence[str], counted: dict[str, int], words: Sequence[str]):
    told = wrong_ends(ledger(), read_log("\n".join(lines)), COUNTED | counted)
    assert len(told) == len(words)
    assert all(word in one for word, one in zip(words, told, strict=True))


def test_the_last_exit_is_judged():
    good = read_log("\n".join(ENDS))
    assert bad_end(0, 1.0, Limits(), good) == []
    assert bad_end(1, 1.0, Limits(), good) == ["the exit status after SIGTERM is 1"]
    assert bad_end(None, 90.0, Limits(), good)[0].endswith("is None")
    assert "31.0 s" in bad_end(0, 31.0, Limits(), good)[0]
    assert "last event" in bad_end(0, 1.0, Limits(), read_log("\n".join(ENDS[:-1])))[0]


@pytest.mark.parametrize(
    "line",
    ["Traceback (most recent call last):", event("error", level="error"), event("warning", level="warning")],
)
def test_faults_in_the_log_are_told(line: str):
    before, after = [line, *ENDS], [*ENDS[:-1], line, ENDS[-1]]
    assert bad_end(0, 1.0, Limits(), read_log("\n".join(before))) == []  # the start is not the soak's
    told = bad_end(0, 1.0, Limits(), read_log("\n".join(after)))
    assert told[0] == "1 faults are in the log" and len(told) == 2


# -- answers -----------------------------------------------------------------------------------------------


def stream(*told: tuple[str, dict[str, object]]) -> Response:
    frames = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in told]
    return Response(200, {}, "".join(frames).encode())


def whole(text: str, stop_reason: str = "length") -> Response:
    tokens = [("token", {"t": t, "i": i, "id": ord(t)}) for i, t in enumerate(text)]
    count = {"tokens_out": len(text)}
    end = {**count, "stop_reason": stop_reason, "matched_stop": None}
    return stream(("started", {}), *tokens, ("metrics", count), ("end", end))  # type: ignore[arg-type]


def refusal(status: int, code: str, **headers: str) -> Response:
    return Response(status, headers, json.dumps({"error": {"code": code, "message": ""}}).encode())


def asked(path: str = EXECUTE, *may: str, alone: str | None = "abc", **body: object) -> Ask:
    answer: Answer | None = None if alone is None else parse_answer(whole(alone))
    return Ask("x", path, {"temperature": 0, "stream": False, **body}, answer, {"QUEUE_FULL", *may})


def completion(*texts: str, reason: str | None = "length") -> Response:
    choices = [{"index": k, "text": text, "finish_reason": reason} for k, text in enumerate(texts)]
    return Response(200, {}, json.dumps({"choices": choices}).encode())


def chunks(*told: dict[str, object], done: str = "data: [DONE]\n\n") -> Response:
    frames = "".join(f"data: {json.dumps(one)}\n\n" for one in told)
    return Response(200, {}, (frames + ": keep-alive\n\n" + done).encode())


def chunk(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


FULL = refusal(503, "QUEUE_FULL", **{"retry-after": "1"})
ERROR = {"error": {"code": "cancelled", "message": ""}}


@pytest.mark.parametrize(
    ("ask", "response", "outcome"),
    [
        (asked(), whole("abc"), "success"),
        (asked(alone=None), whole("xyz", "eos"), "success"),
        (asked(), FULL, "rejected"),
        (asked(EXECUTE, "CANCELLED"), stream(("started", {}), ("error", {"code": "CANCELLED"})), "cancelled"),
        (asked(EXECUTE, "CANCELLED"), refusal(499, "CANCELLED"), "cancelled"),
        (asked(COMPLETIONS, "DEADLINE_EXCEEDED"), refusal(504, "deadline_exceeded"), "timeout"),
        (asked(EXECUTE, "INVALID_REQUEST"), refusal(409, "INVALID_REQUEST"), "rejected"),
        (asked(COMPLETIONS), completion("abc"), "success"),
        (asked(COMPLETIONS, n=2, alone=None), completion("abc", "d"), "success"),
        (asked(COMPLETIONS, stream=True), chunks(chunk("ab"), chunk("c"), chunk("", "length")), "success"),
        (asked(COMPLETIONS, "CANCELLED", stream=True), chunks(chunk("ab"), ERROR), "cancelled"),
    ],
)
def test_what_may_come_is_taken(ask: Ask, response: Response, outcome: str):
    assert outcome_of(ask, response) == outcome


@pytest.mark.parametrize(
    ("ask", "response"),
    [
        (asked(), whole("abd")),
        (asked(), whole("abc", "eos")),
        (asked(), whole("ab")),
        (asked(), refusal(503, "QUEUE_FULL")),
        (asked(), refusal(503, "DRAINING")),
        (asked(), refusal(500, "INTERNAL")),
        (asked(), refusal(400, "INVALID_REQUEST")),
        (asked(), refusal(504, "DEADLINE_EXCEEDED")),
        (asked(), stream(("started", {}), ("error", {"code": "CANCELLED"}))),
        (asked(), stream(("started", {}), ("error", {"code": "VRAM_OOM"}))),
        (asked(COMPLETIONS), completion("abd")),
        (asked(COMPLETIONS), completion("abc", reason="stop")),
        (asked(COMPLETIONS), completion("abc", reason=None)),
        (asked(COMPLETIONS, n=2, alone=None), completion("abc")),
        (asked(COMPLETIONS, stream=True), chunks(chunk("abc"))),
        (asked(COMPLETIONS, stream=True), chunks(chunk("abd", "length"))),
        (asked(COMPLETIONS, stream=True), chunks(chunk("abc", "length"), chunk("d"))),
        (asked(COMPLETIONS, stream=True), chunks(chunk("abc", "length"), done="")),
        (asked(COMPLETIONS, stream=True), chunks(chunk("ab"), ERROR)),
        (asked(COMPLETIONS, "CANCELLED", stream=True), chunks(ERROR, chunk("abc", "length"))),
    ],
)
def test_what_may_not_come_is_told(ask: Ask, response: Response):
    with pytest.raises(Wrong):
        outcome_of(ask, response)


def test_wrong_answers_are_told():
    made = Ledger()
    assert wrong_answers(made) == ["no greedy answer was compared with the one alone"]
    made.note(asked(), "success")
    assert wrong_answers(made) == []
    assert made.may_be == {"x": frozenset({"success"})}
    made.note(replace(asked(), id="y"), "rejected")
    assert made.may_be["y"] == {"rejected", ABSENT}
    for k in range(60):
        made.note_wrong(f"what {k}")
    told = wrong_answers(made)
    assert told[0].startswith("60 times") and told[1] == "what 0" and len(told) == 6


# -- who asks ----------------------------------------------------------------------------------------------


def test_jobs_are_asked_for_in_every_way_and_the_same_for_a_seed():
    subjects = [Subject(job, parse_answer(whole("abc"))) for job in make_subjects_jobs(8)]
    assert not any("prompt_token_ids" in one.job for one in subjects)

    def draw_all(seed: int) -> list[Ask]:
        draw = random.Random(seed)
        asks = [ask_subject(draw, f"n{k}", draw.choice(subjects)) for k in range(200)]
        return asks + [ask_anything(draw, f"m{k}", WORDS) for k in range(200)]

    drawn = draw_all(5)
    assert drawn == draw_all(5) != draw_all(6)
    ways = {(ask.path, ask.body.get("stream"), ask.alone is None) for ask in drawn}
    assert len({ask.path for ask in drawn}) == 3 and len(ways) == 8
    for field in ("cache_salt", "priority", "deadline_ms", "n", "logprobs", "stop"):
        assert any(field in ask.body for ask in drawn), field
    late = [ask for ask in drawn if "deadline_ms" in ask.body]
    assert late == [ask for ask in drawn if "DEADLINE_EXCEEDED" in ask.may]
    assert all(("job_id" in ask.body) == (ask.path == EXECUTE) for ask in drawn)


def test_clients_come_in_waves():
    town = Town(0, 0, 10, [], 100, began=50.0, until=50.0 + 400)
    shares = [town.share_present(50.0 + second) for second in range(400)]
    assert min(shares) == pytest.approx(0.25) and max(shares) == pytest.approx(1.0)
    assert sum(a < 0.6 <= b for a, b in itertools.pairwise(shares)) == 10
    assert town.longest_stop == 45.0
    assert replace(town, until=62.0).longest_stop == 2.0
