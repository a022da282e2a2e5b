"""POST /tokenize, /detokenize and /apply-template: the model's tokenizer and chat template by themselves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from worker_orcd.errors import InvalidParameter
from worker_orcd.server.body import describes, json_body
from worker_orcd.server.context import ContextOf
from worker_orcd.server.json import JSON
from worker_orcd.server.prompt import require_short
from worker_orcd.server.wire import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize", openapi_extra=describes(TokenizeRequest))
async def tokenize(
    context: ContextOf, body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
) -> JSON:
    """Token ids of a text."""
    serving = context.status.require_serving()
    require_short(context, len(body.prompt), "prompt")
    ids = await context.in_thread(
        lambda: serving.tokenizer.encode(
            body.prompt, add_special=body.add_special_tokens, parse_special=body.parse_special
        )
    )
    return JSON({"tokens": ids, "count": len(ids), "max_model_len": serving.facts.context_length})


@router.post("/detokenize", openapi_extra=describes(DetokenizeRequest))
async def detokenize(
    context: ContextOf, body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]
) -> JSON:
    """The text of token ids."""
    serving = context.status.require_serving()
    size = serving.tokenizer.vocab_size
    for index, token_id in enumerate(body.tokens):
        if token_id >= size:
            message = f"tokens[{index}]: found {token_id}; allowed: token ids from 0 to {size - 1}"
            raise InvalidParameter(message, param="tokens")
    text = await context.in_thread(
        lambda: serving.tokenizer.decode(body.tokens, skip_control=body.skip_special_tokens)
    )
    return JSON({"prompt": text})


@router.post("/apply-template", openapi_extra=describes(ApplyTemplateRequest))
async def apply_template(
    context: ContextOf, body: Annotated[ApplyTemplateRequest, Depends(json_body(ApplyTemplateRequest))]
) -> JSON:
    """The prompt that the model's chat template makes of messages."""
    serving = context.status.require_serving()
    template = serving.chat_template
    if template is None:
        raise InvalidParameter(f"there is no chat template to apply: {serving.no_chat_template}")
    require_short(context, sum(message.num_chars for message in body.messages), "messages")
    messages = [message.for_template() for message in body.messages]
    prompt = await context.in_thread(
        lambda: template.render(messages, add_generation_prompt=body.add_generation_prompt)
    )
    return JSON({"prompt": prompt})
