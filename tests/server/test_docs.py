"""docs/http-api.md names everything that the server knows: fields, routes, metrics, codes."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from worker_orcd.nvml import GpuSample
from worker_orcd.server.gpu import GpuState, Residency
from worker_orcd.server.metrics import Metrics
from worker_orcd.server.openai.fields import HARMLESS, REFUSED
from worker_orcd.server.openai.wire import ChatRequest, CompletionRequest
from worker_orcd.server.status import Status
from worker_orcd.server.wire import ExecuteRequest

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-zA-Z_0-9/.-]+)`", PAGE))


@pytest.mark.parametrize("model", [ExecuteRequest, CompletionRequest, ChatRequest])
def test_every_field_is_documented(model):
    assert {name for name in model.model_fields if name not in NAMED} == set()


def test_every_field_without_effect_is_documented():
    assert {*HARMLESS, *REFUSED} - NAMED == set()


def test_every_metric_is_documented():
    status = Status(worker_id="w", model_ref="m")
    everything = {one.name: 1 for one in fields(GpuSample) if one.name not in ("xids", "processes")}
    status.gpu = GpuState().seen(GpuSample(**everything), ())
    status.residency = Residency(resident=True)
    names = {family.name for family in Metrics(status).collect()}
    assert len([name for name in names if name.startswith("worker_gpu")]) == 12
    for name in names:
        assert name.removesuffix("_info") in PAGE, name


async def test_every_route_and_field_of_health_is_documented(world):
    w = world()
    async with w.http() as http:
        fields = (await http.get("/health")).json()
        paths = (await http.get("/openapi.json")).json()["paths"]
    assert {name for name in fields if name not in NAMED} == set()
    assert {path for path in paths if path not in PAGE and path != "/v1/models/{model_id}"} == set()
