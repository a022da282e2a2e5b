"""GET /v1/models: the one model that this worker serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from worker_orcd.server.context import ContextOf
from worker_orcd.server.failures import ERROR_RESPONSE
from worker_orcd.server.json import JSON
from worker_orcd.server.openai.choices import require_model
from worker_orcd.server.status import Serving

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(context: ContextOf) -> JSON:
    """A list of one."""
    return JSON({"object": "list", "data": [_model(context.status.require_serving())]})


@router.get("/models/{model_id:path}", responses={404: ERROR_RESPONSE})
async def model(model_id: str, context: ContextOf) -> JSON:
    """The model, under its name or `default`."""
    serving = context.status.require_serving()
    require_model(model_id, serving.model_id)
    return JSON(_model(serving))


def _model(serving: Serving) -> dict[str, Any]:
    facts = serving.facts
    return {
        "id": serving.model_id,
        "object": "model",
        "created": serving.created,
        "owned_by": "worker-orcd",
        "max_model_len": facts.context_length,
        "meta": {
            "n_vocab": facts.vocab_size,
            "n_ctx_train": facts.trained_context_length,
            "architecture": facts.architecture,
            "quant_kind": facts.quant_kind,
        },
    }
