"""The blocking view of the engine: outputs in order, cancelled when nobody wants them, faults raised."""

from __future__ import annotations

from typing import Any

import pytest

from worker_orcd.cli.local import LocalEngine
from worker_orcd.engine.messages import Cancel, Output, Submit
from worker_orcd.errors import Internal
from worker_orcd.sequence import FinishReason, SampledToken, SamplingParams


class FakeEngine:
    def __init__(self, publish: Any) -> None:
        self.publish = publish
        self.sent: list[Submit | Cancel] = []
        self.ends = True

    def send(self, command: Submit | Cancel) -> None:
        self.sent.append(command)

    def stop(self, _timeout: float) -> bool:
        return self.ends


class FakeModel:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> LocalEngine:
    loaded: Any = FakeModel()
    return LocalEngine(loaded, lambda _loaded, publish, _observer: FakeEngine(publish), None)  # type: ignore[arg-type]


def fake(engine: LocalEngine) -> Any:
    return engine._engine


def submit(engine: LocalEngine) -> int:
    return engine.submit((1, 2), SamplingParams(), max_tokens=3, stop_token_ids=frozenset({7}))


def token(number: int, token_id: int, reason: FinishReason | None = None) -> Output:
    return Output(number, (SampledToken(token_id),), finish_reason=reason)


def test_outputs_come_in_order_to_whom_they_belong(engine: LocalEngine) -> None:
    first, second = submit(engine), submit(engine)
    fake(engine).publish([token(first, 1), token(second, 9)])
    fake(engine).publish([token(second, 8, FinishReason.STOP), token(first, 2, FinishReason.LENGTH)])
    assert [output.tokens[0].token_id for _, output in engine.outputs(first)] == [1, 2]
    times = [when for when, _ in engine.outputs(second)]
    assert times == sorted(times)
    assert [type(command) for command in fake(engine).sent] == [Submit, Submit]
    assert fake(engine).sent[0].stop_token_ids == {7}


def test_leaving_early_cancels(engine: LocalEngine) -> None:
    number = submit(engine)
    fake(engine).publish([token(number, 1)])
    outputs = engine.outputs(number)
    next(outputs)
    outputs.close()
    assert fake(engine).sent[-1] == Cancel(number)
    fake(engine).publish([Output(number, finish_reason=FinishReason.CANCELLED)])  # nobody waits for it


def test_a_fault_is_raised_and_nothing_is_left_to_cancel(engine: LocalEngine) -> None:
    number = submit(engine)
    fake(engine).publish([Output(number, finish_reason=FinishReason.ERROR, error="the device is lost")])
    with pytest.raises(Internal, match="the device is lost"):
        list(engine.outputs(number))
    assert not any(isinstance(command, Cancel) for command in fake(engine).sent)


@pytest.mark.parametrize("ends", [True, False])
def test_a_model_is_closed_only_when_its_engine_has_ended(engine: LocalEngine, ends: bool) -> None:
    fake(engine).ends = ends
    engine.close()
    assert engine.loaded.closed is ends  # type: ignore[attr-defined]
