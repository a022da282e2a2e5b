"""The OpenAI API: what the wire carries, field by field."""

from __future__ import annotations

import asyncio
import json

import pytest

from worker_orcd.engine.messages import Output
from worker_orcd.sequence import FinishReason
from worker_orcd.server.openai.fields import HARMLESS, REFUSED

USER = [{"role": "user", "content": "Hi"}]
CALLS = [("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": USER})]


async def post(world, path, body, **headers):
    async with world.http() as http:
        return await http.post(path, json=body, headers=headers)


async def chunks(world, events_of, path, body):
    response = await post(world, path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.text)
    assert {name for name, _ in events} == {""}
    assert events[-1][1] == "[DONE]"
    return [data for _, data in events[:-1]]


async def test_a_chat_completion(world):
    w = world()
    response = await post(w, "/v1/chat/completions", {"messages": USER, "model": "small", "seed": 3})
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "small")
    assert isinstance(body["created"], int)
    assert body["system_fingerprint"] == w.serving.fingerprint
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"content": "hello world", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    (submit,) = w.engine.submitted
    prompt = len(submit.prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 10,
        "total_tokens": prompt + 10,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    assert submit.sampling.seed == 3
    assert submit.max_tokens == 512 - prompt  # null and absent: the rest of the context


async def test_a_chat_completion_in_chunks(world, events_of):
    w = world()
    got = await chunks(w, events_of, "/v1/chat/completions", {"messages": USER})
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in got}) == 1
    assert all("usage" not in chunk for chunk in got)
    deltas = [chunk["choices"][0]["delta"] for chunk in got]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello world"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in got]
    assert reasons == [None] * (len(got) - 1) + ["stop"]


@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_usage_comes_when_it_is_asked_for(world, events_of, path, body):
    w = world()
    got = await chunks(w, events_of, path, body | {"stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in got[:-1]] == [None] * (len(got) - 1)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 10
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    got = await chunks(w, events_of, path, body | {"stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in got]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    response = await post(w, path, body | {"stream_options": {"include_usage": True}})
    assert response.status_code == 400
    assert "only allowed when stream is true" in response.json()["error"]["message"]


async def test_a_completion(world, events_of):
    w = world()
    body = (await post(w, "/v1/completions", {"prompt": "Hi", "max_tokens": 4})).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello ", "length", None)
    got = await chunks(w, events_of, "/v1/completions", {"prompt": "Hi", "max_tokens": 4})
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == "hello "
    assert [chunk["choices"][0]["finish_reason"] for chunk in got][-2:] == [None, "length"]
    await post(w, "/v1/completions", {"prompt": "Hi", "max_tokens": None})
    assert w.engine.submitted[-1].max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["ab", [7]], [(97, 98), (7,)]),
    ],
)
async def test_prompts_of_every_shape(world, prompt, expected, tokenizer):
    w = world()
    response = await post(w, "/v1/completions", {"prompt": prompt})
    expected = [
        tuple(tokenizer.encode("".join(map(chr, ids)))) if 97 in ids or 99 in ids else ids for ids in expected
    ]
    assert [submit.prompt_token_ids for submit in w.engine.submitted] == expected
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], [[1], []], [1, "a"], [[1, True]], [-1], [261], [2**40], ["x"] * 65, 5]
)
async def test_prompts_that_are_none(world, prompt):
    w = world()
    response = await post(w, "/v1/completions", {"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")
    assert not w.engine.submitted


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), CALLS)
async def test_n_answers_to_one_prompt(world, events_of, path, body, streamed):
    w = world()
    w.engine.answer = lambda submit: [65 + submit.sampling.seed % 26] * 3 + [259]
    body = body | {"n": 3, "seed": 2**64 - 1}
    if streamed:
        texts = {}
        reasons = []
        for chunk in await chunks(w, events_of, path, body | {"stream_options": {"include_usage": True}}):
            usage = chunk["usage"]
            for choice in chunk["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
                reasons += [choice["index"]] if choice["finish_reason"] else []
        assert sorted(reasons) == [0, 1, 2]
    else:
        answer = (await post(w, path, body)).json()
        usage = answer["usage"]
        texts = {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]}
    seeds = [submit.sampling.seed for submit in w.engine.submitted]
    assert seeds == [2**64 - 1, 0, 1]
    letters = w.serving.tokenizer.token_text
    assert texts == {k: letters(65 + seed % 26) * 3 for k, seed in enumerate(seeds)}
    assert usage["prompt_tokens"] == len(w.engine.submitted[0].prompt_token_ids)  # counted once
    assert usage["completion_tokens"] == 12
    assert w.client.num_admitted == 0


async def test_n_and_prompts_are_bounded_together(world):
    w = world(max_queue=8)
    response = await post(w, "/v1/completions", {"prompt": ["a", "b", "c"], "n": 3})
    assert response.status_code == 400
    assert "9 sequences at once; at most 8" in response.json()["error"]["message"]
    assert not w.engine.submitted


async def test_the_first_failure_ends_all_choices(world, events_of, eventually):
    failure = Output(0, finish_reason=FinishReason.ERROR, error_code="VRAM_OOM", error="no memory")
    w = world()
    w.engine.answer = lambda submit: [65, failure] if submit.sampling.seed == 1 else [65]
    w.engine.step_seconds = 0.05  # so that the others have not ended by themselves
    body = {"prompt": "x", "n": 3, "seed": 0, "ignore_eos": True, "max_tokens": 400}
    response = await post(w, "/v1/completions", body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "vram_oom"
    await eventually(lambda: sorted(w.engine.cancelled) == [1, 3])
    events = events_of((await post(w, "/v1/completions", body | {"stream": True})).text)
    assert events[-1][1] == "[DONE]"
    assert events[-2][1] == {
        "error": {"message": "no memory", "type": "server_error", "param": None, "code": "vram_oom"}
    }
    assert all("error" not in data for _, data in events[:-2])
    await eventually(lambda: len(w.engine.cancelled) == 4)
    assert w.count('worker_requests_total{outcome="error"}') == 2


async def test_chat_logprobs(world, events_of, tokenizer):
    w = world()
    w.engine.answer = lambda _: [*"h€".encode(), 259]
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    content = (await post(w, "/v1/chat/completions", body)).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4  # not the end token
    assert content[0]["token"] == "h"
    assert (content[0]["logprob"], content[0]["bytes"]) == (-0.25, [104])
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -1.25]
    assert (content[1]["token"], content[1]["bytes"]) == ("\ufffd", [0xE2])  # a part of a character
    alone = (await post(w, "/v1/chat/completions", {"messages": USER, "logprobs": True})).json()
    assert [entry["top_logprobs"] for entry in alone["choices"][0]["logprobs"]["content"]] == [[]] * 4
    streamed = []
    for chunk in await chunks(w, events_of, "/v1/chat/completions", body):
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content
    refused = await post(w, "/v1/chat/completions", {"messages": USER, "top_logprobs": 2})
    assert refused.status_code == 400


async def test_completion_logprobs(world, events_of):
    w = world()
    w.engine.answer = lambda _: [*"h€!".encode(), 259]
    answer = (await post(w, "/v1/completions", {"prompt": "x", "logprobs": 2})).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "!"]
    assert logprobs["token_logprobs"] == [-0.25] * 5
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"h": -0.25, "i": -1.25}
    assert all(own == top[name] for name, own, top in zip(*list(logprobs.values())[:3], strict=True))
    zero = (await post(w, "/v1/completions", {"prompt": "x", "logprobs": 0})).json()["choices"][0]["logprobs"]
    assert zero["top_logprobs"][0] == {"h": -0.25}
    streamed = {name: [] for name in logprobs}
    for chunk in await chunks(w, events_of, "/v1/completions", {"prompt": "x", "logprobs": 2}):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == logprobs


async def test_stop_strings_across_tokens(world, events_of):
    w = world()
    w.engine.answer = lambda _: [*b"hello STOP there"]
    body = {"messages": USER, "stop": ["STOP"]}
    choice = (await post(w, "/v1/chat/completions", body)).json()["choices"][0]
    assert choice["message"]["content"] == "hello "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    got = await chunks(w, events_of, "/v1/chat/completions", body)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in got) == "hello "


async def test_echo(world, events_of):
    w = world()
    answer = (await post(w, "/v1/completions", {"prompt": ["Say ", [72, 73]], "echo": True, "n": 2})).json()
    second = w.serving.tokenizer.decode([72, 73])
    expected = ["Say hello world"] * 2 + [second + "hello world"] * 2
    assert [choice["text"] for choice in answer["choices"]] == expected
    got = await chunks(w, events_of, "/v1/completions", {"prompt": "Say ", "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == "Say hello world"
    refused = await post(w, "/v1/completions", {"prompt": "Say ", "echo": True, "logprobs": 1})
    assert refused.status_code == 400
    assert "not supported in this version" in refused.json()["error"]["message"]


async def test_the_newer_name_of_max_tokens_wins(world):
    w = world()
    body = {"messages": USER, "max_tokens": 3, "max_completion_tokens": 2}
    answer = (await post(w, "/v1/chat/completions", body)).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (await post(w, "/v1/chat/completions", body | {"max_completion_tokens": 0})).status_code == 400


async def test_sampling_by_the_names_of_openai_and_vllm(world):
    w = world()
    body = {"prompt": "x", "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "seed": -1}
    body |= {"stop_token_ids": [5], "priority": 3, "logit_bias": {"7": -100}, "stop": None, "user": "u"}
    assert (await post(w, "/v1/completions", body)).status_code == 200
    (submit,) = w.engine.submitted
    assert (submit.sampling.top_k, submit.sampling.min_p, submit.sampling.seed) == (0, 0.1, 2**64 - 1)
    assert (submit.sampling.logit_bias, submit.priority, submit.min_tokens) == (((7, -100.0),), 3, 1)
    assert 5 in submit.stop_token_ids


async def test_template_variables(world, monkeypatch, chat_template):
    w = world()
    seen = {}
    encode = type(chat_template).encode

    def spy(self, *arguments, **options):
        seen.update(options)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(type(chat_template), "encode", spy)
    body = {"messages": USER, "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    assert (await post(w, "/v1/chat/completions", body)).status_code == 200
    assert seen["extra"] == {"reasoning_effort": "low", "enable_thinking": False}
    for forbidden in ({"chat_template": "{{ 1 }}"}, {"tokenize": True}, {"messages": []}):
        refused = await post(w, "/v1/chat/completions", body | {"chat_template_kwargs": forbidden})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith("chat_template_kwargs")


@pytest.mark.parametrize("field", sorted(REFUSED))
async def test_fields_that_would_change_the_answer_are_refused(world, field):
    w = world()
    value = {"response_format": {"type": "json_object"}, "tools": [{"type": "function"}]}.get(
        field, "something"
    )
    for path, body in CALLS:
        response = await post(w, path, body | {field: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        assert f"{field} is not supported in this version" in response.json()["error"]["message"]
        for nothing in (None, *REFUSED[field]):
            assert (await post(w, path, body | {field: nothing})).status_code == 200
    assert w.client.num_admitted == 0


async def test_true_is_not_one(world):
    assert (await post(world(), "/v1/completions", {"prompt": "x", "best_of": True})).status_code == 400


async def test_fields_that_concern_nobody_here(world):
    w = world()
    for path, body in CALLS:
        harmless = await post(w, path, body | dict.fromkeys(HARMLESS, "x"))
        assert harmless.status_code == 200
        assert "x-ignored-fields" not in harmless.headers
        unknown = await post(w, path, body | {"zeta": 1, "alpha": [float("1")], "bad\r\nname": 1})
        assert unknown.headers["x-ignored-fields"] == "alpha, (unprintable), zeta"
        streamed = await post(w, path, body | {"zeta": 1, "stream": True})
        assert streamed.headers["x-ignored-fields"] == "zeta"


async def test_numbers_that_are_none_are_refused_even_where_nobody_looks(world):
    async with world().http() as http:
        response = await http.post(
            "/v1/completions",
            content='{"prompt": "x", "metadata": {"a": NaN}}',
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 400
    assert "NaN and Infinity" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["small", "default", None])
async def test_names_of_the_model(world, name):
    for path, body in CALLS:
        assert (await post(world(), path, body | {"model": name})).json()["model"] == "small"


async def test_other_models_do_not_exist(world):
    w = world()
    for path, body in CALLS:
        response = await post(w, path, body | {"model": "gpt-5"})
        assert response.status_code == 404
        assert response.json()["error"] == {
            "message": "The model 'gpt-5' does not exist here; this worker serves 'small'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    assert not w.engine.submitted


async def test_the_list_of_models(world):
    async with world().http() as http:
        listed = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/small")).json()
        other = await http.get("/v1/models/a/b")
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["max_model_len"]) == ("small", "model", 512)
    assert one["meta"]["n_ctx_train"] == 2048
    assert isinstance(one["created"], int)
    assert other.status_code == 404


async def test_a_prompt_that_is_too_long(world):
    for path, body in CALLS:
        text = "x" * 600
        body = {"prompt": text} if "prompt" in body else {"messages": [{"role": "user", "content": text}]}
        error = (await post(world(), path, body)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens. However, you requested" in error["message"]


async def test_a_full_queue_in_this_dialect(world, eventually):
    w = world(max_queue=1)
    w.engine.go.clear()
    async with w.http() as http:
        running = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"}))
        await eventually(lambda: w.engine.submitted)
        refused = await http.post("/v1/completions", json={"prompt": "x"})
        w.engine.go.set()
        assert (await running).status_code == 200
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers
    assert refused.json()["error"]["code"] == "queue_full"


async def test_a_deadline(world, events_of):
    w = world()
    w.engine.step_seconds = 0.01
    w.engine.answer = lambda _: [65]
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": 400}
    response = await post(w, "/v1/completions", body, **{"X-Deadline": "60"})
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    streamed = await post(w, "/v1/completions", body | {"stream": True, "deadline_ms": 60})
    assert events_of(streamed.text)[-2][1]["error"]["code"] == "deadline_exceeded"
    assert json.loads(response.text)["error"]["type"] == "timeout_error"
