"""The published schema is kept: requests made from it are answered as it says, and none with a fault."""

from __future__ import annotations

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from starlette.routing import Route

from worker_orcd.errors import DeviceError

pytestmark = pytest.mark.slow

HIDDEN = {"/livez", "/docs", "/openapi.json", "/docs/oauth2-redirect"}  # these are not of the API
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


def explore(operation, mode, url, examples, *, server_error=True):
    """Requests made from the schema (or, negative, in spite of it); the statuses of the answers."""
    seen = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case):
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=CHECKS if server_error else CHECKS[1:])
        if response.status_code >= 400 and operation.label != "GET /health":
            assert set(response.json()["error"]) >= {"message", "code"}
        seen.append(response.status_code)

    run()
    return seen


@pytest.mark.filterwarnings("ignore")
async def test_generated_requests_find_no_fault(world):
    w = world(max_queue=64)
    w.engine.step_seconds = 0.0
    w.engine.answer = lambda _: [104, 259]

    def all_operations(url):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        documented = [op for path in schema.raw_schema["paths"].values() for op in path.values()]
        assert not {"4XX", "5XX", "default", "422"} & {
            status for op in documented for status in op["responses"]
        }
        statuses = {}
        for result in schema.get_all_operations():
            operation = result.ok()
            good = explore(operation, GenerationMode.POSITIVE, url, 5)
            bad = []
            if operation.body:
                bad = explore(operation, GenerationMode.NEGATIVE, url, 5)
            statuses[operation.label] = (good, bad)
        return statuses

    async with w.listen() as port:
        statuses = await asyncio.to_thread(all_operations, f"http://127.0.0.1:{port}")
    assert {"POST /execute", "POST /v1/chat/completions", "GET /health", "GET /metrics"} <= set(statuses)
    assert 200 in statuses["POST /execute"][0]
    assert 200 in statuses["POST /v1/chat/completions"][0]
    assert all(status >= 400 for status in statuses["POST /execute"][1])
    assert set(statuses) == {f"{method} {path}" for method, path in operations(w.app)}


def operations(app):
    """Every operation that is served: that the document has them all is asked of the routes themselves."""
    found, pending = set(), [app.routes]
    while pending:
        for route in pending.pop():
            if isinstance(route, Route):
                shown = getattr(route, "include_in_schema", True) and route.path not in HIDDEN
                path = route.path.replace(":path}", "}")
                found |= {(method, path) for method in route.methods or ()} if shown else set()
            else:
                pending.append(route.routes if hasattr(route, "routes") else route.original_router.routes)
    return {(method, path) for method, path in found if method != "HEAD"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", ["loading", "draining", "failed", "locked", "full"])
async def test_a_worker_that_serves_nobody_answers_as_documented(world, state):
    """Whatever state it is in: no status that the document does not name, and none but 503 from 500 on."""
    w = world(loaded=state != "loading", api_key="k" if state == "locked" else None, max_queue=1)
    document = w.app.openapi()
    if state == "draining":
        w.status.begin_drain()
    elif state == "failed":
        w.status.fail(DeviceError("lost"))
    elif state == "full":
        w.client.admit("j")
    seen = {}

    def all_operations(url):
        schema = schemathesis.openapi.from_dict(document)
        for result in schema.get_all_operations():
            operation = result.ok()
            seen[operation.label] = explore(operation, GenerationMode.POSITIVE, url, 3, server_error=False)

    async with w.listen() as port:
        await asyncio.to_thread(all_operations, f"http://127.0.0.1:{port}")
    answered = {status for found in seen.values() for status in found}
    assert not {status for status in answered if status >= 500} - {503}
    assert answered == {401} if state == "locked" else 503 in answered
