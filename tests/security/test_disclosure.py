"""Who gets in, and what gets out: keys, paths, hosts, errors, logs, caches and sockets."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from starlette.routing import Route

from worker_orcd import errors, hub
from worker_orcd.cli.settings import load_config
from worker_orcd.config import ServerConfig
from worker_orcd.errors import InvalidConfiguration, InvalidModelFile, WorkerError
from worker_orcd.server.auth import BearerToken, cache_salt
from worker_orcd.server.failures import failure_of

KEY, ADMIN, PROMPT = "k3y-of-a-client", "k3y-of-the-admin", "C4NARY-of-a-prompt"
HI = [{"role": "user", "content": PROMPT}]
CALLS = [
    ("/execute", {"job_id": "j", "prompt": PROMPT}),
    ("/execute", {"job_id": "j", "messages": HI}),
    ("/v1/completions", {"prompt": PROMPT}),
    ("/v1/completions", {"prompt": PROMPT, "stream": True}),
    ("/v1/chat/completions", {"messages": HI}),
    ("/v1/chat/completions", {"messages": HI, "stream": True}),
]
LEAKS = r"0x[0-9a-fA-F]{4,}|/home|/usr|/root|/tmp|Traceback|\.py\b|site-packages|C:\\"


def routes(app):
    found, pending = [], [app.routes]
    while pending:
        for route in pending.pop():
            if isinstance(route, Route):
                found += [(method, re.sub(r"{[^}]*}", "x", route.path)) for method in route.methods or ()]
            elif hasattr(route, "routes"):
                pending.append(route.routes)
            else:
                pending.append(route.original_router.routes)
    return found


@pytest.mark.parametrize("settings", [{"api_key": KEY}, {"api_key": f"{KEY}\nother", "admin_key": ADMIN}])
async def test_no_auth(world, settings):
    """Every route there is, with every credential that is none: 401, but for /livez."""
    w = world(**settings)
    tokens = ["", "x", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY}\tother", "other2", "é", KEY * 1000, "\x00"]
    headers = [{}] + [
        {"Authorization": f"{s} {t}".encode("latin-1")} for s in ("Bearer", "Basic") for t in tokens
    ]
    async with w.http() as http:
        for method, path in routes(w.app):
            for given in headers:
                answer = (await http.request(method, path, headers=given)).status_code
                assert answer == (200 if path == "/livez" else 401), (method, path, given)
    assert not w.shutdowns
    for host in ("0.0.0.0", "::", "10.0.0.1", "8.8.8.8", "fe80::1", "worker.example", "localhost.example"):
        with pytest.raises(InvalidConfiguration, match="--insecure"):
            load_config({"model": "demo", "host": host})


HOSTS = [
    "x/livez?",
    "x#",
    "x/docs",
    "x?",
    "/livez",
    "x\\livez",
    "x@y",
    "x,y",
    "x;y",
    "%2flivez",
    "x:80:80",
    "[x]",
]
PATHS = [
    "/v1/models",
    "//v1/models",
    "/v1/models/",
    "/v1//models",
    "/%2fv1/models",
    "/v1%2fmodels",
    "/health;/livez",
]
PATHS += [
    "/livez/../health",
    "/health?/livez",
    "/health%3f/livez",
    "/HEALTH",
    "/./health",
    "/health/.",
    "/\\health",
]


@pytest.mark.parametrize("root_path", ["", "/v", "/v1", "/livez", "/health"])
async def test_path_tricks(world, root_path):
    w = world(api_key=KEY)
    w.app.root_path = root_path
    async with w.http() as http:
        for host in ["127.0.0.1", *HOSTS]:
            for path in PATHS:
                url = f"http://127.0.0.1:8080{path}"
                status = (await http.get(url, headers={"Host": host.encode()})).status_code
                assert status in (400, 401, 404), (host, path)


def test_timing_of_key_compare(monkeypatch):
    """Digests, all of them, in constant time: of a key of any length, right or wrong."""
    seen = []
    real = __import__("hmac").compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: bool(seen.append((a, b))) or real(a, b))
    token = BearerToken(ServerConfig(api_key=f"{KEY}\nsecond\nthird", admin_key=ADMIN))
    for given in ("", "x", KEY[:-1], KEY, "second", ADMIN, "x" * 100_000):
        seen.clear()
        headers = type("H", (), {"getlist": lambda _self, _name, given=given: [f"Bearer {given}"]})()
        request = type("R", (), {"headers": headers, "scope": {}})()
        try:
            asyncio.run(token(request))
            assert given in (KEY, "second", ADMIN)
        except errors.Unauthorized:
            assert given not in (KEY, "second", ADMIN)
        assert [(len(a), len(b)) for a, b in seen] == [(32, 32)] * 4
    source = Path(errors.__file__).parent
    compared = (
        r"(?:api_key|admin_key|token)\s*(?:==|!=)\s*(?!None)|(?:==|!=)\s*(?:self\._)?(?:api_key|admin_key)"
    )
    for path in (source / "server").rglob("*.py"):
        assert not re.search(compared, path.read_text()), path


SECRET = "object at 0x7f12deadbeef in /home/me/model.gguf, /usr/lib/x.py:3"
RAISED = [
    *(
        kind(SECRET)
        for kind in (RuntimeError, KeyError, ValueError, OSError, TypeError, IndexError, AssertionError)
    ),
    *(
        kind(SECRET)
        for kind in (MemoryError, RecursionError, UnicodeError, ZeroDivisionError, LookupError, EOFError)
    ),
    FileNotFoundError(2, "No such file", "/home/me/secret"),
    *(kind(SECRET) for kind in (errors.Internal, errors.DeviceError, errors.OutOfMemory, errors.EngineError)),
    *(kind(SECRET) for kind in (errors.NotReady, errors.Draining, errors.QueueFull, errors.Cancelled)),
    *(kind(SECRET) for kind in (errors.InvalidModelFile, errors.InsufficientMemory, WorkerError)),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_errors_leak(world, monkeypatch, error):
    """In every dialect, before the answer begins and in the middle of its stream."""
    assert not re.search(LEAKS, json.dumps(failure_of(error, "r").openai_body()))
    for where in ("admit", "follow"):
        w = world()

        def fail(*_args, **_named):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(w.client), where, fail)
            async with w.http() as http:
                for path, body in CALLS:
                    response = await http.post(path, json=body)
                    assert not re.search(LEAKS, response.text), (where, path)
                    assert "error" in response.text


async def test_cross_request_data(world, events_of):
    """Many at once, each with a canary of its own: what comes back is its own."""
    w = world()
    w.engine.answer = lambda submit: [*submit.prompt_token_ids[-8:], 259]
    async with w.http() as http:

        async def ask(k):
            canary = f"{k:08d}"
            body = {"job_id": canary, "prompt": f"x {canary}", "logprobs": 2}
            events = events_of((await http.post("/execute", json=body)).text)
            assert "".join(data["t"] for name, data in events if name == "token") == canary
            other = (
                await http.post("/v1/completions", json={"prompt": [f"y {canary}", f"z {canary}"]})
            ).json()
            assert [choice["text"] for choice in other["choices"]] == [canary] * 2

        await asyncio.gather(*(ask(k) for k in range(40)))


def test_prefix_cache_timing():
    """Who does not share key and salt shares no hash of a block, so there is nothing to be measured."""
    identities = [b"", b"a" * 32, b"b" * 32]
    salts = {(i, s): cache_salt(i, s) for i in identities for s in ("", "x", "y", "x\x00", "x" * 256)}
    assert len(set(salts.values())) == len(salts)
    assert salts == {key: cache_salt(*key) for key in salts}  # and who does, shares them


HOST_NAMES = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "xlocalhost", "localhost."]
ORIGINS = [
    "http://evil.example",
    "null",
    "http://127.0.0.1:9",
    "https://127.0.0.1",
    "file://",
    "http://localhost",
    "",
]
KINDS = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
    "application/jsonx",
]


async def test_dns_rebinding_cors_csrf(world):
    w = world()
    async with w.http() as http:
        for method, path in routes(w.app):
            for host in HOST_NAMES:
                assert (await http.request(method, path, headers={"Host": host})).status_code == 403, (
                    path,
                    host,
                )
            if method != "POST":
                continue
            for origin in ORIGINS:
                response = await http.request(method, path, headers={"Origin": origin}, json={"job_id": "j"})
                assert response.status_code == 403, (path, origin)
                assert not [name for name in response.headers if name.startswith("access-control")]
            for kind in KINDS if path != "/shutdown" else []:
                response = await http.post(path, content=b'{"job_id": "j"}', headers={"content-type": kind})
                assert response.status_code == 415, (path, kind)
            asked = {"Origin": ORIGINS[0], "Access-Control-Request-Method": method}
            response = await http.options(path, headers=asked)
            assert response.status_code == 405
            assert not [name for name in response.headers if name.startswith("access-control")]
    assert not w.shutdowns and not w.engine.submitted


async def test_logs(world, monkeypatch):
    """A run through every route, good and bad, leaves neither a prompt nor a key in the log."""
    w = world(api_key=KEY, admin_key=ADMIN)
    lines = 'j\n{"event": "forged"}\r\x1b[31m\u2028\u202e'
    async with w.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        for path, body in CALLS:
            for changes in (
                {},
                {"temperature": 9},
                {"stop": [PROMPT] * 5},
                {PROMPT: PROMPT},
                {"seed": PROMPT},
            ):
                await http.post(path, json=body | changes)
        for path in ("/tokenize", "/apply-template", "/cancel"):
            await http.post(path, json={"prompt": PROMPT, "messages": HI, "job_id": PROMPT})
        await http.post(
            "/execute", json={"job_id": lines, "prompt": "x"}, headers={"X-Correlation-Id": "a b"}
        )
        await http.get(f"/{PROMPT}?key={KEY}", headers={"Authorization": "Bearer " + KEY + "x"})
        with monkeypatch.context() as patch:
            patch.setattr(type(w.client), "admit", lambda *_, **__: 1 / 0)
            await http.post(*CALLS[0][:1], json=CALLS[0][1])
    text = w.log.getvalue()
    assert text and not re.search(f"{PROMPT}|{KEY}|{ADMIN}|\x1b|\u202e", text)
    told = [json.loads(line) for line in text.splitlines() if line]
    assert "forged" not in {event["event"] for event in told}
    assert KEY not in repr(w.config) and ADMIN not in repr(w.config)


async def test_ipc(start):
    """A worker, with the processes that it starts, listens on one socket, of this machine only."""
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    async with start() as running:
        await running.until_ready()
        body = {"messages": [{"role": "user", "content": "a"}]}
        assert (await running.client.post("/apply-template", json=body)).status_code == 200
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {
            connection.laddr
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
        }
        found = listening - before
        assert {(address.ip, address.port) for address in found} == {
            ("127.0.0.1", running.client.base_url.port)
        }


def test_supply_chain(tiny_model, tmp_path, config):
    """One bit anywhere in a model file, and its digest is refused."""
    from worker_orcd.worker.loading import load

    data = bytearray(tiny_model.read_bytes())
    digest = hub.file_sha256(tiny_model)
    path = tmp_path / "tiny.gguf"
    for place in (0, 4, 24, len(data) // 2, len(data) - 1):
        for bit in (1, 128):
            data[place] ^= bit
            path.write_bytes(data)
            data[place] ^= bit
            with pytest.raises(InvalidModelFile, match="SHA-256"):
                load(replace(config, model=str(path), model_sha256=digest), warn=lambda _: None)
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        with pytest.raises(InvalidModelFile, match="SHA-256"):
            hub.check_sha256(path, digest)
    path.write_bytes(data)
    hub.check_sha256(path, digest.upper())
    assert path.stat().st_size == len(data)
