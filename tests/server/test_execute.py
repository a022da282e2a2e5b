"""POST /execute and POST /cancel: events, their order and contents, and how a job may end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from worker_orcd.engine.messages import Output
from worker_orcd.sequence import FinishReason


def names(events):
    return [name for name, _ in events]


def text_of(events):
    return "".join(data["t"] for name, data in events if name == "token")


async def run(world, events_of, /, **body):
    body = {"job_id": "j", "prompt": "Say hello"} | body
    async with world.http() as http:
        response = await http.post("/execute", json={k: v for k, v in body.items() if v is not ...})
    assert response.status_code == 200, response.text
    return events_of(response.text)


async def test_the_stream_is_well_formed(world, events_of):
    w = world()
    async with w.http() as http:
        response = await http.post(
            "/execute",
            json={"job_id": "j1", "prompt": "Say hello", "seed": 7},
            headers={"X-Correlation-Id": "abc-1"},
        )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-correlation-id"] == "abc-1"
    assert "content-length" not in response.headers
    events = events_of(response.text)
    assert names(events) == ["started"] + ["token"] * 10 + ["metrics", "end"]
    started = events[0][1]
    assert {key: started[key] for key in ("job_id", "model", "seed", "prompt_tokens", "cached_tokens")} == {
        "job_id": "j1",
        "model": "small",
        "seed": 7,
        "prompt_tokens": 7,
        "cached_tokens": 16,
    }
    assert started["correlation_id"] == "abc-1"
    tokens = [data for name, data in events if name == "token"]
    assert [token["i"] for token in tokens] == list(range(10))
    assert set(tokens[0]) == {"t", "i", "id"}
    assert text_of(events) == "hello world"
    assert tokens[-1] == {"t": "", "i": 9, "id": 259}  # the end token has no text
    end = events[-1][1]
    assert (end["tokens_out"], end["stop_reason"]) == (10, "eos")
    assert end["decode_time_ms"] > 0
    metrics = events[-2][1]
    assert metrics["tokens_out"] == 10
    assert metrics["vram_bytes"] == 1000
    assert metrics["queue_ms"] == 1.0
    assert metrics["ttft_ms"] > 0


async def test_what_the_engine_is_asked(world, events_of):
    w = world(api_key=None)
    before = time.monotonic()
    await run(
        w,
        events_of,
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -3, "7": 1.5},
        seed=2**64 - 1,
        logprobs=3,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=[65],
        priority=-4,
        deadline_ms=60_000,
    )
    (submit,) = w.engine.submitted
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 5, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.1,
        -1,
        2,
    )
    assert sampling.logit_bias == ((5, -3.0), (7, 1.5))
    assert (sampling.seed, sampling.logprobs) == (2**64 - 1, 3)
    assert (submit.max_tokens, submit.min_tokens, submit.priority) == (9, 2, -4)
    assert submit.stop_token_ids == {65, 259, 260}
    assert before + 60 <= submit.deadline <= time.monotonic() + 60


async def test_defaults(world, events_of):
    w = world()
    events = await run(w, events_of)
    (submit,) = w.engine.submitted
    assert submit.sampling.temperature == 1.0
    assert submit.max_tokens == 512 - 7  # the context that is left
    assert submit.deadline is None
    assert events[0][1]["seed"] == submit.sampling.seed < 2**53
    again = await run(w, events_of, job_id="other")
    assert again[0][1]["seed"] != events[0][1]["seed"]


async def test_text_comes_in_whole_characters(world, events_of):
    w = world()
    w.engine.answer = lambda _: [*"a€🙂".encode(), 259]
    events = await run(w, events_of)
    texts = [data["t"] for name, data in events if name == "token"]
    assert texts == ["a", "", "", "€", "", "", "", "🙂", ""]


async def test_held_back_bytes_come_with_the_last_token(world, events_of):
    w = world()
    w.engine.answer = lambda _: list("ab🙂".encode()[:4])
    events = await run(w, events_of, max_tokens=4)
    assert [data["t"] for name, data in events if name == "token"] == ["a", "b", "", "\ufffd"]
    assert events[-1][1]["stop_reason"] == "length"


@pytest.mark.parametrize("stop", ["wor", ["zzz", "o w", "wor"]])
async def test_a_stop_string_ends_the_stream_and_the_sequence(world, events_of, eventually, stop):
    w = world()
    w.engine.answer = lambda _: list(b"hello world, hello")
    w.engine.step_seconds = 0.02  # so that it has not ended by itself before it is cancelled
    events = await run(w, events_of, stop=stop)
    assert text_of(events) == ("hello " if stop == "wor" else "hell")
    end = events[-1][1]
    assert end["stop_reason"] == "stop"
    assert end["matched_stop"] == ("wor" if stop == "wor" else "o w")
    assert end["tokens_out"] == names(events).count("token")
    await eventually(lambda: w.engine.cancelled == [1])
    assert w.count('worker_requests_total{outcome="success"}') == 1


async def test_the_beginning_of_a_stop_string_is_given_back_at_the_end(world, events_of):
    w = world()
    w.engine.answer = lambda _: [*b"hello wo", 259]
    events = await run(w, events_of, stop="world")
    assert text_of(events) == "hello wo"
    assert events[-1][1]["stop_reason"] == "eos"


async def test_stop_tokens_and_ignored_ends(world, events_of):
    w = world()
    w.engine.answer = lambda _: [*b"ab", 259, *b"cd", 260]
    events = await run(w, events_of, ignore_eos=True, max_tokens=6)
    assert text_of(events) == "abcd"  # control tokens have no text
    assert events[-1][1]["stop_reason"] == "length"
    events = await run(w, events_of, stop_token_ids=[ord("b")], job_id="2")
    assert text_of(events) == "a"
    assert (events[-1][1]["stop_reason"], events[-1][1]["matched_stop"]) == ("stop", ord("b"))


async def test_logprobs(world, events_of):
    w = world()
    events = await run(w, events_of, logprobs=2, max_tokens=1)
    token = events[1][1]
    assert token["logprob"] == -0.25
    assert token["top_logprobs"] == [
        {"id": 0, "t": "\ufffd", "logprob": -0.25} if token["id"] == 0 else token["top_logprobs"][0],
        token["top_logprobs"][1],
    ]
    assert [top["logprob"] for top in token["top_logprobs"]] == [-0.25, -1.25]
    events = await run(w, events_of, logprobs=0, max_tokens=1)
    assert events[1][1]["logprob"] == -0.25
    assert "top_logprobs" not in events[1][1]


async def test_prompts_as_token_ids_and_messages(world, events_of, tokenizer):
    w = world()
    await run(w, events_of, prompt=..., prompt_token_ids=[1, 2, 3])
    await run(w, events_of, prompt=..., messages=[{"role": "user", "content": "Hi <|im_end|>"}])
    ids, chat = (submit.prompt_token_ids for submit in w.engine.submitted)
    assert ids == (1, 2, 3)
    assert chat[0] == 258
    assert tokenizer.decode(chat, skip_control=False).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert list(chat).count(259) == 1  # what the user wrote is not a control token


async def test_text_never_becomes_control_tokens(world, events_of):
    w = world()
    await run(w, events_of, prompt="<|im_end|>x")
    assert not {258, 259, 260} & set(w.engine.submitted[0].prompt_token_ids)


async def test_a_job_may_be_cancelled_while_it_is_tokenised(world, monkeypatch, tokenizer):
    w = world()
    encode = type(tokenizer).encode
    reading, cancelled = threading.Event(), threading.Event()

    def slowly(self, text, **options):
        reading.set()
        assert cancelled.wait(60)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", slowly)
    async with w.http() as http:
        job = asyncio.create_task(http.post("/execute", json={"job_id": "j", "prompt": "x" * 200}))
        await asyncio.to_thread(reading.wait, 60)
        assert (await http.post("/cancel", json={"job_id": "j"})).json()["running"]
        cancelled.set()
        response = await job
    assert response.status_code == 499
    assert response.json()["error"]["code"] == "CANCELLED"
    assert not w.engine.submitted
    assert w.client.num_admitted == 0


async def test_a_failure_in_the_engine_ends_the_stream_with_an_error(world, events_of):
    w = world()
    failure = Output(
        0,
        finish_reason=FinishReason.ERROR,
        error_code="VRAM_OOM",
        error="no memory at 0x7f00dead for /home/me/model\nTraceback",
    )
    w.engine.answer = lambda _: [*b"ab", failure]
    events = await run(w, events_of)
    assert names(events) == ["started", "token", "token", "error"]
    error = events[-1][1]
    assert (error["code"], error["retriable"], error["job_id"]) == ("VRAM_OOM", True, "j")
    assert error["message"] == "no memory at (address) for (path)"
    assert w.count('worker_requests_total{outcome="error"}') == 1


async def test_an_error_before_the_first_token_still_follows_started(world, events_of):
    w = world()
    failure = Output(0, finish_reason=FinishReason.ERROR, error_code="CUDA_ERROR", error="the device is lost")
    w.engine.answer = lambda _: [failure]
    events = await run(w, events_of)
    assert names(events) == ["started", "error"]
    assert (events[1][1]["code"], events[1][1]["retriable"]) == ("CUDA_ERROR", False)


@pytest.mark.parametrize("how", ["field", "header"])
async def test_a_deadline_ends_the_job(world, events_of, how):
    w = world()
    w.engine.step_seconds = 0.01
    w.engine.answer = lambda _: [65]
    async with w.http() as http:
        body = {"job_id": "j", "prompt": "x", "ignore_eos": True}
        if how == "field":
            response = await http.post("/execute", json=body | {"deadline_ms": 60})
        else:
            response = await http.post("/execute", json=body, headers={"X-Deadline": "60"})
    events = events_of(response.text)
    assert (names(events)[0], names(events)[-1]) == ("started", "error")
    assert events[-1][1]["code"] == "DEADLINE_EXCEEDED"
    assert w.count('worker_requests_total{outcome="timeout"}') == 1


async def test_a_job_refused_for_its_deadline_header_is_counted(world):
    w = world()
    async with w.http() as http:
        response = await http.post(
            "/execute", json={"job_id": "j", "prompt": "x"}, headers={"X-Deadline": "soon"}
        )
    assert response.status_code == 400
    assert response.json()["error"]["details"]["param"] == "X-Deadline"
    assert w.count('worker_requests_total{outcome="rejected"}') == 1
    assert w.client.num_admitted == 0


async def test_the_earlier_deadline_counts(world):
    w = world()
    async with w.http() as http:
        for field, header in ((50_000, "90000"), (90_000, "50000")):
            body = {"job_id": "j", "prompt": "x", "deadline_ms": field}
            before = time.monotonic()
            await http.post("/execute", json=body, headers={"X-Deadline": header})
            assert before + 50 <= w.engine.submitted[-1].deadline <= time.monotonic() + 50


async def test_cancel_ends_the_stream_and_is_idempotent(world, events_of, eventually):
    w = world()
    w.engine.step_seconds = 0.05
    w.engine.answer = lambda _: [65]
    async with w.http() as http:
        stream = asyncio.create_task(
            http.post("/execute", json={"job_id": "j", "prompt": "x", "ignore_eos": True})
        )
        await eventually(lambda: w.engine.submitted)
        answers = [await http.post("/cancel", json={"job_id": "j"}) for _ in range(3)]
        unknown = await http.post("/cancel", json={"job_id": "nobody"})
        events = events_of((await stream).text)
    assert [answer.status_code for answer in [*answers, unknown]] == [202] * 4
    assert answers[0].json() == {"job_id": "j", "running": True}
    assert unknown.json() == {"job_id": "nobody", "running": False}
    assert (names(events)[0], names(events)[-1]) == ("started", "error")
    assert events[-1][1]["code"] == "CANCELLED"
    await eventually(lambda: w.engine.snapshot.num_running == 0)
    assert w.engine.cancelled == [1]
    assert w.count('worker_requests_total{outcome="cancelled"}') == 1
    assert w.client.num_admitted == 0


async def test_a_job_id_can_run_once_at_a_time(world, eventually):
    w = world()
    w.engine.go.clear()
    body = {"job_id": "same", "prompt": "x"}
    async with w.http() as http:
        first = asyncio.create_task(http.post("/execute", json=body))
        await eventually(lambda: w.engine.submitted)
        second = await http.post("/execute", json=body)
        assert second.status_code == 409
        assert second.json()["error"]["code"] == "INVALID_REQUEST"
        assert second.json()["error"]["details"] == {"retriable": False, "param": "job_id"}
        assert (
            await http.post("/execute", json=body | {"job_id": "cancel me", "prompt": ""})
        ).status_code == 400
        w.engine.go.set()
        assert (await first).status_code == 200
        assert (await http.post("/execute", json=body)).status_code == 200  # it is over, so it may run again


async def test_a_full_queue_refuses_before_it_tokenises(world, eventually, monkeypatch, tokenizer):
    w = world(max_queue=2)
    w.engine.go.clear()
    async with w.http() as http:
        running = [
            asyncio.create_task(http.post("/execute", json={"job_id": str(i), "prompt": "x"}))
            for i in range(2)
        ]
        await eventually(lambda: len(w.engine.submitted) == 2)
        monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
        refused = await http.post("/execute", json={"job_id": "3", "prompt": "x"})
        ready = await http.get("/ready")
        monkeypatch.undo()
        w.engine.go.set()
        await asyncio.gather(*running)
    for response in (refused, ready):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "QUEUE_FULL"
        assert response.json()["error"]["details"]["retriable"] is True
    assert w.count('worker_requests_total{outcome="rejected"}') == 1
    assert w.count('worker_requests_total{outcome="success"}') == 2


async def test_places_in_the_queue_are_counted_while_prompts_are_tokenised(
    world, eventually, monkeypatch, tokenizer
):
    w = world(max_queue=3)
    encode = type(tokenizer).encode
    refused = threading.Event()

    def slowly(self, text, **options):
        assert refused.wait(60)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", slowly)
    async with w.http() as http:
        bodies = [{"job_id": str(i), "prompt": "x" * 200} for i in range(8)]
        posts = [asyncio.create_task(http.post("/execute", json=body)) for body in bodies]
        await eventually(lambda: sum(post.done() for post in posts) == 5)
        refused.set()
        statuses = sorted([(await post).status_code for post in posts])
    assert statuses == [200] * 3 + [503] * 5


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(world):
    w = world()
    async with w.http() as http:
        long = await http.post("/execute", json={"job_id": "j", "prompt": "x" * 600})
        much = await http.post("/execute", json={"job_id": "j", "prompt": "x" * 500, "max_tokens": 13})
        fits = await http.post("/execute", json={"job_id": "j", "prompt": "x" * 500, "max_tokens": 12})
    assert (long.status_code, much.status_code, fits.status_code) == (400, 400, 200)
    assert "512 tokens" in long.json()["error"]["message"]
    assert "600 in the prompt" in long.json()["error"]["message"]
    assert "513 tokens (500 in the prompt, 13 in the answer)" in much.json()["error"]["message"]
    assert much.json()["error"]["details"]["param"] == "max_tokens"
    assert w.client.num_admitted == 0


async def test_a_text_that_is_too_long_is_never_tokenised(world, monkeypatch, tokenizer):
    w = world(max_prompt_chars=1000)
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
    async with w.http() as http:
        response = await http.post("/execute", json={"job_id": "j", "prompt": "x" * 1001})
    assert response.status_code == 413
    assert "1001 characters; at most 1000" in response.json()["error"]["message"]


async def test_metrics_events_come_at_their_interval(world, events_of):
    """On a clock of its own, by which a token is drawn every second."""
    w = world(metrics_interval_ms=3000, clock=lambda: float(w.metrics._tokens_generated))
    w.engine.answer = lambda _: [65]
    events = await run(w, events_of, max_tokens=12, ignore_eos=True)
    counts = [data["tokens_out"] for name, data in events if name == "metrics"]
    assert counts == [4, 7, 10, 12]  # the last at the end


async def test_jobs_are_narrated_without_their_text(world, events_of):
    w = world()
    await run(w, events_of, prompt="my secret prompt")
    told = w.narrated()
    assert [event["event"] for event in told] == ["execute_start", "execute_end"]
    assert told[0]["tokens_in"] == 16
    assert told[0]["prompt_chars"] == 16
    assert (told[1]["outcome"], told[1]["tokens_out"]) == ("success", 10)
    assert "secret" not in w.log.getvalue()
    assert "hello world" not in w.log.getvalue()


async def test_a_job_id_cannot_write_to_the_terminal(world, events_of):
    w = world()
    await run(w, events_of, job_id="a\x1b[2J\n")
    assert all("\x1b" not in event["sentence"] and "\n" not in event["sentence"] for event in w.narrated())


async def test_prompts_and_answers_are_logged_on_request(world, events_of):
    w = world(log_prompts=True)
    await run(w, events_of, prompt="my secret prompt")
    told = w.narrated()
    assert told[0]["prompt"] == "my secret prompt"
    assert told[1]["completion"] == "hello world"


async def test_many_streams_do_not_mix(world, events_of):
    w = world()
    w.engine.answer = lambda submit: [submit.prompt_token_ids[0]] * 5 + [259]
    async with w.http() as http:
        posts = [
            http.post("/execute", json={"job_id": str(i), "prompt": chr(65 + i % 26) * 3}) for i in range(64)
        ]
        streams = [events_of(response.text) for response in await asyncio.gather(*posts)]
    for i, events in enumerate(streams):
        assert text_of(events) == chr(65 + i % 26) * 5
        assert names(events) == ["started"] + ["token"] * 6 + ["metrics", "end"]
        assert events[0][1]["job_id"] == str(i)
