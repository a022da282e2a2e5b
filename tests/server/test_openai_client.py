"""The real `openai` client against a real socket."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture
def connect(world):
    """The world, listening, and a client of it."""
    import contextlib

    @contextlib.asynccontextmanager
    async def connected(**settings):
        w = world(api_key="key", **settings)
        async with (
            w.listen() as port,
            openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0
            ) as client,
        ):
            yield w, client

    return connected


USER = [{"role": "user", "content": "Hi"}]


async def test_a_chat(connect):
    async with connect() as (_, client):
        answer = await client.chat.completions.create(
            model="small", messages=USER, logprobs=True, top_logprobs=2
        )
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer._request_id


async def test_a_streamed_chat_of_two(connect):
    async with connect() as (_, client):
        stream = await client.chat.completions.create(
            model="small", messages=USER, n=2, stream=True, stream_options={"include_usage": True}
        )
        texts = ["", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            usage = chunk.usage
    assert texts == ["hello world"] * 2
    assert usage.completion_tokens == 20


async def test_the_stream_helper(connect):
    async with (
        connect() as (_, client),
        client.chat.completions.stream(model="small", messages=USER) as stream,
    ):
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == "hello world"
    assert final.choices[0].finish_reason == "stop"


async def test_completions(connect):
    async with connect() as (_, client):
        answer = await client.completions.create(
            model="small", prompt=["a", "b"], n=2, logprobs=1, max_tokens=3
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[3].logprobs.tokens == ["he", "ll", "o"]
        stream = await client.completions.create(model="small", prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_models(connect):
    async with connect() as (_, client):
        assert [model.id async for model in client.models.list()] == ["small"]
        assert (await client.models.retrieve("small")).owned_by == "worker-orcd"


async def test_errors_are_the_exceptions_they_should_be(connect):
    async with connect(max_queue=1) as (w, client):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="small", messages=USER, temperature=3)
        assert bad.value.param == "temperature"
        assert "found 3" in bad.value.message
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="other", messages=USER)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="small", prompt="x" * 600)
        assert long.value.code == "context_length_exceeded"
        w.status.begin_drain()
        with pytest.raises(openai.InternalServerError) as draining:
            await client.completions.create(model="small", prompt="x")
        assert draining.value.status_code == 503
        assert draining.value.request_id


async def test_leaving_a_stream_early_cancels_it(connect, eventually):
    async with connect() as (w, client):
        w.engine.answer = lambda _: [65]
        w.engine.step_seconds = 0.05  # so that it has not ended by itself before it is left
        stream = await client.chat.completions.create(
            model="small", messages=USER, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
        await eventually(lambda: w.engine.cancelled == [1])


async def test_an_error_in_the_stream_is_raised(connect):
    from worker_orcd.engine.messages import Output
    from worker_orcd.sequence import FinishReason

    async with connect() as (w, client):
        failure = Output(0, finish_reason=FinishReason.ERROR, error_code="INTERNAL", error="a fault")
        w.engine.answer = lambda _: [65, failure]
        stream = await client.chat.completions.create(model="small", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="a fault"):
            async for _ in stream:
                pass
