"""Models that answer in messages: reasoning and content over HTTP, in both dialects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from worker_orcd.gguf.metadata import Metadata
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

USER = [{"role": "user", "content": "Hi"}]
NAMES = ["<|return|>", "<|call|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|constrain|>"]
START = "<|start|>assistant"
ANSWER = (
    "<|channel|>analysis<|message|>The user says hi: é.<|end|>"
    f"{START}<|channel|>commentary<|message|>One moment.<|end|>"
    f"{START}<|channel|>analysis<|message|>Be brief.<|end|>"
    f"{START}<|channel|>final<|message|>Hi, you! 🚀<|return|>"
)
REASONING, CONTENT = "The user says hi: é.\nBe brief.", "One moment.\nHi, you! 🚀"
CALL = (
    "<|channel|>analysis<|message|>Look.<|end|>"
    f'{START} to=functions.look<|channel|>commentary json<|message|>{{"at": 1}}<|call|>'
)
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}" + START


@pytest.fixture(scope="module")
def harmony() -> Tokenizer:
    """256 bytes and the control tokens: ids below 256 are bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    return load_tokenizer(
        Metadata(
            {
                "general.architecture": "gpt-oss",
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "gpt-4o",
                "tokenizer.ggml.tokens": [*letters, *NAMES],
                "tokenizer.ggml.token_type": np.array([1] * 256 + [3] * len(NAMES)),
                "tokenizer.ggml.merges": [],
                "tokenizer.ggml.eos_token_id": 256,
            }
        )
    )


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate(TEMPLATE)
    yield made
    made.close()


@pytest.fixture
def speaking(world, harmony, template):
    """A World whose model gives an answer written with the names of control tokens."""

    def make(answer: str = ANSWER, template: ChatTemplate = template):
        w = world(vocabulary=harmony, template=template)
        ids = harmony.encode(answer, add_special=False, parse_special=True)
        w.engine.answer = lambda _: list(ids)
        return w

    return make


async def post(w, path, body):
    async with w.http() as http:
        response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


async def chat(w, **body):
    completion = (await post(w, "/v1/chat/completions", {"messages": USER} | body)).json()
    ChatCompletion.model_validate(completion)
    return completion


async def chunks(w, events_of, **body):
    response = await post(w, "/v1/chat/completions", {"messages": USER, "stream": True} | body)
    events = [data for _, data in events_of(response.text)]
    assert events[-1] == "[DONE]"
    for chunk in events[:-1]:
        ChatCompletionChunk.model_validate(chunk)
    return events[:-1]


def joined(found, name, index=0):
    deltas = [c["delta"] for chunk in found for c in chunk["choices"] if c["index"] == index]
    return "".join(delta.get(name, "") for delta in deltas)


async def tokens(w, events_of, **body):
    response = await post(
        w, "/execute", {"job_id": "j"} | ({} if "prompt" in body else {"messages": USER}) | body
    )
    events = events_of(response.text)
    return [data for name, data in events if name == "token"], events[-1][1]


# --- chat completions --------------------------------------------------------------------------------------


async def test_reasoning_and_content(speaking):
    completion = await chat(speaking())
    (choice,) = completion["choices"]
    assert choice["message"] == {
        "content": CONTENT,
        "reasoning_content": REASONING,
        "role": "assistant",
        "refusal": None,
    }
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    usage = completion["usage"]
    reasoning = len("The user says hi: é.Be brief.".encode()) + 2  # and their ends
    assert usage["completion_tokens_details"] == {"reasoning_tokens": reasoning}
    assert usage["completion_tokens"] > reasoning


async def test_reasoning_and_content_in_chunks(speaking, events_of):
    w = speaking()
    found = await chunks(w, events_of, stream_options={"include_usage": True}, n=2)
    for index in (0, 1):
        assert joined(found, "reasoning_content", index) == REASONING
        assert joined(found, "content", index) == CONTENT
    deltas = [chunk["choices"][0]["delta"] for chunk in found[:-1]]
    assert [delta for delta in deltas if "role" in delta] == [{"role": "assistant", "content": ""}] * 2
    assert all(set(delta) <= {"content", "reasoning_content"} for delta in deltas if "role" not in delta)
    whole = await chat(w, n=2)
    assert found[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("length", range(1, 120, 7))
async def test_an_answer_cut_anywhere_is_a_beginning_of_it(speaking, events_of, length):
    w = speaking()
    completion = await chat(w, max_tokens=length)
    message = completion["choices"][0]["message"]
    assert completion["choices"][0]["finish_reason"] == "length"
    assert REASONING.startswith((message["reasoning_content"] or "").rstrip("\ufffd"))
    assert CONTENT.startswith(message["content"].rstrip("\ufffd"))
    found = await chunks(w, events_of, max_tokens=length)
    assert joined(found, "content") == message["content"]
    assert joined(found, "reasoning_content") == (message["reasoning_content"] or "")


async def test_a_call_is_told_as_reasoning(speaking, events_of):
    w = speaking(CALL)
    (choice,) = (await chat(w))["choices"]
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"] == 'Look.\n{"at": 1}'
    assert choice["finish_reason"] == "stop"
    assert joined(await chunks(w, events_of), "reasoning_content") == 'Look.\n{"at": 1}'


@pytest.mark.parametrize(
    "answer", ["Hello there.", "<|channel|>??Hello there.<|return|>", "<|message|>Hello there."]
)
async def test_malformed_answers_are_content(speaking, events_of, answer):
    w = speaking(answer)
    length = len(w.engine.answer(None))
    message = (await chat(w, max_tokens=length))["choices"][0]["message"]
    assert message["content"].removeprefix("??") == "Hello there."
    assert message["reasoning_content"] is None
    assert joined(await chunks(w, events_of, max_tokens=length), "content") == message["content"]


async def test_the_token_that_ends_an_answer_ends_a_header(speaking):
    message = (await chat(speaking("<|channel|>final json<|return|>")))["choices"][0]["message"]
    assert message["content"] == " json"  # a content type only if a message follows


async def test_stop_strings_cut_content_only(speaking, events_of):
    w = speaking()
    (choice,) = (await chat(w, stop=["hi", "you"]))["choices"]
    assert choice["message"]["reasoning_content"] == REASONING
    assert choice["message"]["content"] == "One moment.\nHi, "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "you")
    assert joined(await chunks(w, events_of, stop=["hi", "you"]), "content") == "One moment.\nHi, "


async def test_logprobs_are_of_content(speaking, events_of):
    w = speaking()
    body = {"logprobs": True, "top_logprobs": 1}
    content = (await chat(w, **body))["choices"][0]["logprobs"]["content"]
    told = bytes(itertools.chain.from_iterable(entry["bytes"] for entry in content))
    assert told.decode() == CONTENT.replace("\n", "")
    found = await chunks(w, events_of, **body)
    parts = [chunk["choices"][0]["logprobs"] or {"content": []} for chunk in found]
    assert [entry for part in parts for entry in part["content"]] == content


async def test_the_log_knows_all_that_was_said(world, harmony, template):
    w = world(vocabulary=harmony, template=template, log_prompts=True)
    w.engine.answer = lambda _: harmony.encode(ANSWER, parse_special=True)
    await chat(w)
    (end,) = [event for event in w.narrated() if event["event"] == "execute_end"]
    assert end["completion"] == "The user says hi: é.One moment.Be brief.Hi, you! 🚀"


async def test_completions_and_other_models_have_no_messages(speaking, world, events_of):
    w = speaking()
    answer = (await post(w, "/v1/completions", {"prompt": "x", "max_tokens": 200})).json()
    assert answer["choices"][0]["text"].startswith("analysisThe user says hi: é.assistantcommentary")
    assert "completion_tokens_details" not in answer["usage"]
    plain = await chat(world())
    assert "reasoning_content" not in plain["choices"][0]["message"]
    assert "completion_tokens_details" not in plain["usage"]


# --- execute -----------------------------------------------------------------------------------------------


async def test_token_events_name_their_channel(speaking, events_of, harmony):
    w = speaking()
    told, end = await tokens(w, events_of)
    assert [data["id"] for data in told] == w.engine.answer(None)
    assert [data["i"] for data in told] == list(range(len(told)))
    assert end["tokens_out"] == len(told)
    texts = {}
    for data in told:
        assert data["t"] == "" or "channel" in data
        assert "recipient" not in data
        texts[data.get("channel")] = texts.get(data.get("channel"), "") + data["t"]
    assert texts == {
        None: "",
        "analysis": "The user says hi: é.Be brief.",
        "commentary": "One moment.",
        "final": "Hi, you! 🚀",
    }
    headers = harmony.decode([data["id"] for data in told if "channel" not in data], skip_control=False)
    names = ("analysis", "commentary", "analysis", "final")
    assert headers == START.join(f"<|channel|>{name}<|message|>" for name in names)


async def test_a_call_names_its_recipient(speaking, events_of):
    told, end = await tokens(speaking(CALL), events_of)
    call = [data for data in told if "recipient" in data]
    assert {(data["channel"], data["recipient"]) for data in call} == {("commentary", "functions.look")}
    assert "".join(data["t"] for data in call) == '{"at": 1}'
    assert end["stop_reason"] == "eos"


async def test_a_word_that_was_held_back_names_its_channel(speaking, events_of):
    told, _ = await tokens(speaking("to"), events_of, max_tokens=2)  # `to=` might have followed
    assert [(data["t"], data.get("channel")) for data in told] == [("", None), ("to", "final")]


async def test_a_raw_prompt_is_answered_in_one_text(speaking, events_of):
    told, _ = await tokens(speaking(), events_of, prompt="x")
    assert not any("channel" in data for data in told)
    assert "".join(data["t"] for data in told).startswith("analysisThe user says hi: é.assistantcommentary")


# --- what goes in ------------------------------------------------------------------------------------------


async def test_the_published_template(speaking, harmony):
    source = Path(__file__).parents[1] / "data" / "templates" / "openai-gpt-oss-120b.jinja"
    template = ChatTemplate(source.read_text(), clock=lambda: datetime(2026, 11, 25))
    w = speaking(template=template)
    fields = {"reasoning_effort": "high", "chat_template_kwargs": {"model_identity": "You are Orc."}}
    for body in (
        fields,
        {"chat_template_kwargs": {"model_identity": "You are Orc.", "reasoning_effort": "high"}},
    ):
        messages = [{"role": "developer", "content": "Be brief."}, *USER]
        await chat(w, messages=messages, max_tokens=3, **body)
        prompt = harmony.decode(w.engine.submitted[-1].prompt_token_ids, skip_control=False)
        assert prompt.startswith("<|start|>system<|message|>You are Orc.\nKnowledge cutoff: 2024-06\n")
        assert "Current date: 2026-11-25\n\nReasoning: high\n\n# Valid channels: analysis" in prompt
        assert prompt.endswith("Be brief.\n\n<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant")
    template.close()


@pytest.mark.parametrize("value", ["", "x" * 1025, 3, ["x"]])
async def test_an_identity_has_a_length(speaking, value):
    async with speaking().http() as http:
        body = {"messages": USER, "chat_template_kwargs": {"model_identity": value}}
        response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("chat_template_kwargs")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
async def test_reasoning_that_comes_back_is_for_the_template(world, name):
    source = "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }};{% endfor %}"
    w = world(template=ChatTemplate(source))
    messages = [
        {"role": "assistant", "content": "", name: "Hm."},
        {"role": "user", "content": "x", name: "No."},
    ]
    rendered = (await post(w, "/apply-template", {"messages": messages})).json()
    assert rendered["prompt"] == "Hm.|Hm.;|;"
    messages[0][name] = None
    assert (await post(w, "/apply-template", {"messages": messages})).json()["prompt"] == "|;|;"
    messages[0][name] = ["Hm."]
    async with w.http() as http:
        refused = await http.post("/apply-template", json={"messages": messages})
    assert refused.status_code == 400
    assert f"{name}: found" in refused.json()["error"]["message"]


async def test_reasoning_counts_as_characters_of_the_prompt(world):
    w = world(max_prompt_chars=10)
    messages = [{"role": "assistant", "content": "12345", "reasoning_content": "123456"}]
    async with w.http() as http:
        for path in ("/apply-template", "/v1/chat/completions"):
            assert (await http.post(path, json={"messages": messages})).status_code == 413
