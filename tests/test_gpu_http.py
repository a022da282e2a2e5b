"""The rates that gpu_http prints, of streams whose arrivals are known."""

from __future__ import annotations

import asyncio

import pytest

from gpu_http import MARK, decode_rate, first_at, tokens_by
from worker_client import Exchange


def stream(*arrivals: tuple[float, bytes], ended: float) -> Exchange:
    async def make() -> Exchange:
        return Exchange(b"", MARK)

    made = asyncio.run(make())
    for at, data in arrivals:
        made.arrivals.append((at, len(data)))
        made.data += data
    made.ended_at = ended
    return made


def test_a_token_has_come_with_its_last_byte():
    one = stream((1.0, b"head " + MARK[:5]), (2.0, MARK[5:] + b" 1 " + MARK + b" 2"), (5.0, MARK), ended=5.0)
    assert first_at(one) == 2.0
    assert [tokens_by(one, moment) for moment in (0.5, 1.0, 2.0, 4.9, 5.0)] == [0, 0, 2, 2, 3]


def test_decoding_begins_when_all_have_had_a_token():
    early = stream((1.0, MARK * 4), (2.0, MARK * 3), (4.0, MARK * 2), ended=4.0)
    late = stream((2.0, MARK), (3.0, MARK * 5), ended=3.0)
    assert decode_rate([early, late]) == pytest.approx((2 + 5) / (4.0 - 2.0))
