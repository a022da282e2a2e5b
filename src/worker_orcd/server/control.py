"""Health, readiness, metrics and shutdown: what a supervisor asks. Answered from memory, at any load."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from worker_orcd.server.auth import admins_only
from worker_orcd.server.context import Context, ContextOf
from worker_orcd.server.failures import failure_of
from worker_orcd.server.json import JSON
from worker_orcd.server.metrics import CONTENT_TYPE
from worker_orcd.server.status import CAPABILITIES, PROTOCOL
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION

router = APIRouter()


async def livez(_request: Request) -> Response:
    """The one route without a key: says that the process answers, and nothing else."""
    return PlainTextResponse("ok\n")


@router.get("/")
async def root(context: ContextOf) -> JSON:
    """Where to go from here, for somebody who typed the address into a browser."""
    shown = {"health": "/health", "execute": "/execute", "openai": "/v1"}
    docs = {"docs": "/docs"} if context.config.api_key is None else {}
    return JSON({"name": "worker-orcd", "version": VERSION, **shown, **docs})


@router.get("/health", responses={503: {"description": "the same facts: the worker has failed"}})
async def health(context: ContextOf) -> JSON:
    """Facts and state; 503 once the worker has failed, or its memory is where it must not be."""
    body = health_body(context)
    return JSON(body, status=503 if body["status"] == "unhealthy" else 200)


@router.get("/ready")
async def ready(context: ContextOf) -> JSON:
    """200 when a job would be accepted now; otherwise the error that it would get."""
    if (reason := context.status.not_ready()) is not None:
        raise reason
    return JSON({"ready": True, "state": context.status.state})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: ContextOf) -> Response:
    """Prometheus' text format."""
    return Response(context.metrics.exposition(), media_type=CONTENT_TYPE)


@router.post("/shutdown", status_code=202, dependencies=[Depends(admins_only)])
async def shutdown(context: ContextOf) -> JSON:
    """Refuse new jobs, finish the running ones within the grace period, exit 0."""
    context.request_shutdown()
    return JSON({"state": "draining"}, status=202)


def health_body(context: Context) -> dict[str, Any]:
    """Every documented field; what is not known before the model is loaded is null."""
    status = context.status
    running, waiting = context.metrics.running_and_waiting()
    body: dict[str, Any] = {
        "status": status.health,
        "state": status.state,
        "load_percent": round(status.load_percent, 1),
        "model": status.model_ref,
        "worker_id": status.worker_id,
        "uptime_seconds": round(status.uptime_seconds, 3),
        "running": running,
        "waiting": waiting,
        "max_queue": context.config.max_queue,
        "version": VERSION,
        "contract": REPRODUCIBILITY_CONTRACT,
        "protocol": PROTOCOL,
        "capabilities": list(CAPABILITIES),
        "degraded": status.degraded,
        "paused": status.paused,
        "failure": None,
        "resident": status.residency.resident,
        "residency_violation": status.residency.found,
        "gpu": status.gpu.body(),
    }
    if status.failure is not None:
        failure = failure_of(status.failure, "")
        body["failure"] = {"code": failure.code, "message": failure.message}
    return body | _model_facts(context)


_UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        "architecture",
        "quant_kind",
        "vram_bytes_used",
        "vram_bytes_total",
        "kv_blocks_total",
        "kv_blocks_free",
        "kv_block_size",
        "kv_groups",
        "tokenizer_kind",
        "vocab_size",
        "context_length",
        "trained_context_length",
        "device",
        "sm",
        "cuda_runtime_version",
        "model_sha256",
        "chat_template_sha256",
        "no_chat_template",
        "fingerprint",
    )
)


def _model_facts(context: Context) -> dict[str, Any]:
    serving = context.status.serving
    if serving is None:
        return _UNKNOWN
    facts, template = serving.facts, serving.chat_template
    groups = context.metrics.kv_groups()
    return {
        "model": serving.model_id,
        "architecture": facts.architecture,
        "quant_kind": facts.quant_kind,
        "vram_bytes_used": facts.memory_bytes_used,
        "vram_bytes_total": facts.memory_bytes_total,
        "kv_blocks_total": sum(group.total for group in groups),
        "kv_blocks_free": sum(group.free for group in groups),
        "kv_block_size": facts.kv_block_size,
        "kv_groups": [asdict(group) for group in groups],
        "tokenizer_kind": facts.tokenizer_kind,
        "vocab_size": facts.vocab_size,
        "context_length": facts.context_length,
        "trained_context_length": facts.trained_context_length,
        "device": facts.device,
        "sm": facts.sm,
        "cuda_runtime_version": facts.cuda_runtime_version,
        "model_sha256": facts.model_sha256,
        "chat_template_sha256": template.sha256 if template is not None else None,
        "no_chat_template": serving.no_chat_template if template is None else None,
        "fingerprint": serving.fingerprint,
    }
