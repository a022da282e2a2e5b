"""GGUF metadata with typed getters: each names the missing or wrong key, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Value = bool | int | float | str | list["Value"] | NDArray[np.generic]  # numeric arrays are numpy arrays


class Metadata:
    """Keys and values of a file. A getter without `default` raises InvalidModelFile where the key is absent."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def raw(self, key: str) -> Value | None:
        return self._values.get(key)

    def integer(self, key: str, *, low: int = 0, high: int = 2**63 - 1, default: int | None = None) -> int:
        raise NotImplementedError

    def optional_integer(self, key: str, *, low: int = 0, high: int = 2**63 - 1) -> int | None:
        raise NotImplementedError

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite float32/float64 (or integer) within [low, high]."""
        raise NotImplementedError

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        raise NotImplementedError

    def string(self, key: str, *, default: str | None = None) -> str:
        raise NotImplementedError

    def strings(self, key: str) -> list[str]:
        raise NotImplementedError

    def integers(self, key: str) -> NDArray[np.int64]:
        raise NotImplementedError

    def numbers(self, key: str) -> NDArray[np.float32]:
        raise NotImplementedError
