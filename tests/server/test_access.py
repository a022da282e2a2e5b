"""Who may ask what: API key, Host, Origin, and what no error ever tells."""

from __future__ import annotations

import asyncio
import re
import uuid

import httpx
import pytest
from starlette.routing import Route

from worker_orcd.config import ServerConfig
from worker_orcd.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceError,
    Draining,
    DuplicateJob,
    Forbidden,
    InsufficientMemory,
    Internal,
    InvalidModelFile,
    InvalidParameter,
    NotReady,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    Unauthorized,
    UnknownModel,
)
from worker_orcd.server.auth import BearerToken, cache_salt
from worker_orcd.server.failures import clean, failure_of

KEY = "s3cret-k\u00e9y"
PROBES = {
    "/execute": {"job_id": "j", "prompt": "x"},
    "/v1/completions": {"prompt": "x"},
}


def routes(app):
    """Every (method, path) that the application answers, however it was registered."""
    found = []
    pending = [app.routes]
    while pending:
        for route in pending.pop():
            if isinstance(route, Route):
                path = re.sub(r"{[^}]*}", "x", route.path)
                found += [(method, path) for method in route.methods or ()]
            elif hasattr(route, "routes"):
                pending.append(route.routes)
            else:
                pending.append(route.original_router.routes)
    return sorted(found)


async def test_every_route_but_livez_needs_the_key(world):
    w = world(api_key=KEY)
    tried = []
    async with w.http() as http:
        for method, path in routes(w.app):
            if path == "/livez":
                continue
            response = await http.request(
                method, path, json=PROBES.get(path, {}) if method == "POST" else None
            )
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
            tried.append(path)
        assert (await http.get("/livez")).text == "ok\n"
    expected = {
        "/",
        "/execute",
        "/cancel",
        "/health",
        "/ready",
        "/shutdown",
        "/metrics",
        "/tokenize",
        "/detokenize",
    }
    expected |= {"/apply-template", "/v1/models", "/v1/models/x", "/v1/completions", "/v1/chat/completions"}
    assert set(tried) == expected
    assert not w.shutdowns
    assert not w.engine.submitted


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (f"Bearer  {KEY} ", 200),
        ("Bearer s3cret", 401),
        (f"Bearer {KEY}x", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("", 401),
    ],
)
async def test_the_key_as_a_bearer_token(world, header, status):
    async with world(api_key=KEY).http() as http:
        response = await http.get("/health", headers={"Authorization": header.encode()})
    assert response.status_code == status


async def test_two_authorization_headers_are_no_credential(world):
    async with world(api_key=KEY).http() as http:
        headers = [("Authorization", f"Bearer {KEY}".encode()), ("Authorization", b"Bearer x")]
        assert (await http.get("/health", headers=headers)).status_code == 401


async def test_a_refused_caller_is_not_asked_for_its_body(world):
    async def body():
        pytest.fail("the body was read")
        yield b""

    async with world(api_key=KEY).http() as http:
        assert (await http.post("/execute", content=body())).status_code == 401


def test_keys_are_compared_as_digests_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: bool(seen.append((a, b))))
    request = type("R", (), {"headers": type("H", (), {"getlist": lambda *_: ["Bearer long" * 50]})()})()
    with pytest.raises(Unauthorized):
        asyncio.run(BearerToken(ServerConfig(api_key="short\nlonger", admin_key="x"))(request))
    assert [[len(digest) for digest in pair] for pair in seen] == [[32, 32]] * 3


def test_caches_of_different_keys_and_salts_are_separate():
    salts = [cache_salt(key, asked) for key in (b"", b"a", b"b") for asked in ("", "x", "y")]
    assert len(set(salts)) == 9
    assert cache_salt(b"a", "x") == cache_salt(b"a", "x")
    assert cache_salt(b"", "") == b""


async def send_raw(port, *lines):
    """One request, written by hand; the status, or 0 when the connection was closed without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]) if answer else 0


async def test_no_trick_with_host_or_path_gets_past_the_key(world):
    w = world(api_key=KEY)
    hosts = [
        "x",
        "x/livez?",
        "x#",
        "x/docs",
        "x?",
        "x@livez",
        "x/v1/../livez",
        "a b",
        "",
        "\xe9",
        "[::1]",
        "x:99999999",
    ]
    paths = [
        "/v1/models",
        "//v1/models",
        "/v1/models/",
        "/%2fv1/models",
        "/v1%2fmodels",
        "/livez/../v1/models",
    ]
    paths += ["http://x/v1/models", "/./v1/models", "/V1/models", "/v1/models?x=/livez", "/livez/v1/models"]
    paths += ["/health;/livez", "/health%00", "/health%3f/livez"]
    statuses = set()
    async with w.listen() as port:
        for host in hosts:
            for path in paths:
                statuses.add(await send_raw(port, f"GET {path} HTTP/1.1", f"Host: {host}"))
        assert await send_raw(port, "GET /v1/models HTTP/1.1", "Host: a", "Host: a") == 400
        assert await send_raw(port, "GET /v1/models HTTP/1.1") == 400
        assert await send_raw(port, "GET /livez HTTP/1.0") == 200
        assert await send_raw(port, "GET /v1/models HTTP/1.0") == 401
    assert statuses == {400, 401, 404}


@pytest.mark.parametrize("root_path", ["/v", "/v1"])
async def test_a_root_path_opens_nothing(world, root_path):
    w = world(api_key=KEY)
    w.app.root_path = root_path
    async with w.http() as http:
        for path in (
            "/v1/models",
            "/v1/v1/models",
            "/v/v1/models",
            "/models",
            "/health",
            "/v1/health",
            "/v/livez/x",
        ):
            assert (await http.get(path)).status_code in (401, 404), path


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("worker.localhost", 200),
        ("[::1]:8080", 200),
        ("192.168.0.7", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 400),
        ("evil.example/", 400),
        ("localhost:x", 400),
    ],
)
async def test_a_local_worker_without_a_key_is_safe_from_dns_rebinding(world, host, status):
    async with world().http() as http:
        assert (await http.get("/health", headers={"Host": host})).status_code == status


async def test_every_request_is_looked_at_whatever_came_before(world):
    """The edge remembers who was let in last: that lets in nobody else."""
    own, other = ("Host", "127.0.0.1:8080"), ("Host", "evil.example")
    async with world().http() as http:
        for hosts, status in [
            ([("Host", "")], 400),
            ([own], 200),
            ([other], 403),
            ([own], 200),
            ([own, own], 400),
            ([own, other], 400),
            ([other, own], 400),
            ([("Host", "127.0.0.1:8080/")], 400),
            ([own], 200),
            ([("Host", "")], 400),
        ]:
            request = http.build_request("GET", "/health")
            request.headers = httpx.Headers(hosts)
            assert (await http.send(request)).status_code == status, hosts


@pytest.mark.parametrize("settings", [{"api_key": KEY}, {"host": "0.0.0.0"}])
async def test_a_worker_for_others_may_be_called_by_any_name(world, settings):
    async with world(**settings).http() as http:
        headers = {"Host": "worker.example:80", "Authorization": f"Bearer {KEY}".encode()}
        assert (await http.get("/health", headers=headers)).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1"])
async def test_pages_of_other_origins_can_change_nothing(world, origin):
    w = world()
    async with w.http() as http:
        response = await http.post("/shutdown", headers={"Origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
        preflight = await http.options(
            "/execute", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        )
        assert preflight.status_code == 405
        assert not w.shutdowns
        own = await http.post("/shutdown", headers={"Origin": "http://127.0.0.1:8080"})
        assert own.status_code == 202


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/execute/", "/v1/models/../x", "/%00"])
async def test_unknown_paths_in_the_shape_of_every_error(world, path):
    async with world().http() as http:
        response = await http.get(path)
    assert response.status_code == 404
    error = response.json()["error"]
    assert "there is no endpoint" in error["message"]
    if path.startswith("/v1"):
        assert set(error) == {"message", "type", "param", "code"}
    else:
        assert set(error) == {"code", "message", "details", "correlation_id"}
        assert error["code"] == "INVALID_REQUEST"


async def test_wrong_methods(world):
    async with world().http() as http:
        for method, path in [("GET", "/execute"), ("POST", "/health"), ("DELETE", "/v1/completions")]:
            response = await http.request(method, path)
            assert response.status_code == 405
            allowed = response.headers["allow"]
            assert allowed
            said = response.json()["error"]["message"]
            assert said == f"{path} does not take {method}; allowed: {allowed}"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses"])
async def test_what_other_servers_have_is_named_as_not_in_this_version(world, path):
    async with world().http() as http:
        response = await http.post(path, json={"input": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == f"{path} is not in this version"


@pytest.mark.parametrize("key", [None, KEY])
async def test_the_root_points_to_what_is_there(world, key):
    async with world(api_key=key).http() as http:
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
        assert key is None or (await http.get("/")).status_code == 401
        found = (await http.get("/", headers=headers)).json()
        assert found["name"] == "worker-orcd" and ("docs" in found) == (key is None)
        for name in {"docs", "health"} & found.keys():
            assert (await http.get(found[name], headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-DEF-123", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("", False),
        ("a\u00e9", False),
    ],
)
async def test_correlation_ids_are_echoed_or_made(world, sent, kept):
    async with world().http() as http:
        response = await http.get("/nothing", headers={"X-Correlation-Id": sent.encode()})
    echoed = response.headers["x-correlation-id"]
    assert (echoed == sent) is kept
    assert re.fullmatch("[A-Za-z0-9-]{1,64}", echoed)
    assert response.json()["error"]["correlation_id"] == echoed
    assert response.headers["x-request-id"] == echoed


async def test_made_correlation_ids_are_uuids_and_no_two_are_equal(world):
    async with world().http() as http:
        made = [(await http.get("/livez")).headers["x-correlation-id"] for _ in range(50)]
    found = [uuid.UUID(text) for text in made]
    assert [str(one) for one in found] == made and len(set(made)) == 50
    assert {(one.version, one.variant) for one in found} == {(4, uuid.RFC_4122)}


ERRORS = [
    (InvalidParameter("x", param="p"), 400, "INVALID_REQUEST"),
    (DuplicateJob("x"), 409, "INVALID_REQUEST"),
    (UnknownModel("x"), 404, "INVALID_REQUEST"),
    (PayloadTooLarge("x"), 413, "INVALID_REQUEST"),
    (Unauthorized("x"), 401, "UNAUTHORIZED"),
    (Forbidden("x"), 403, "UNAUTHORIZED"),
    (QueueFull("x"), 503, "QUEUE_FULL"),
    (Draining("x"), 503, "DRAINING"),
    (NotReady("x"), 503, "NOT_READY"),
    (InvalidModelFile("x"), 500, "MODEL_LOAD_FAILED"),
    (InsufficientMemory("x"), 503, "INSUFFICIENT_VRAM"),
    (OutOfMemory("x"), 500, "VRAM_OOM"),
    (DeadlineExceeded("x"), 504, "DEADLINE_EXCEEDED"),
    (Cancelled("x"), 499, "CANCELLED"),
    (DeviceError("x"), 500, "CUDA_ERROR"),
    (Internal("x"), 500, "INTERNAL"),
    (RuntimeError("x at 0x7fffdeadbeef in /home/me/secret.py"), 500, "INTERNAL"),
    (KeyError("/etc/passwd"), 500, "INTERNAL"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: type(value).__name__)
async def test_the_table_of_errors_over_http(world, monkeypatch, error, status, code):
    w = world()
    monkeypatch.setattr(type(w.client), "admit", lambda *_, **__: (_ for _ in ()).throw(error))
    async with w.http() as http:
        native = await http.post("/execute", json={"job_id": "j", "prompt": "x"})
        openai = await http.post("/v1/completions", json={"prompt": "x"})
    assert (native.status_code, openai.status_code) == (status, status)
    assert native.json()["error"]["code"] == code
    assert isinstance(openai.json()["error"]["code"], str)
    assert isinstance(openai.json()["error"]["type"], str)
    retriable = native.json()["error"]["details"]["retriable"]
    assert ("retry-after" in native.headers) == (code in ("QUEUE_FULL", "DRAINING", "NOT_READY"))
    assert (native.headers.get("x-should-retry") == "false") == (status >= 500 and not retriable)
    for response in (native, openai):
        assert not re.search(r"0x[0-9a-f]{6}|/home|/etc|Traceback|\.py", response.text)


async def test_an_unexpected_exception_is_logged_under_its_reference(world, monkeypatch):
    w = world()
    monkeypatch.setattr(type(w.status), "require_serving", lambda _: 1 / 0)
    async with w.http() as http:
        response = await http.post("/execute", json={"job_id": "j", "prompt": "x"})
    assert response.status_code == 500
    reference = response.headers["x-correlation-id"]
    assert reference in response.json()["error"]["message"]
    (told,) = w.narrated()
    assert told["correlation_id"] == reference
    assert "ZeroDivisionError" in told["exception"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("cannot open /home/me/model.gguf: no", "cannot open (path): no"),
        ("at 0x7FFFdead", "at (address)"),
        ("C:\\Users\\me\\x failed", "(path) failed"),
        ("~/models/x failed", "(path) failed"),
        ("Traceback (most recent call last):\n  File", "Traceback (most recent call last):"),
        ("needs 12 MB/s and 3/4", "needs 12 MB/s and 3/4"),
        ("", ""),
    ],
)
def test_messages_of_our_own_faults_are_cleaned(message, shown):
    assert clean(message) == shown
    assert failure_of(Internal(message), "r").message == shown
