"""The one table from what went wrong to what the client is told: status, code, JSON body and SSE event alike.

Two dialects: ours, `{"error": {code, message, details, correlation_id}}`, and under /v1 OpenAI's,
`{"error": {message, type, param, code}}`. Messages of caller's mistakes are passed on as they are (they name
what the caller sent); those of our own faults are stripped of anything that could be an address or a path,
and an exception that nobody raised on purpose is told as a reference only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from worker_orcd.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    DuplicateJob,
    EngineError,
    Forbidden,
    InsufficientMemory,
    InvalidParameter,
    LoadError,
    PayloadTooLarge,
    RequestError,
    Unauthorized,
    Unavailable,
    UnknownModel,
    WorkerError,
)

# The most particular class first: class, HTTP status, OpenAI type, OpenAI code (None: ours in lower case).
_TABLE: tuple[tuple[type[WorkerError], int, str, str | None], ...] = (
    (DuplicateJob, 409, "invalid_request_error", "duplicate_job"),
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (PayloadTooLarge, 413, "invalid_request_error", "payload_too_large"),
    (ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidParameter, 400, "invalid_request_error", "invalid_value"),
    (RequestError, 400, "invalid_request_error", None),
    (Forbidden, 403, "permission_error", "insufficient_permissions"),
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (Unavailable, 503, "service_unavailable_error", None),
    (InsufficientMemory, 503, "server_error", None),
    (LoadError, 500, "server_error", None),
    (DeadlineExceeded, 504, "timeout_error", None),
    (Cancelled, 499, "cancelled_error", None),
    (EngineError, 500, "server_error", None),
    (WorkerError, 500, "server_error", None),
)

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|~?/)[^\s'\",:;)]+")


# For the OpenAPI document: statuses of errors that any route may answer, that routes with a body may, and
# that jobs may; and what both dialects have in common.
ANYWHERE = (400, 401, 403, 500, 503)
WITH_BODY = (408, 413, 415)
OF_JOBS = (409, 499, 504)
ERROR_RESPONSE: dict[str, Any] = {
    "description": "what went wrong",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["code", "message"],
                        "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
                    }
                },
            }
        }
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a client is told, before a dialect is chosen."""

    status: int
    code: str  # of the table in docs/http-api.md
    message: str
    retriable: bool
    openai_type: str
    openai_code: str
    param: str | None = None
    retry_after: int | None = None  # seconds

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the failure, whatever the dialect."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status >= 500 and not self.retriable:
            headers["x-should-retry"] = "false"  # or the openai client repeats the work twice
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        return headers

    def native_body(self, correlation_id: str) -> dict[str, Any]:
        """`{"error": {code, message, details, correlation_id}}`"""
        details: dict[str, Any] = {"retriable": self.retriable}
        if self.param is not None:
            details["param"] = self.param
        if self.retry_after is not None:
            details["retry_after_seconds"] = self.retry_after
        error = {"code": self.code, "message": self.message, "details": details}
        return {"error": {**error, "correlation_id": correlation_id}}

    def openai_body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`, also as a chunk of a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.openai_type,
                "param": self.param,
                "code": self.openai_code,
            }
        }


def failure_of(error: BaseException, correlation_id: str) -> Failure:
    """The table looked up. Never raises; an unknown exception becomes INTERNAL with the reference."""
    if isinstance(error, HTTPException):
        return _http_failure(error)
    if not isinstance(error, WorkerError):
        message = f"an internal error happened; it is logged under the reference {correlation_id}"
        return Failure(
            status=500,
            code="INTERNAL",
            message=message,
            retriable=False,
            openai_type="server_error",
            openai_code="internal",
        )
    status, openai_type, openai_code = next(
        (status, openai_type, openai_code)
        for kind, status, openai_type, openai_code in _TABLE
        if isinstance(error, kind)
    )
    return Failure(
        status=status,
        code=error.code,
        message=error.message if isinstance(error, RequestError) else clean(error.message),
        retriable=error.retriable,
        openai_type=openai_type,
        openai_code=openai_code or error.code.lower(),
        param=error.param if isinstance(error, RequestError) else None,
        retry_after=error.retry_after if isinstance(error, Unavailable) else None,
    )


def _http_failure(error: HTTPException) -> Failure:
    """A refusal that is about HTTP and not about a field: 404, 405, 408, 415, …"""
    return Failure(
        status=error.status_code,
        code="INVALID_REQUEST",
        message=error.detail,
        retriable=False,
        openai_type="invalid_request_error",
        openai_code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request"),
    )


def clean(message: str) -> str:
    """One line without addresses and paths: safe to show to a stranger."""
    line = next((line for line in message.splitlines() if line.strip()), "")
    return _PATH.sub("(path)", _ADDRESS.sub("(address)", line))
