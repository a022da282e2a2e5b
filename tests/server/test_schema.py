"""The published schema is kept: requests made from it are answered as it says, and none with a fault."""

from __future__ import annotations

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

pytestmark = pytest.mark.slow

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


def explore(operation, mode, url, examples):
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
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
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
