"""Routes that are called without FastAPI: nobody can tell from outside."""

from __future__ import annotations

import pytest

from worker_orcd.errors import DeviceError
from worker_orcd.server import execute
from worker_orcd.server.auth import BearerToken
from worker_orcd.server.context import context_of
from worker_orcd.server.edge import Edge
from worker_orcd.server.openai import chat, completions

MODULES = (execute, completions, chat)
BODIES = {
    "/execute": {"job_id": "j", "prompt": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_refused_is_no_fault(world, path):
    w = world()
    async with w.http() as http:
        refused = await http.post(path, json=BODIES[path] | {"temperature": 3})
        missing = await http.post(path, json={})
        text = await http.post(path, content=b"x", headers={"Content-Type": "text/plain"})
        answered = await http.post(path, json=BODIES[path])
    assert [r.status_code for r in (refused, missing, text, answered)] == [400, 400, 415, 200]
    assert "found 3; allowed: a number from 0 to 2" in refused.json()["error"]["message"]
    assert ("correlation_id" in refused.json()["error"]) == (path == "/execute")  # each in its dialect
    assert [event["event"] for event in w.narrated()] == ["execute_start", "execute_end"]
    assert w.count('worker_requests_total{outcome="rejected"}') == 3


@pytest.mark.parametrize("module", MODULES)
async def test_fastapi_would_do_the_same(world, module):
    """The same dependencies and the same function: a new dependency must be served here too."""
    ((path, direct),) = module.DIRECT.items()
    route = next(route for route in module.router.routes if route.path == path)
    assert route.methods == {"POST"}
    assert route.endpoint is direct.answer
    assert {dependency.call for dependency in route.dependant.dependencies} == {context_of, direct.read}
    app = world().app
    assert [type(dependency.dependency) for dependency in app.router.dependencies] == [BearerToken]
    assert not module.router.dependencies


@pytest.mark.parametrize("path", BODIES)
async def test_the_door_is_the_same(world, path):
    w = world(max_body_bytes=1024)
    async with w.http() as http:
        host = await http.post(path, json=BODIES[path], headers={"Host": "evil.example"})
        origin = await http.post(path, json=BODIES[path], headers={"Origin": "http://evil.example"})
        large = await http.post(path, json=BODIES[path] | {"user": "x" * 2000})
        named = await http.post(path, json={}, headers={"X-Correlation-Id": "mine"})
    assert [r.status_code for r in (host, origin, large, named)] == [403, 403, 413, 400]
    assert not w.engine.submitted
    assert named.headers["x-correlation-id"] == "mine"
    assert named.headers["x-content-type-options"] == "nosniff"
    assert w.app.state.context.bodies.held_bytes == 0


@pytest.mark.parametrize("path", BODIES)
async def test_a_fault_is_told_as_a_reference(world, path, monkeypatch):
    w = world()
    monkeypatch.setattr(w.client, "admit", lambda *_, **__: 1 / 0)
    async with w.http() as http:
        response = await http.post(path, json=BODIES[path])
    assert response.status_code == 500
    assert "ZeroDivisionError" not in response.text
    assert [event["event"] for event in w.narrated()] == ["error"]


@pytest.mark.parametrize("path", BODIES)
async def test_other_methods_and_the_schema(world, path):
    async with world().http() as http:
        other = await http.get(path)
        near = await http.post(path + "/", json=BODIES[path])
        schema = (await http.get("/openapi.json")).json()
    assert (other.status_code, other.headers["allow"], near.status_code) == (405, "POST", 404)
    assert "requestBody" in schema["paths"][path]["post"]


async def test_token_ids_and_short_texts_wait_for_no_thread(world):
    """A pool that takes no more work, as if others had its threads."""
    w = world()
    w.app.state.context.text_threads.shutdown()
    async with w.http() as http:
        own = await http.post("/execute", json={"job_id": "j", "prompt_token_ids": [1, 2]})
        openai = await http.post("/v1/completions", json={"prompt": [[1, 2], [3]]})
        wrong = await http.post("/execute", json={"job_id": "j", "prompt_token_ids": [1, 999]})
        text = await http.post("/v1/completions", json={"prompt": "x" * 128})
        long = await http.post("/execute", json={"job_id": "j", "prompt": "x" * 129})
        several = await http.post("/v1/completions", json={"prompt": ["x" * 65, "x" * 64]})
        many = await http.post("/v1/completions", json={"prompt": ["x"] * 17})
        chat = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert [r.status_code for r in (own, openai, wrong, text)] == [200, 200, 400, 200]
    assert [r.status_code for r in (long, several, many, chat)] == [500] * 4  # these want a thread
    assert "prompt_token_ids[1]: found 999" in wrong.json()["error"]["message"]
    assert "event: end" in own.text
    assert w.client.num_admitted == 0


async def test_a_failure_after_the_beginning_is_told_and_cuts_the_connection(world):
    """Even one that has a status of its own: another was sent."""

    async def late(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise DeviceError("broken")

    async def send(message):
        sent.append(message["type"])

    w, sent = world(), []
    headers = [(b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "POST", "path": "/execute", "http_version": "1.1", "headers": headers}
    context = w.app.state.context
    with pytest.raises(DeviceError):
        await Edge(late, config=context.config, narration=context.narration)(scope, None, send)
    assert sent == ["http.response.start"]
    assert [event["event"] for event in w.narrated()] == ["error"]
