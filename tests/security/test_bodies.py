"""What a request may consist of: text, nesting, sizes, heads; and what nobody may reach by it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_orcd.server.body import read_model
from worker_orcd.server.failures import clean
from worker_orcd.server.openai.wire import ChatRequest, CompletionRequest
from worker_orcd.server.protocol import BoundedProtocol
from worker_orcd.server.wire import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    ExecuteRequest,
)
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.harmony import CONTROLS, HarmonyStream
from worker_orcd.text.stream import TextStream

SERVER = Path(__file__).parents[2] / "src" / "worker_orcd"
HI = [{"role": "user", "content": "hi"}]
EXECUTE = {"job_id": "j", "prompt": "x", "max_tokens": 1}
BASES = {
    "/execute": EXECUTE,
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
}


BAD_TEXT = [
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\\ud800",
    b"\\udfff",
    b"\\u12",
]
BAD_TEXT += [b"\x00", b"\n", b"\x1f", b"\\x41", b"\\"]
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "system\n",
    "\n",
    " ",
    "assistant",
    "x",
]
PARTS = ["image_url", "input_audio", "file", "video_url", "input_image", "image", "url", "", "TEXT", "text "]
URLS = [
    "http://169.254.169.254/",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "gopher://x",
    "//x",
    "\\\\x\\y",
]


async def post(http, path, text):
    return await http.post(path, content=text, headers={"content-type": "application/json"})


async def still_serves(w):
    async with w.http() as http:
        assert (await http.post("/execute", json=EXECUTE)).status_code == 200
    assert w.client.num_admitted == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    ["a", "ab", "<|", "<|channel|>", "to=", "/", "/a", "0x", "~/", "C:\\", "{", "[", '{"a":', " \n", "\\u"],
)
def test_our_own_regexes(unit):
    """A megabyte that a model might say, in linear time: stop strings, messages, and messages of errors."""

    def seconds(size, work):
        begun = time.process_time()
        work((unit * size)[:size])
        return time.process_time() - begun

    def stop_strings(text):
        stream = TextStream(
            stop=["a" * 255 + "b", "ab" * 127 + "c", "<|channel|>x", (unit * 256)[:255] + "\x00"]
        )
        for i in range(0, len(text), 64):
            stream.push(text[i : i + 64].encode())
        stream.finish()

    def messages(text):
        stream = HarmonyStream(["a" * 255 + "b"])
        for i in range(0, len(text), 64):
            stream.text(text[i : i + 64].encode())
            if i % 6400 == 0:
                stream.control(
                    CONTROLS[("<|channel|>", "<|message|>", "<|end|>", "<|start|>")[i // 6400 % 4]]
                )

    for work in (stop_strings, messages, clean):
        small, large = (min(seconds(size, work) for _ in range(2)) for size in (250_000, 1_000_000))
        assert large < max(12 * small, 0.1), (work.__name__, small, large)
        assert large < 20


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", "🚀", " ", "\n", "世", "<|im_end|>", "e\u0301", "'s"])
def test_tokeniser_cost(tokenizer, unit):
    def seconds(size):
        text = (unit * size)[:size]
        begun = time.process_time()
        tokenizer.encode(text, add_special=True, parse_special=False)
        return time.process_time() - begun

    small, large = (min(seconds(size) for _ in range(2)) for size in (100_000, 400_000))
    assert large < max(10 * small, 0.2)
    assert large < 30


async def test_lengths_of_prompts(world):
    """Of text, and of everything that a template is given, before the tokeniser sees any of it."""
    w = world(max_prompt_chars=300, max_body_bytes=1 << 20)
    w.engine.step_seconds = 0.0
    async with w.http() as http:
        for length in (1, 299, 300, 301, 1000, 100_000):
            text, too_long = "x" * length, length > 300
            for path, body in [
                ("/execute", EXECUTE | {"prompt": text}),
                ("/v1/completions", {"prompt": [text], "max_tokens": 1}),
                ("/tokenize", {"prompt": text}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
                (
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": "", "name": text}], "max_tokens": 1},
                ),
                ("/apply-template", {"messages": [{"role": "assistant", "content": "", "thinking": text}]}),
                ("/apply-template", {"messages": [{"role": "user", "content": "", "name": text}]}),
                (
                    "/apply-template",
                    {"messages": [{"role": "user", "content": "x"}] * min(length, MAX_MESSAGES)},
                ),
            ]:
                response = await http.post(path, json=body)
                assert response.status_code == (413 if too_long else 200), (path, length, response.text)


async def test_lengths_of_lists(world):
    w = world(max_body_bytes=32 << 20)
    w.engine.step_seconds = 0.0
    cases = {
        "stop": (lambda n: ["s"] * n, MAX_STOP_STRINGS),
        "stop_token_ids": (lambda n: [1] * n, MAX_STOP_TOKENS),
        "logit_bias": (lambda n: {f"{k:010}": 1 for k in range(n)}, min(MAX_BIASES, 261)),
    }
    async with w.http() as http:
        for path, base in BASES.items():
            for field, (make, most) in cases.items():
                for n in (0, 1, most - 1, most, most + 1, 10 * most, 100_000):
                    response = await http.post(path, json=base | {field: make(n)})
                    assert response.status_code == (200 if n <= most else 400), (path, field, n)
            for length in (1, MAX_STOP_CHARS - 1, MAX_STOP_CHARS, MAX_STOP_CHARS + 1, 10**6):
                response = await http.post(path, json=base | {"stop": ["s" * length]})
                assert response.status_code == (200 if length <= MAX_STOP_CHARS else 400)
        for n in (1, MAX_MESSAGES, MAX_MESSAGES + 1, 20_000):
            body = {"messages": [{"role": "user", "content": ""}] * n}
            assert (await http.post("/apply-template", json=body)).status_code == (
                200 if n <= MAX_MESSAGES else 400
            )
        for length in (1, 127, 128, 129, 10**6):
            for path in ("/execute", "/cancel"):
                body = (EXECUTE if path == "/execute" else {}) | {"job_id": "j" * length}
                assert ((await http.post(path, json=body)).status_code < 300) == (length <= 128)
    await still_serves(w)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.one_of(
                    st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields]),
                    st.text(max_size=5),
                ),
                inner,
                max_size=5,
            ),
        ),
        max_leaves=20,
    )
)
@settings(max_examples=600, deadline=None)
def test_any_json_is_a_request_or_a_callers_mistake(value):
    from worker_orcd.errors import RequestError

    for model in (ExecuteRequest, CompletionRequest, ChatRequest):
        for data in (
            json.dumps(value),
            json.dumps(value)[:-1],
            json.dumps({"prompt": "x", "messages": value}),
        ):
            with contextlib.suppress(RequestError):
                read_model(model, data.encode())


@pytest.mark.parametrize("depth", [1, 10, 100, 190, 198, 199, 200, 201, 202, 250, 1000, 100_000])
async def test_nesting(world, depth):
    """Of JSON in any place: an answer, and never a lost interpreter stack."""
    w = world()
    forms = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth, '[{"a":' * depth]
    async with w.http() as http:
        for path, base in BASES.items():
            for field in (
                "messages",
                "metadata",
                "prompt",
                "logit_bias",
                "stop",
                "chat_template_kwargs",
                "user",
            ):
                for form in forms:
                    response = await post(http, path, json.dumps(base)[:-1] + f', "{field}": {form}}}')
                    assert response.status_code in (200, 400), (path, field)
        for form in forms:
            assert (await post(http, "/execute", form)).status_code == 400
    await still_serves(w)


async def test_repeated_fields(world):
    """What was checked is what is used: of a name that occurs twice, the last."""
    w = world()
    async with w.http() as http:
        for first, last, status in (
            (1, 400, 200),
            (400, 1, 200),
            (1, -1, 400),
            (-1, 1, 200),
            (1, 10**9, 400),
        ):
            text = f'{{"job_id": "j", "prompt": "x", "max_tokens": {first}, "max_tokens": {last}}}'
            assert (await post(http, "/execute", text)).status_code == status
            assert status != 200 or w.engine.submitted[-1].max_tokens == last


async def test_text_that_is_none(world):
    w = world()
    async with w.http() as http:
        for bad in BAD_TEXT:
            for path, base in BASES.items():
                for field in (
                    "prompt",
                    "messages",
                    "stop",
                    "job_id",
                    "user",
                    "model",
                    "cache_salt",
                    "x" + bad.decode("latin-1"),
                ):
                    head = json.dumps({name: v for name, v in base.items() if name != field}).encode()[:-1]
                    text = head + b', "' + field.encode("latin-1") + b'": "a' + bad + b'q"}'
                    assert (await post(http, path, text)).status_code == 400, (path, field, bad)
        for good in ("\x00", "\x7f", "\u202e", "\ufeff", "\ufffe", "\U0010ffff", "\\ud83d\\ude80"):
            text = json.dumps(EXECUTE | {"prompt": "@"}).replace(
                "@", json.dumps(good)[1:-1].replace("\\\\", "\\")
            )
            assert (await post(http, "/execute", text)).status_code == 200, good
    await still_serves(w)


async def test_compressed_bodies(world):
    import gzip
    import zlib

    w = world()
    plain = json.dumps(EXECUTE).encode()
    bomb = gzip.compress(b" " * 50_000_000 + plain)
    for coding, body in [
        ("gzip", gzip.compress(plain)),
        ("gzip", bomb),
        ("deflate", zlib.compress(plain)),
        ("br", plain),
        ("zstd", plain),
        ("gzip, identity", plain),
        ("identity, gzip", plain),
        ("x" * 1000, plain),
        ("", plain),
    ]:
        async with w.http() as http:
            headers = {"content-type": "application/json", "content-encoding": coding}
            response = await http.post("/execute", content=body, headers=headers)
        assert response.status_code == 415, coding
    await still_serves(w)


async def test_sizes_of_bodies(world):
    w = world(max_body_bytes=4096)
    async with w.listen() as port:
        for size in (0, 100, 4095, 4096, 4097, 8192, 1_000_000):
            for chunked in (False, True):
                body = json.dumps(EXECUTE).encode()
                body = (body + b" " * (size - len(body)))[:size]
                framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
                head = b"POST /execute HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                head += b"Content-Type: application/json\r\n" + framing + b"\r\n\r\n"
                if chunked:
                    body = (b"%x\r\n%b\r\n" % (size, body) if size else b"") + b"0\r\n\r\n"
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                answer = b""
                with contextlib.suppress(ConnectionError):
                    writer.write(head + body)
                    answer = await reader.read()
                writer.close()
                if size <= 4096:
                    assert answer.split()[1] == (b"400" if size <= 0 else b"200"), (size, chunked, answer)
                else:
                    assert not answer or answer.split()[1] == b"413", (size, chunked, answer)
    await still_serves(w)


@pytest.mark.parametrize("size", [100, 65_000, 65_536, 66_000, 1_000_000, 100_000_000])
async def test_headers_and_slow_clients(world, size, eventually):
    """A head of any size is served or refused with 431; the slow are in tests/server/test_slow_clients.py."""
    w = world()
    alive = set()

    class Patient(BoundedProtocol):
        head_seconds = 600.0

        def connection_made(self, transport):
            alive.add(self)
            super().connection_made(transport)

        def connection_lost(self, exc):
            alive.discard(self)
            super().connection_lost(exc)

    w.protocol = Patient
    async with w.listen() as port:
        start = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-A: "
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(start)
            for _ in range(0, size, 1 << 20):
                writer.write(b"a" * min(size, 1 << 20))
                await writer.drain()
            writer.write(b"\r\n\r\n")
            answer = await reader.read()
        writer.close()
        if size + len(start) < 65_000:
            assert answer.endswith(b"ok\n")
        elif size > 65_536:
            assert not answer or b" 431 " in answer.split(b"\r\n")[0]
        await eventually(lambda: not alive)
    await still_serves(w)


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_special_token_injection(tokenizer, chat_template, text):
    """No text of a user becomes a control token, by whichever field it comes."""
    controls = tokenizer.control_ids
    assert not controls & set(tokenizer.encode(text, add_special=False, parse_special=False))
    plain = chat_template.encode(tokenizer, [{"role": "user", "content": "x"}])
    ids = chat_template.encode(tokenizer, [{"role": "user", "content": text, "name": text}])
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls]


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.01, 0.03])
async def test_lifecycle_race(world, moment):
    """A storm on every route while the worker begins to drain, and after: refused or served, never broken."""
    template = ChatTemplate("{{ messages[0].content }}")
    w = world(template=template)
    requests = [
        ("/tokenize", {"prompt": "x" * 1000}),
        ("/detokenize", {"tokens": [65] * 1000}),
        ("/apply-template", {"messages": HI}),
        *((path, {k: v for k, v in body.items() if k != "job_id"}) for path, body in BASES.items()),
    ]
    statuses = []

    async def storm(http, k):
        for round_ in range(8):
            path, body = requests[(k + round_) % len(requests)]
            body = body | ({"job_id": f"{k}-{round_}"} if path == "/execute" else {})
            statuses.append((path, (await http.post(path, json=body)).status_code))

    async with w.http() as http:
        tasks = [asyncio.create_task(storm(http, k)) for k in range(24)]
        await asyncio.sleep(moment)
        assert (await http.post("/shutdown")).status_code == 202
        w.status.begin_drain()
        w.client.cancel_all()
        w.engine.stop()
        await asyncio.gather(*tasks)
        assert await w.client.wait_idle(10)
        template.close()
        for path, body in requests:
            body = body | ({"job_id": "late"} if path == "/execute" else {})
            assert (await http.post(path, json=body)).status_code == 503
    assert {status for _, status in statuses} <= {200, 503}
    assert not [event for event in w.narrated() if "exception" in event]


async def test_ssrf_and_files(world, monkeypatch):
    """No request makes the worker open a connection or a file; it has nothing to do so with."""
    w = world()

    def refuse(*_args, **_named):
        raise AssertionError("something was opened")

    async with w.http() as http:
        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.setattr("socket.getaddrinfo", refuse)
        monkeypatch.setattr("builtins.open", refuse)
        for kind in PARTS:
            for url in URLS:
                part = {"type": kind, kind: {"url": url}, "url": url, "image_url": url}
                body = {"messages": [{"role": "user", "content": [part]}]}
                for path in ("/v1/chat/completions", "/apply-template"):
                    assert (await http.post(path, json=body)).status_code == 400, (path, kind)
        for name in ("../../etc/passwd", "/etc/passwd", "hf:a/b/c.gguf", "file:///x.gguf", *URLS):
            for path in ("/v1/completions", "/v1/chat/completions"):
                assert (await http.post(path, json=BASES[path] | {"model": name})).status_code == 404
            assert (await http.get(f"/v1/models/{name.replace('#', '')}")).status_code == 404
        monkeypatch.undo()
    clients = (
        "httpx",
        "requests",
        "urllib.request",
        "urllib3",
        "aiohttp",
        "http.client",
        "socket",
        "huggingface_hub",
    )
    found = [
        (path.name, name)
        for package in ("server", "text", "engine", "runner", "gguf", "model")
        for path in (SERVER / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.startswith(clients)
    ]
    assert found == []
