"""What the server holds of an engine, and what closing a session does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from worker_orcd.engine.messages import Cancel, EngineSnapshot, Submit
from worker_orcd.errors import NotReady
from worker_orcd.sequence import SamplingParams
from worker_orcd.worker.session import EngineLink, Session

SUBMIT = Submit(
    id=1, prompt_token_ids=(1,), max_tokens=1, stop_token_ids=frozenset(), sampling=SamplingParams()
)


def engine(*, stops: bool = True) -> Any:
    sent: list[Any] = []
    snapshot = EngineSnapshot(num_running=3)
    return SimpleNamespace(sent=sent, send=sent.append, snapshot=snapshot, stop=lambda _seconds: stops)


def test_a_link_leads_to_the_engine_until_it_is_cut() -> None:
    link, linked = EngineLink(), engine()
    link.engine = linked
    link.send(SUBMIT)
    link.send(Cancel(1))
    assert linked.sent == [SUBMIT, Cancel(1)] and link.snapshot().num_running == 3
    assert link.cut() is linked and link.engine is None
    link.send(Cancel(1))  # of a stream that ends late
    with pytest.raises(NotReady, match="given up"):
        link.send(SUBMIT)
    assert len(linked.sent) == 2 and link.snapshot() == EngineSnapshot()


class Backend:
    def __init__(self, told: list[str]) -> None:
        self.memory = SimpleNamespace(release=lambda: told.append("released") or 17)


def session(told: list[str], *, stops: bool = True) -> Session:
    """Of a model that tells what happens to it."""
    made = object.__new__(Session)
    made._link, made._loaded = EngineLink(), None
    made._link.engine = engine(stops=stops)
    loaded: Any = SimpleNamespace(backend=Backend(told), close=lambda: told.append("closed"))
    made._loaded = loaded
    return made


def test_closing_stops_the_engine_then_closes_the_model_then_frees_the_device() -> None:
    told: list[str] = []
    made = session(told)
    assert made.close(1.0) == 17
    assert told == ["closed", "released"] and made.snapshot == EngineSnapshot()
    assert made.close(1.0) is None and len(told) == 2  # once


def test_nothing_is_freed_under_a_device_that_still_computes() -> None:
    told: list[str] = []
    made = session(told, stops=False)
    with pytest.raises(TimeoutError):
        made.close(0.0)
    assert told == [] and made.snapshot.num_running == 3
