"""Where a vocabulary's tokens of a kind are, and what its tokens stand for, found out when it is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from worker_orcd.text.bpe import BpeBytes
from worker_orcd.text.vocabulary import TokenType, of_type

NORMAL, CONTROL, BYTE, USER = TokenType.NORMAL, TokenType.CONTROL, TokenType.BYTE, TokenType.USER_DEFINED


@dataclasses.dataclass
class Some:
    """As much of a vocabulary as is looked at."""

    tokens: list[str]
    types: list[TokenType]


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ([], []),
        ([NORMAL, NORMAL], []),
        ([CONTROL], [0]),
        ([CONTROL, NORMAL, CONTROL, CONTROL, BYTE], [0, 2, 3]),
        ([NORMAL, CONTROL], [1]),
    ],
)
def test_a_kind_s_ids_are_in_order(types: list[TokenType], wanted: list[int]) -> None:
    assert of_type(types, CONTROL) == wanted == [i for i, kind in enumerate(types) if kind == CONTROL]


def test_what_a_token_stands_for_is_a_sequence() -> None:
    vocabulary: Any = Some(["Ġthe", "Ġthe", "é", "日", "a"], [NORMAL, USER, NORMAL, NORMAL, CONTROL])
    found = BpeBytes(vocabulary)
    wanted = [b" the", "Ġthe".encode(), b"\xe9", "日".encode(), b"a"]  # only what is coded is decoded
    assert list(found) == wanted
    assert (len(found), found[-1], found[1:3]) == (5, b"a", wanted[1:3])
    assert found[::-2] == wanted[::-2]
    with pytest.raises(IndexError):
        found[5]
