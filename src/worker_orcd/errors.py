"""
Everything that can go wrong, by whose move comes next.

* WorkerError
  - LoadError            the model cannot be served: the process exits 1
    - ModelNotFound          no such file, or it could not be downloaded
    - InvalidModelFile       the file is truncated, hostile, or inconsistent
    - UnsupportedArchitecture
    - UnsupportedFormat      a tensor type we cannot execute
    - UnsupportedTokenizer
    - InsufficientMemory     the model or its KV cache does not fit
    - InvalidConfiguration   a setting is out of range or contradicts another
  - RequestError         the caller must change the request; `param` names the field
    - InvalidParameter
    - ContextLengthExceeded
    - DuplicateJob
    - UnknownModel
    - PayloadTooLarge
  - Unauthorized         the caller must present a (different) credential
    - Forbidden
  - Unavailable          the caller may try again after `retry_after` seconds
    - QueueFull
    - Draining
    - NotReady
      - Paused               the worker has left the device to others, jobs and all
  - Cancelled            somebody asked for it
  - DeadlineExceeded     the caller's own deadline passed
  - EngineError          we are at fault
    - DeviceError            the device is lost; the worker stops
    - OutOfMemory            the affected jobs end, the worker goes on
    - Internal

Messages name the parameter, key or tensor, what was found and what is allowed; never a path of the host,
an address or a traceback. `code` is the code on the wire; `server.failures` maps it to an HTTP status.
"""

from __future__ import annotations

from typing import ClassVar


class WorkerError(Exception):
    """Base of every error this package raises on purpose."""

    code: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        return str(self)


class LoadError(WorkerError):
    code = "MODEL_LOAD_FAILED"


class ModelNotFound(LoadError): ...


class InvalidModelFile(LoadError): ...


class UnsupportedArchitecture(LoadError): ...


class UnsupportedFormat(LoadError): ...


class UnsupportedTokenizer(LoadError): ...


class InsufficientMemory(LoadError):
    code = "INSUFFICIENT_VRAM"
    retriable = True


class InvalidConfiguration(LoadError):
    code = "INVALID_CONFIGURATION"


class RequestError(WorkerError):
    code = "INVALID_REQUEST"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameter(RequestError): ...


class ContextLengthExceeded(RequestError): ...


class DuplicateJob(RequestError): ...


class UnknownModel(RequestError): ...


class PayloadTooLarge(RequestError): ...


class Unauthorized(WorkerError):
    code = "UNAUTHORIZED"


class Forbidden(Unauthorized): ...


class Unavailable(WorkerError):
    retriable = True

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class QueueFull(Unavailable):
    code = "QUEUE_FULL"


class Draining(Unavailable):
    code = "DRAINING"


class NotReady(Unavailable):
    code = "NOT_READY"


class Paused(NotReady): ...


class Cancelled(WorkerError):
    code = "CANCELLED"


class DeadlineExceeded(WorkerError):
    code = "DEADLINE_EXCEEDED"


class EngineError(WorkerError): ...


class DeviceError(EngineError):
    code = "CUDA_ERROR"


class OutOfMemory(EngineError):
    code = "VRAM_OOM"
    retriable = True


class Internal(EngineError): ...
