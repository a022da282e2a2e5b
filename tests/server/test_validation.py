"""What is wrong with a request is said by field, value and range; nothing is guessed and nothing ignored."""

from __future__ import annotations

import asyncio
import json

import pytest

from worker_orcd.server.body import read_model
from worker_orcd.server.openai.wire import ChatRequest, CompletionRequest

NAN, PLUS, MINUS = "NaN", "Infinity", "-Infinity"
HUGE = str(2**63)
ODD = [NAN, PLUS, MINUS, "-1", HUGE, '"1"', "true", "null", "1e999", "1.5", "[]", "{}", "9" * 400]

# What each field does accept of ODD; everything else must be refused.
NUMBERS = {
    "temperature": ["1.5"],
    "top_p": [],
    "top_k": [],
    "min_p": [],
    "repetition_penalty": ["1.5"],
    "presence_penalty": ["-1", "1.5"],
    "frequency_penalty": ["-1", "1.5"],
    "max_tokens": [],
    "min_tokens": [],
    "seed": [HUGE],
    "logprobs": [],
    "priority": ["-1"],
    "deadline_ms": [],
}
OTHERS = {
    "job_id": ['"1"'],
    "prompt": ['"1"'],
    "prompt_token_ids": [],
    "messages": [],
    "stop": ['"1"', "[]"],
    "stop_token_ids": ["[]"],
    "logit_bias": ["{}"],
    "ignore_eos": ["true"],
    "cache_salt": ['"1"'],
}
EXECUTE = [
    (field, value)
    for field, accepted in {**NUMBERS, **OTHERS}.items()
    for value in ODD
    if value not in accepted
]


def with_field(base, field, value):
    """JSON text in which `field` has the literal `value`, which may be no JSON at all."""
    return json.dumps({name: v for name, v in base.items() if name != field})[:-1] + f', "{field}": {value}}}'


def found(value):
    return {"1e999": PLUS, "null": "null"}.get(value, value)


async def post(http, path, text):
    return await http.post(path, content=text, headers={"content-type": "application/json"})


async def test_every_odd_value_of_every_field_of_execute_is_refused_by_name(world):
    w = world()
    async with w.http() as http:
        for field, value in EXECUTE:
            text = with_field({"job_id": "j", "prompt": "x"}, field, value)
            response = await post(http, "/execute", text)
            told = response.text
            assert response.status_code == 400, (field, value, told)
            error = response.json()["error"]
            assert error["code"] == "INVALID_REQUEST", told
            assert error["message"].startswith(field), (value, told)
            assert error["details"]["param"].startswith(field), (value, told)
            if field in NUMBERS and len(value) < 60:
                assert f"found {found(value)}" in error["message"], (value, told)
                assert "allowed: a number" in told or "allowed: an integer" in told, (value, told)
        assert (await post(http, "/execute", '{"job_id": "j", "prompt": "x"}')).status_code == 200
    assert len(w.engine.submitted) == 1
    assert w.client.num_admitted == 0
    assert w.count('worker_requests_total{outcome="rejected"}') == len(EXECUTE)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        (CompletionRequest, {"prompt": "x"}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_every_odd_value_of_the_openai_fields_is_refused_by_name(model, base):
    accepted = {
        **NUMBERS,
        "top_k": ["-1"],
        "seed": ["-1", HUGE],
        "n": [],
        "stop": OTHERS["stop"],
        "logit_bias": OTHERS["logit_bias"],
    }
    if model is ChatRequest:
        accepted |= {"top_logprobs": [], "logprobs": ["true"], "max_completion_tokens": []}
    tried = 0
    for field, allowed in accepted.items():
        for value in ODD:
            text = with_field(base, field, value).encode()
            if value in (*allowed, "null"):  # null means absent in this API
                read_model(model, text)
                continue
            tried += 1
            with pytest.raises(Exception, match=f"^{field}") as caught:
                read_model(model, text)
            assert type(caught.value).__name__ == "InvalidParameter", (field, value)
    assert tried > 150


@pytest.mark.parametrize("digits", [1, 3, 4, 18, 19, 20, 39, 308, 309, 310, 1000, 4299, 4300, 4301, 20_000])
@pytest.mark.parametrize("form", ["{}", "-{}", "{}.5", "{}e9", '{{"1": {}}}', "[{}]", "[[{}]]"])
async def test_numbers_of_any_length_are_a_callers_mistake(world, digits, form):
    """Also those that no float, or no integer of Python, can hold."""
    value = form.format("9" * digits)
    w = world()
    w.engine.step_seconds = 0.0
    fields = [*NUMBERS, *OTHERS, "unknown"]
    async with w.http() as http:
        for field in fields:
            for path, base in (
                ("/execute", {"job_id": "j", "prompt": "x"}),
                ("/v1/completions", {"prompt": "x"}),
            ):
                response = await post(http, path, with_field(base, field, value))
                late = field == "deadline_ms" and response.status_code == 504  # a few milliseconds are few
                assert late or response.status_code in (200, 400), (path, field, response.text)
    assert w.client.num_admitted == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 2.1, "temperature: found 2.1; allowed: a number from 0 to 2"),
        ("repetition_penalty", 0, "repetition_penalty: found 0; allowed: a number above 0 to 2"),
        ("logprobs", 21, "logprobs: found 21; allowed: an integer from 0 to 20"),
        ("job_id", "", 'job_id: found ""; allowed: text of 1 to 128 characters'),
        ("job_id", "x" * 129, "(131 characters); allowed: text of 1 to 128 characters"),
        ("ignore_eos", 1, "ignore_eos: found 1; allowed: true or false"),
        ("stop", ["a"] * 5, "allowed: a text or a list of at most 4 texts"),
        ("stop", ["a", ""], "allowed: a text or a list of at most 4 texts"),
        ("stop", ["a", 1], 'stop: found ["a", 1]; allowed: a text or'),
        ("logit_bias", {"x": 1}, "logit_bias: found"),
        ("logit_bias", {"-1": 1}, "logit_bias: found"),
        ("logit_bias", {"1": 101}, "logit_bias: found"),
        ("logit_bias", {"1": True}, "logit_bias: found"),
        ("stop_token_ids", [1] * 65, "stop_token_ids"),
        ("stop_token_ids", [True], "stop_token_ids[0]"),
        ("prompt", "", "prompt: found"),
        ("response_format", {"type": "json_object"}, "response_format is not supported in this version"),
        ("json_schema", {}, "json_schema is not supported in this version"),
        ("grammar", "x", "grammar is not supported in this version"),
        ("regex", "x", "regex is not supported in this version"),
        ("temprature", 1, "temprature: there is no such field; the fields are temperature, top_p"),
        ("prompt_token_ids", [1], "exactly one of prompt, prompt_token_ids and messages"),
        (
            "messages",
            [{"role": "user", "content": "x"}],
            "exactly one of prompt, prompt_token_ids and messages",
        ),
    ],
)
async def test_messages_say_what_was_found_and_what_is_allowed(world, field, value, message):
    async with world().http() as http:
        response = await http.post("/execute", json={"job_id": "j", "prompt": "x", field: value})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    if message.endswith("is not supported in this version"):
        assert response.json()["error"]["details"]["param"] == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"job_id": "j"}, "exactly one of prompt, prompt_token_ids and messages"),
        ({"prompt": "x"}, "job_id is required"),
        ({"job_id": "j", "prompt_token_ids": []}, "prompt_token_ids: found []"),
        ({"job_id": "j", "prompt_token_ids": [1, -1]}, "prompt_token_ids[1]: found -1"),
        (
            {"job_id": "j", "prompt_token_ids": [1, 261]},
            "prompt_token_ids[1]: found 261; allowed: token ids from",
        ),
        ({"job_id": "j", "prompt_token_ids": [2**31]}, "prompt_token_ids[0]: found 2147483648"),
        ({"job_id": "j", "prompt": "x", "stop_token_ids": [261]}, "stop_token_ids[0]: found 261"),
        ({"job_id": "j", "prompt": "x", "logit_bias": {"261": 1}}, "logit_bias[0]: found 261"),
        ({"job_id": "j", "prompt": "x", "max_tokens": 3, "min_tokens": 4}, "at most max_tokens, 3"),
        ({"job_id": "j", "messages": []}, "messages: found []"),
        ({"job_id": "j", "messages": [{"role": "user"}]}, "messages[0]: content: found null"),
        (
            {"job_id": "j", "messages": [{"role": "king", "content": ""}]},
            'role: found "king"; allowed: system',
        ),
        ({"job_id": "j", "messages": ["x"]}, "messages[0]: found"),
        (
            {
                "job_id": "j",
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            },
            'a content part of type "image_url" is not supported; allowed: text',
        ),
        (
            {"job_id": "j", "messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "tool_calls is not supported in this version",
        ),
    ],
)
async def test_requests_that_cannot_be_run(world, body, message):
    w = world()
    async with w.http() as http:
        response = await http.post("/execute", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not w.engine.submitted
    assert w.client.num_admitted == 0


async def test_messages_need_a_template(world):
    async with world(template=None).http() as http:
        body = {"job_id": "j", "messages": [{"role": "user", "content": "x"}]}
        response = await http.post("/execute", json=body)
    assert response.status_code == 400
    assert "the model file has no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the body is empty"),
        (b"  ", "the body is empty"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"job_id": "\xff"}', "not valid JSON"),
        (b'{"job_id": "j", "prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "not valid JSON"),
        (b'{"job_id": "j", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"{'job_id': 'j'}", "not valid JSON"),
    ],
)
async def test_bodies_that_are_no_json_object(world, text, message):
    async with world().http() as http:
        response = await post(http, "/execute", text)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("value", ["x", "-1", "0", "1.5", "", "9" * 30, "١"])
async def test_odd_deadline_headers(world, value):
    async with world().http() as http:
        response = await http.post(
            "/execute", json={"job_id": "j", "prompt": "x"}, headers={"X-Deadline": value.encode()}
        )
    assert response.status_code == 400
    assert "X-Deadline" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 202),
        ("Application/JSON; charset=utf-8", 202),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        (None, 415),
    ],
)
async def test_a_body_must_say_that_it_is_json(world, kind, status):
    headers = {} if kind is None else {"content-type": kind}
    async with world().http() as http:
        response = await http.post("/cancel", content=b'{"job_id": "j"}', headers=headers)
    assert response.status_code == status


async def test_a_compressed_body_is_refused(world):
    async with world().http() as http:
        response = await http.post("/cancel", json={"job_id": "j"}, headers={"content-encoding": "gzip"})
    assert response.status_code == 415


async def test_all_bodies_together_are_bounded(world, eventually):
    w = world(max_body_bytes=1024)
    w.app.state.context.bodies.max_bytes = 2500
    w.engine.go.clear()
    body = {"job_id": "1", "prompt": "x" * 400, "stop": ["y" * 250] * 2}
    async with w.http() as http:
        running = [
            asyncio.create_task(http.post("/execute", json=body | {"job_id": str(k)})) for k in range(2)
        ]
        await eventually(lambda: len(w.engine.submitted) == 2)
        refused = await http.post("/execute", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "QUEUE_FULL"
        assert (await http.get("/health")).status_code == 200
        w.engine.go.set()
        await asyncio.gather(*running)
        assert w.app.state.context.bodies.held_bytes == 0
        assert (await http.post("/execute", json=body)).status_code == 200


async def test_a_body_that_is_too_large_is_refused_while_it_is_read(world):
    w = world(max_body_bytes=2000)
    sent = 0

    async def endless():
        nonlocal sent
        while sent < 1_000_000:
            sent += 1000
            yield b"x" * 1000

    async with w.http() as http:
        chunked = await http.post("/execute", content=endless(), headers={"content-type": "application/json"})
        declared = await post(http, "/execute", b"x" * 2001)
    for response in (chunked, declared):
        assert response.status_code == 413
        assert response.headers["connection"] == "close"
        assert "2000 bytes" in response.json()["error"]["message"]
    assert sent < 5000
