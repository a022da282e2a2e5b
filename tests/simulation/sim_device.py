"""The device of the simulation: that of the engine's tests, but it takes time and fails by the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine_fakes import FakeDevice, Pending

from worker_orcd.errors import DeviceError, EngineError, Internal, OutOfMemory
from worker_orcd.sequence import RowFailure, RowResult, Step

if TYPE_CHECKING:
    from sim_world import World

_FAULTS = (
    lambda: OutOfMemory("the step ran out of memory"),
    lambda: OutOfMemory("the step ran out of memory"),
    lambda: Internal("the step failed"),
    lambda: RuntimeError("nobody expects this"),
)


class SimulatedRunner:
    """Implements `sequence.Runner`. Between `launch` and the end of `wait` virtual time passes."""

    def __init__(self, world: World) -> None:
        plan = world.plan
        self.max_steps, self.max_draws = plan.max_steps, plan.max_draws
        self.longest_step = 0.0
        self.is_lost = False
        self.num_steps = 0
        self.under_way: list[PendingStep] = []
        self._device = FakeDevice(plan.groups, plan.block_size)
        self._world = world
        self._free_at = 0.0  # when the device has done what it was given

    def launch(self, step: Step) -> PendingStep:
        world, rng = self._world, self._world.rng
        with world.watched():
            world.checks.launched(step)
        self.num_steps += 1
        world.event("launch", f"{[(r.sequence.id, r.num_tokens, r.num_draws) for r in step.rows]}")
        world.switch()
        fault = self._fault()
        if fault is not None and rng.random() < 0.3:
            world.checks.not_launched(step, fault)
            raise fault
        if rng.random() < world.plan.failing_rows:
            row = rng.choice(step.rows)
            code = rng.choice((OutOfMemory.code, Internal.code))
            self._device.failing_rows = {row.sequence.id: RowFailure(code, "made to fail")}
            world.checks.row_fails(row, code)
        with world.watched():
            pending = self._device.launch(step)
        plan = world.plan
        seconds = plan.step_seconds * step.num_rounds + plan.token_seconds * step.num_tokens
        if rng.random() < plan.hiccups:
            seconds *= 100
        self.longest_step = max(self.longest_step, seconds)
        self._free_at = max(world.loop.now, self._free_at) + seconds
        made = PendingStep(self, pending, step, fault, self._free_at)
        self.under_way.append(made)
        return made

    def _fault(self) -> Exception | None:
        plan, rng = self._world.plan, self._world.rng
        if self.is_lost or rng.random() < plan.lost:
            self.is_lost = True
            return DeviceError("the device is lost")
        return rng.choice(_FAULTS)() if rng.random() < plan.failing_steps else None

    def finish(self, made: PendingStep) -> Sequence[RowResult]:
        world = self._world
        world.pass_time(made.ends_at)
        with world.watched():
            assert self.under_way and self.under_way[0] is made, "steps are waited for in their order"
            self.under_way.pop(0)
            results = self._device.compute(made.pending)
            if made.fault is not None:
                self._device.spoil(made.pending)
            world.checks.ended(made.step, made.fault)
        world.event("step ends", "" if made.fault is None else type(made.fault).__name__)
        if made.fault is not None:
            raise made.fault
        return results


class PendingStep:
    """Implements `sequence.PendingStep`."""

    def __init__(
        self, runner: SimulatedRunner, pending: Pending, step: Step, fault: Exception | None, ends_at: float
    ) -> None:
        self.pending, self.step, self.fault, self.ends_at = pending, step, fault, ends_at
        self._runner = runner

    def wait(self) -> Sequence[RowResult]:
        return self._runner.finish(self)


def code_of(fault: Exception) -> str:
    return fault.code if isinstance(fault, EngineError) else Internal.code
