"""Request bodies: read within limits, parsed strictly, validated with errors that say what was found.

Every error names the field, the value found and what is allowed. JSON is what RFC 8259 says: NaN and Infinity
are refused (and named as the value of their field), and so is anything nested deeper than 200.
"""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, TypeVar, Union, cast, get_args, get_origin

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from worker_orcd.errors import Cancelled, InvalidParameter, PayloadTooLarge, QueueFull
from worker_orcd.server.context import Context, ContextOf
from worker_orcd.server.edge import Attached, attached
from worker_orcd.server.failures import ERROR_RESPONSE, WITH_BODY
from worker_orcd.server.peer import peer_of

BODY_SECONDS = 30.0  # for a client to send its body
_MAX_SHOWN = 80  # characters of a value in a message
_MAX_TOLD = 3  # errors in one message


class Wire(BaseModel):
    """A request body. Strict: no text is taken for a number, no 1 for true, no NaN for anything."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    null_is_absent: ClassVar[bool] = False  # whether null leaves a field at its default, as in OpenAI's API


M = TypeVar("M", bound=Wire)


def json_body(model: type[M], *, may_be_rejected_job: bool = False) -> Callable[..., Awaitable[M]]:
    """A dependency that reads and validates the body. `may_be_rejected_job`: failing counts as a request."""

    async def read(request: Request, context: ContextOf) -> M:
        try:
            data = await read_bytes(request, context, seconds=BODY_SECONDS)
            return read_model(model, data)
        except (InvalidParameter, PayloadTooLarge, QueueFull, HTTPException):
            if may_be_rejected_job:
                context.metrics.request_ended("rejected")
            raise

    return read


def describes(model: type[Wire], *statuses: int) -> dict[str, Any]:
    """For `openapi_extra`: the request body as a schema without references, and errors with these statuses
    besides those of every route with a body.
    """
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    if not model.null_is_absent:
        for field in schema["properties"].values():
            if isinstance(field.get("anyOf"), list):  # X | None: the None only says that it may be absent
                field["anyOf"] = [kind for kind in field["anyOf"] if kind != {"type": "null"}]
                field.pop("default", None)
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    responses = {str(status): ERROR_RESPONSE for status in (*WITH_BODY, *statuses)}
    return {"requestBody": {"required": True, "content": content}, "responses": responses}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(value, definitions) for value in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = cast("dict[str, Any]", schema)
    if "$ref" in fields:
        return _inlined(definitions[fields["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in fields.items()}


async def read_bytes(request: Request, context: Context, *, seconds: float) -> bytes:
    """The whole body, counted against the budget of bodies until the request is over.

    Raises PayloadTooLarge and QueueFull as soon as that is known, HTTPException 408 and 415.
    """
    max_bytes = context.config.max_body_bytes
    known, peer = attached(request), peer_of(request.scope)
    length = known.header(b"content-length") or ""
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    held = 0

    def take(chunk: bytes) -> None:
        nonlocal held
        if held + len(chunk) > max_bytes:
            raise _too_large(max_bytes)
        context.bodies.hold(len(chunk))
        held += len(chunk)
        data.extend(chunk)

    known.stack.callback(lambda: context.bodies.release(held))
    try:
        if peer is not None and peer.has_sent_all:  # nothing to wait for
            async for chunk in request.stream():
                take(chunk)
        else:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    take(chunk)
    except ClientDisconnect:
        raise Cancelled("the client closed the connection") from None
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} seconds") from None
    if data:
        _require_json(known)
    return bytes(data)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than the {max_bytes} bytes that this worker takes")


def _require_json(known: Attached) -> None:
    """A web page can send text/plain or a form to anybody, application/json only with consent (CORS)."""
    kind = (known.header(b"content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the body must be application/json, not {kind or 'of unknown type'!r}")
    coding = known.header(b"content-encoding")
    if coding is not None and coding.lower() != "identity":
        raise HTTPException(
            415, f"the body must not be encoded; found Content-Encoding {coding[:32].lower()!r}"
        )


def read_model(model: type[M], data: bytes) -> M:
    """Bytes to a validated body. Raises InvalidParameter."""
    if not data.strip():
        raise InvalidParameter("the body is empty; a JSON object is needed")
    try:
        return validate(model, from_json(data, allow_inf_nan=False))
    except ValueError as error:
        problem = str(error)
    try:
        lenient = from_json(data, allow_inf_nan=True)
    except ValueError:
        raise InvalidParameter(f"the body is not valid JSON: {problem}") from None
    validate(model, lenient)  # names the field, if it is one of ours
    raise InvalidParameter("the body is not valid JSON: NaN and Infinity are not numbers")


def validate(model: type[M], body: object) -> M:
    """Parsed JSON as `model`. Raises InvalidParameter naming the first fields that are wrong."""
    if not isinstance(body, dict):
        raise InvalidParameter(f"the body must be a JSON object, not {shown(body)}")
    value = cast("dict[str, object]", body)
    nulls = [name for name, found in value.items() if found is None]
    if nulls and model.null_is_absent:
        value = {name: found for name, found in value.items() if found is not None}
    elif nulls:
        name = nulls[0][:_MAX_SHOWN]
        field = model.model_fields.get(name)
        wanted = f"; allowed: {allowed(field)}, or leave it out" if field is not None else ""
        raise InvalidParameter(f"{name}: found null{wanted}", param=name)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        told = "; ".join(_explain(model, problem) for problem in problems[:_MAX_TOLD])
        param = _path(problems[0]["loc"]) or problems[0].get("ctx", {}).get("field", "")
        raise InvalidParameter(told, param=param[:_MAX_SHOWN] or None) from None


def _explain(model: type[Wire], problem: ErrorDetails) -> str:
    path = _path(problem["loc"])
    match problem["type"]:
        case "missing":
            return f"{path} is required"
        case "extra_forbidden":
            return (
                f"{path[:_MAX_SHOWN]}: there is no such field; the fields are {', '.join(model.model_fields)}"
            )
        case "not_supported":
            return problem["msg"]
        case "value_error" | "assertion_error":
            prefix = f"{path}: " if path else ""
            return prefix + problem["msg"].removeprefix("Value error, ")
        case _:
            field = model.model_fields.get(str(problem["loc"][0])) if len(problem["loc"]) == 1 else None
            wanted = allowed(field) if field is not None else problem["msg"]
            return f"{path}: found {shown(problem['input'])}; allowed: {wanted}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def shown(value: object) -> str:
    """A value as it stood in the JSON, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"


def allowed(field: FieldInfo) -> str:
    """For people: "a number from 0 to 2"."""
    if field.description is not None:
        return field.description
    kind = _KINDS.get(_plain(field.annotation), "what the documentation says")
    bounds = {name: getattr(rule, name) for rule in field.metadata for name in _BOUNDS if hasattr(rule, name)}
    parts = [word.format(bounds[name]) for name, word in _BOUNDS.items() if bounds.get(name) is not None]
    unit = " characters" if {"min_length", "max_length"} & bounds.keys() else ""
    return " ".join([kind, *parts]) + unit


_KINDS: dict[object, str] = {float: "a number", int: "an integer", str: "text", bool: "true or false"}
_BOUNDS = {
    "ge": "from {}",
    "gt": "above {}",
    "le": "to {}",
    "lt": "below {}",
    "min_length": "of {}",
    "max_length": "to {}",
}


def _plain(annotation: object) -> object:
    """The X of X | None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
