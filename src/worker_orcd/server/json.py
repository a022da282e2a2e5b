"""JSON responses, encoded by msgspec."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response


class JSON(Response):
    """A whole JSON document as the response."""

    def __init__(
        self, content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(msgspec.json.encode(content), status, headers, media_type="application/json")
