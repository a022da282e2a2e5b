"""What a request may ask for: on both sides of each limit, and the worker serves on."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_orcd.config import ServerConfig
from worker_orcd.kernels.draw import Draws
from worker_orcd.runner.sampler import Sampler
from worker_orcd.sequence import Row, SampledToken, Sequence
from worker_orcd.server.body import read_model
from worker_orcd.server.openai.wire import MAX_CHOICES, MAX_PROMPTS
from worker_orcd.server.prompt import _sampling_params
from worker_orcd.server.wire import (
    MAX_COUNT,
    ExecuteRequest,
)

SERVER = Path(__file__).parents[2] / "src" / "worker_orcd"
HI = [{"role": "user", "content": "hi"}]
EXECUTE = {"job_id": "j", "prompt": "x", "max_tokens": 1}
BASES = {
    "/execute": EXECUTE,
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
}


async def post(http, path, text):
    return await http.post(path, content=text, headers={"content-type": "application/json"})


async def still_serves(w):
    async with w.http() as http:
        assert (await http.post("/execute", json=EXECUTE)).status_code == 200
    assert w.client.num_admitted == 0


async def test_fan_out(world, monkeypatch, tokenizer):
    """n and the number of prompts, alone and together, before anything is tokenised."""
    w = world(max_queue=64)
    w.engine.step_seconds = 0.0
    tokenised = []
    real = type(tokenizer).encode

    def encode(self, *args, **named):
        tokenised.append(args)
        return real(self, *args, **named)

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    async with w.http() as http:
        for n in (-(10**6), -1, 0, 1, 2, MAX_CHOICES - 1, MAX_CHOICES, MAX_CHOICES + 1, 10**6, 2**31, 2**64):
            for num_prompts in (1, 2, 4, 5, MAX_PROMPTS - 1, MAX_PROMPTS, MAX_PROMPTS + 1, 5000):
                tokenised.clear()
                body = {"prompt": ["x"] * num_prompts, "n": n, "max_tokens": 1}
                response = await http.post("/v1/completions", json=body)
                fits = 1 <= n <= MAX_CHOICES and num_prompts <= MAX_PROMPTS and n * num_prompts <= 64
                assert response.status_code == (200 if fits else 400), (n, num_prompts)
                assert fits or not tokenised
            body = {"messages": HI, "n": n, "max_tokens": 1}
            chat = await http.post("/v1/chat/completions", json=body)
            assert chat.status_code == (200 if 1 <= n <= MAX_CHOICES else 400)
        for best_of in (0, 2, 20, 10**6):
            response = await http.post("/v1/completions", json={"prompt": "x", "best_of": best_of})
            assert response.status_code == 400
    await still_serves(w)


async def test_empty_prompt(world):
    w = world()
    empty = ["", [], [[]], [""], ["x", ""], [[1], []], None, {}, [None], [[None]], [{}], 0, False]
    async with w.http() as http:
        for prompt in empty:
            assert (await http.post("/v1/completions", json={"prompt": prompt})).status_code == 400, prompt
        for field, values in {
            "prompt": ["", None, [], 0],
            "prompt_token_ids": [[], None, [None], "x"],
            "messages": [
                [],
                None,
                [None],
                [[]],
                [{}],
                [{"role": "user"}],
                [{"role": "user", "content": None}],
            ],
        }.items():
            for value in values:
                response = await http.post("/execute", json={"job_id": "j", field: value})
                assert response.status_code == 400, (field, value)
        assert (await http.post("/v1/chat/completions", json={"messages": []})).status_code == 400
        for text in (" ", "\n", "\t \r\n", "\u00a0", "\u200b", "\x00"):  # not empty: tokens like any other
            assert (await http.post("/execute", json=EXECUTE | {"prompt": text})).status_code == 200
    await still_serves(w)


LITERALS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e309",
    "-1e309",
    "1e-400",
    "5e-324",
    "-0.0",
    "-1",
    "0",
    "1",
    "2",
]
LITERALS += [
    "2.0000000000000004",
    "1.5",
    str(2**31 - 1),
    str(2**31),
    str(2**53 + 1),
    str(2**63),
    str(2**64 - 1),
]
LITERALS += [
    str(2**64),
    str(-(2**63)),
    str(-(2**63) - 1),
    "9" * 310,
    "9" * 4300,
    "9" * 4301,
    '"1"',
    "true",
    "null",
]
NUMBERS = [
    name
    for name, field in ExecuteRequest.model_fields.items()
    if field.annotation in (int, float, int | None)
]


@pytest.mark.parametrize("path", BASES)
async def test_numbers_out_of_range(world, path):
    """Each numeric field with each literal: a range is a range, on both sides."""
    w = world()
    w.engine.step_seconds = 0.0
    assert len(NUMBERS) >= 12
    async with w.http() as http:
        for field in [*NUMBERS, "n", "top_logprobs", "max_completion_tokens", "unknown"]:
            base = {name: value for name, value in BASES[path].items() if name != field}
            for literal in LITERALS:
                text = json.dumps(base)[:-1] + f', "{field}": {literal}}}'
                response = await post(http, path, text)
                allowed = (200, 400, 504) if field == "deadline_ms" else (200, 400)
                assert response.status_code in allowed, (field, literal, response.text)
                if literal in ("NaN", "Infinity", "-Infinity", "1e309", "-1e309", '"1"'):
                    assert response.status_code == 400 or field not in NUMBERS
    assert all(np.isfinite(submit.sampling.temperature) for submit in w.engine.submitted)
    await still_serves(w)


@given(
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
            "top_k": st.sampled_from([0, 1, 2, 31, 32, 33, 2**31 - 1]),
            "repetition_penalty": st.floats(0, 2, exclude_min=True),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logprobs": st.sampled_from([0, 1, 20]),
            "logit_bias": st.dictionaries(st.sampled_from([str(k) for k in range(32)]), st.floats(-100, 100)),
        }
    ),
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=32, max_size=32),
)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_numbers_at_the_ends_of_their_ranges(fields, logits):
    """Whatever passes validation draws a token of the vocabulary, or fails the one row."""
    body = read_model(ExecuteRequest, json.dumps(EXECUTE | fields | {"seed": 1}).encode())
    sequence = Sequence(
        id=1,
        token_ids=[1, 2],
        max_tokens=9,
        stop_token_ids=frozenset(),
        sampling=_sampling_params(body, body.logprobs),
    )
    sequence.token_ids += [2, 31]
    draw = Draws(32).of(Row(sequence, num_tokens=3, start=1, num_draws=1))
    found = Sampler(32).sample(np.array(logits, np.float32), draw)
    assert not isinstance(found, SampledToken) or 0 <= found.token_id < 32


IDS = [
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    259,
    260,
    261,
    262,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    2**64,
    0.0,
    True,
    "1",
    None,
]


async def test_token_ids_out_of_range(world, tokenizer, events_of):
    w = world()
    w.engine.step_seconds = 0.0
    size = tokenizer.vocab_size
    async with w.http() as http:
        for token in IDS:
            fits = type(token) is int and 0 <= token < size
            cases = [
                ("/execute", {"job_id": "j", "prompt_token_ids": [1, token], "max_tokens": 1}),
                ("/execute", EXECUTE | {"stop_token_ids": [token]}),
                ("/v1/completions", {"prompt": [1, token], "max_tokens": 1}),
                ("/v1/completions", {"prompt": [[1], [token]], "max_tokens": 1}),
                ("/v1/chat/completions", {"messages": HI, "stop_token_ids": [token], "max_tokens": 1}),
                ("/detokenize", {"tokens": [token]}),
            ]
            if type(token) is int:
                cases += [(path, base | {"logit_bias": {str(token): 1}}) for path, base in BASES.items()]
            for path, body in cases:
                response = await http.post(path, json=body)
                assert response.status_code == (200 if fits else 400), (path, body)
        # And of what the engine says: an id of no token has no text (a model may have more rows than tokens),
        # or ends that answer, and no other.
        for token in (-(2**31), -1, size, size + 1, 2**31, 2**63):
            w.engine.answer = lambda submit, token=token: [token if submit.prompt_token_ids[0] == 65 else 66]
            bad, good = await asyncio.gather(
                http.post("/execute", json={"job_id": "bad", "prompt": "A", "max_tokens": 3}),
                http.post("/execute", json={"job_id": "good", "prompt": "x", "max_tokens": 3}),
            )
            told = events_of(bad.text)
            assert told[-1][0] in ("end", "error"), token
            assert not [data for name, data in told if name == "token" and data["t"]]
            assert events_of(good.text)[-1][0] == "end"
    w.engine.answer = lambda _: [65]
    await still_serves(w)


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("size", [1, 100, 10_000, 60_000, 500_000])
async def test_grammar_and_regex(world, size):
    """There are none in this version: whatever one is asked for with, the answer is no, and at once."""
    w = world()
    patterns = [
        "(" * size + ")" * size,
        "(a+)+$" * size,
        "a{1,99999}" * size,
        "[" * size,
        "\\" * size,
        "|" * size,
    ]
    async with w.http() as http:
        for path, base in BASES.items():
            for field in ("regex", "grammar", "guided_regex", "guided_grammar", "structured_outputs"):
                if path == "/execute" and field not in ("regex", "grammar"):
                    continue
                for pattern in patterns:
                    begun = time.process_time()
                    response = await http.post(path, json=base | {field: pattern[:2_000_000]})
                    assert response.status_code == 400
                    assert time.process_time() - begun < 5
            for field in ("response_format", "json_schema"):
                for depth in (1, 50, 90):
                    schema = {"type": "json_schema", "json_schema": {"schema": nested(depth)}}
                    assert (await http.post(path, json=base | {field: schema})).status_code == 400
                text = json.dumps(base)[:-1] + f', "{field}": ' + '{"a":' * size + "1" + "}" * size + "}"
                assert (await post(http, path, text)).status_code == 400
    assert not w.engine.submitted
    await still_serves(w)


def test_defaults_are_the_bounds_that_are_documented():
    config = ServerConfig()
    assert (config.host, config.api_key, config.max_queue) == ("127.0.0.1", None, 256)
    assert config.max_body_bytes <= 32 << 20 and config.max_prompt_chars <= config.max_body_bytes
    assert MAX_COUNT < 2**31


async def test_template_kwargs(world):
    """What is told to the template is what is listed; a template is never taken from a request."""
    w = world()
    evil = "{{ ''.__class__ }}"
    known = {"enable_thinking": True, "reasoning_effort": "low", "model_identity": "x"}
    names = [
        "chat_template",
        "tokenize",
        "messages",
        "tools",
        "bos_token",
        "documents",
        "add_generation_prompt",
    ]
    names += [
        "continue_final_message",
        "return_dict",
        "self",
        "__class__",
        "",
        "a" * 10_000,
        "range",
        "namespace",
    ]
    async with w.http() as http:

        async def status(body):
            return (
                await http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1} | body)
            ).status_code

        for name, value in known.items():
            assert await status({"chat_template_kwargs": {name: value}}) == 200
        for name in names:
            for value in (evil, True, [], {}, 1):
                assert await status({"chat_template_kwargs": known | {name: value}}) == 400, name
        assert await status({"chat_template": evil}) == 400
        for length, fits in ((0, 400), (1, 200), (31, 200), (32, 200), (33, 400), (10**6, 400)):
            assert await status({"reasoning_effort": "x" * length}) == fits
            assert await status({"chat_template_kwargs": {"reasoning_effort": "x" * length}}) == fits
        for length, fits in ((0, 400), (1, 200), (1024, 200), (1025, 400), (10**6, 400)):
            assert await status({"chat_template_kwargs": {"model_identity": "x" * length}}) in (fits, 400)
        for kwargs in ([], "x", 1, [["chat_template", evil]]):
            assert await status({"chat_template_kwargs": kwargs}) == 400
    await still_serves(w)
