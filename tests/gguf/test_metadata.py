"""Every getter with every kind of value: what it is for passes, everything else is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from worker_orcd.errors import InvalidModelFile
from worker_orcd.gguf.metadata import SHOWN_CHARACTERS, Metadata, Value, describe, quoted

INTEGERS: list[Value] = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
FLOATS: list[Value] = [
    0.0,
    -1.0,
    1.5,
    3.4028234663852886e38,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    math.nan,
]
BOOLEANS: list[Value] = [True, False]
STRINGS: list[Value] = ["", "1", "-1", "true", "\0", "x" * 10_000]
STRING_LISTS: list[Value] = [[], ["a"], ["", "1"]]
NESTED: list[Value] = [[["a"]], [[]], ["a", ["b"]], [np.zeros(1, np.int32)]]
INTEGER_ARRAYS: list[Value] = [
    np.array(values, dtype)
    for dtype, values in [
        ("u1", [0, 255]),
        ("i1", [-128, 127]),
        ("u2", [65535]),
        ("i2", [-32768]),
        ("u4", [2**32 - 1]),
        ("i4", [-(2**31)]),
        ("i8", [-(2**63), 2**63 - 1]),
        ("u8", [2**63 - 1]),
        ("i4", []),
    ]
]
TOO_LARGE: list[Value] = [np.array([0, 2**63], "u8"), np.array([2**64 - 1], "u8")]
FLOAT_ARRAYS: list[Value] = [np.array([0.0, -1.5], "f4"), np.array([1e30], "f8"), np.array([], "f4")]
NOT_FINITE: list[Value] = [np.array([0, v], "f4") for v in (math.nan, math.inf)] + [np.array([0, 1e39], "f8")]
BOOLEAN_ARRAYS: list[Value] = [np.array([True, False])]

KINDS: dict[str, list[Value]] = {
    "integer": INTEGERS,
    "float": FLOATS,
    "boolean": BOOLEANS,
    "string": STRINGS,
    "strings": STRING_LISTS,
    "nested": NESTED,
    "integers": INTEGER_ARRAYS,
    "too large": TOO_LARGE,
    "floats": FLOAT_ARRAYS,
    "not finite": NOT_FINITE,
    "booleans": BOOLEAN_ARRAYS,
}


def number(metadata: Metadata, key: str) -> float:
    return metadata.number(key, low=-1e300, high=1e300)


# getter -> the kinds it takes whole, and a word of what it says it needs
GETTERS: dict[str, tuple[Callable[[Metadata, str], Any], set[str], str]] = {
    "integer": (Metadata.integer, set(), "an integer from 0 to"),  # its range: below
    "optional_integer": (Metadata.optional_integer, set(), "an integer from 0 to"),
    "number": (number, set(), "a number from"),
    "boolean": (Metadata.boolean, {"boolean"}, "a boolean"),
    "string": (Metadata.string, {"string"}, "a string"),
    "strings": (Metadata.strings, {"strings"}, "an array of strings"),
    "integers": (Metadata.integers, {"integers"}, "an array of integers"),
    "numbers": (Metadata.numbers, {"integers", "too large", "floats"}, "finite numbers"),
}
RANGED = {"integer": "integer", "optional_integer": "integer", "number": "float"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("getter", GETTERS)
def test_every_getter_with_every_kind(getter: str, kind: str) -> None:
    get, takes, needs = GETTERS[getter]
    if RANGED.get(getter) == kind or (getter, kind) == ("number", "integer"):
        return  # partly in range: the tests below
    for value in KINDS[kind]:
        metadata = Metadata({"some.key": value})
        if kind in takes:
            found = get(metadata, "some.key")
            if isinstance(value, np.ndarray):
                assert np.array_equal(found, value.astype(found.dtype))
            else:
                assert found == value
            continue
        with pytest.raises(InvalidModelFile) as caught:
            get(metadata, "some.key")
        message = str(caught.value)
        assert "'some.key'" in message
        assert needs in message
        assert len(message) < 400
        assert message.isprintable()


@pytest.mark.parametrize("getter", GETTERS)
def test_a_missing_key_is_named_with_what_it_needs(getter: str) -> None:
    get, _, needs = GETTERS[getter]
    if getter == "optional_integer":
        assert get(Metadata({}), "some.key") is None
        return
    with pytest.raises(InvalidModelFile, match=rf"^metadata key 'some\.key' is missing; it needs .*{needs}"):
        get(Metadata({"some.other": 1}), "some.key")


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count", "llama.embedding_length"])
@pytest.mark.parametrize("value", INTEGERS)
@pytest.mark.parametrize(("low", "high"), [(0, 2**63 - 1), (1, 1024), (-5, 0), (2**63, 2**64 - 1)])
def test_integers_within_bounds_only(key: str, value: int, low: int, high: int) -> None:
    metadata = Metadata({key: value})
    for get in (metadata.integer, metadata.optional_integer):
        if low <= value <= high:
            assert get(key, low=low, high=high) == value
        else:
            wanted = (
                rf"^metadata key '{key}' is the integer {value}, but needs an integer from {low} to {high}$"
            )
            with pytest.raises(InvalidModelFile, match=wanted):
                get(key, low=low, high=high)


@pytest.mark.parametrize("value", INTEGERS + FLOATS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1e39, 1e39), (-math.inf, math.inf), (1e-9, 2.0)])
def test_numbers_are_finite_and_within_bounds(value: float, low: float, high: float) -> None:
    metadata = Metadata({"k": value})
    if math.isfinite(value) and low <= value <= high:
        found = metadata.number("k", low=low, high=high)
        assert type(found) is float
        assert found == float(value)
    else:
        with pytest.raises(InvalidModelFile, match=r"^metadata key 'k' is the .*, but needs a number from"):
            metadata.number("k", low=low, high=high)


def test_defaults_stand_in_for_absent_keys_only() -> None:
    metadata = Metadata({"present": "text"})
    assert metadata.integer("absent", low=5, default=0) == 0
    assert metadata.number("absent", low=0, high=1, default=0.5) == 0.5
    assert metadata.boolean("absent", default=False) is False
    assert metadata.string("absent", default="") == ""
    for get in (metadata.integer, metadata.boolean):
        with pytest.raises(InvalidModelFile, match=r"is the string 'text', but needs"):
            get("present", default=1)


def test_arrays_come_as_int64_and_float32() -> None:
    metadata = Metadata({"i": np.array([1, 255], "u1"), "f": np.array([0.1], "f8"), "t": np.array([3], "i4")})
    assert metadata.integers("i").dtype == np.int64
    assert metadata.integers("i").tolist() == [1, 255]
    assert metadata.numbers("f").dtype == metadata.numbers("t").dtype == np.float32
    assert metadata.numbers("f")[0] == np.float32(0.1)


def test_the_number_that_is_not_finite_is_named() -> None:
    scores = np.array([0, -1, math.nan, 2], "f4")
    with pytest.raises(InvalidModelFile, match=r"'scores' holds .*nan.* at 2, but needs finite numbers"):
        Metadata({"scores": scores}).numbers("scores")


def test_mapping() -> None:
    metadata = Metadata({"a": 1, "b": "x"})
    assert list(metadata) == ["a", "b"]
    assert len(metadata) == 2
    assert "a" in metadata
    assert "c" not in metadata
    assert metadata.raw("b") == "x"
    assert metadata.raw("c") is None


def test_text_from_a_file_is_shown_short_and_printable() -> None:
    hostile = "\x1b[2J\n\N{RIGHT-TO-LEFT OVERRIDE}'" + "x" * 10**6
    for text in (quoted(hostile), describe(hostile)):
        assert text.isprintable()
        assert text.replace("…", "").isascii()
        assert len(text) < 5 * SHOWN_CHARACTERS
        assert f"({len(hostile)} characters)" in text
