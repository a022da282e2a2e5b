"""GGUF metadata with typed getters: each names the missing or wrong key, what was found, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.types import ValueType

Value = bool | int | float | str | list["Value"] | NDArray[np.generic]  # numeric arrays are numpy arrays

T = TypeVar("T")

SHOWN_CHARACTERS = 64  # of a string from a file, in a message


def quoted(text: str) -> str:
    """A string from a file as it may stand in a message: short, on one line, printable."""
    if len(text) <= SHOWN_CHARACTERS:
        return ascii(text)
    return f"{text[:SHOWN_CHARACTERS]!a}… ({len(text)} characters)"


def describe(value: Value) -> str:
    """What a value is, for a message."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int):
        return f"the integer {value}"
    if isinstance(value, float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if isinstance(value, list):
        return f"an array of {len(value)} {'strings' if value and isinstance(value[0], str) else 'items'}"
    return f"an array of {value.size} {value.dtype.name}"


class Metadata:
    """Keys and values of a file. A getter without `default` raises InvalidModelFile where the key is absent.

    Getters do not convert between kinds: 1 is no boolean, True no integer, "1" neither.
    """

    def __init__(self, values: Mapping[str, Value], kinds: Mapping[str, ValueType] | None = None) -> None:
        """`kinds`: how the values are stored in the file they come from."""
        self._values = dict(values)
        self._kinds = dict(kinds or {})

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def raw(self, key: str) -> Value | None:
        return self._values.get(key)

    def kind(self, key: str) -> ValueType | None:
        """How a value is stored, where that is known: to write it again as it was."""
        return self._kinds.get(key)

    def integer(self, key: str, *, low: int = 0, high: int = 2**63 - 1, default: int | None = None) -> int:
        value = self.optional_integer(key, low=low, high=high)
        if value is not None:
            return value
        return self._default(key, default, f"an integer from {low} to {high}")

    def optional_integer(self, key: str, *, low: int = 0, high: int = 2**63 - 1) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite float32/float64 (or integer) within [low, high]."""
        allowed = f"a number from {low:g} to {high:g}"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, allowed)
        if not low <= value <= high or not math.isfinite(value):  # the comparison is false for NaN
            raise self._wrong(key, value, allowed)
        return float(value)

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, "a boolean")
        if not isinstance(value, bool):
            raise self._wrong(key, value, "a boolean")
        return value

    def string(self, key: str, *, default: str | None = None) -> str:
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, "a string")
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._required(key, "an array of strings")
        if not isinstance(value, list):
            raise self._wrong(key, value, "an array of strings")
        found = [item for item in value if isinstance(item, str)]
        if len(found) < len(value):
            raise self._wrong(key, value, "an array of strings")
        return found

    def integers(self, key: str) -> NDArray[np.int64]:
        allowed = f"an array of integers from {-(2**63)} to {2**63 - 1}"
        value = self._required(key, allowed)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong(key, value, allowed)
        if value.dtype.kind == "u" and value.size and int(value.max()) >= 2**63:
            raise InvalidModelFile(f"metadata key {quoted(key)} holds {value.max()}, but needs {allowed}")
        return value.astype(np.int64)

    def numbers(self, key: str) -> NDArray[np.float32]:
        """Finite float32s; from float32, float64 or integers."""
        value = self._required(key, "an array of finite numbers")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
            raise self._wrong(key, value, "an array of finite numbers")
        with np.errstate(over="ignore"):  # becomes infinite, and is refused below
            numbers = value.astype(np.float32)
        if not np.isfinite(numbers).all():
            index = int(np.argmin(np.isfinite(numbers)))
            raise InvalidModelFile(
                f"metadata key {quoted(key)} holds {value[index]!r} at {index}, but needs finite numbers"
            )
        return numbers

    def _required(self, key: str, allowed: str) -> Value:
        value = self._values.get(key)
        if value is None:
            raise InvalidModelFile(f"metadata key {quoted(key)} is missing; it needs {allowed}")
        return value

    @staticmethod
    def _default(key: str, default: T | None, allowed: str) -> T:
        if default is None:
            raise InvalidModelFile(f"metadata key {quoted(key)} is missing; it needs {allowed}")
        return default

    @staticmethod
    def _wrong(key: str, value: Value, allowed: str) -> InvalidModelFile:
        return InvalidModelFile(f"metadata key {quoted(key)} is {describe(value)}, but needs {allowed}")
