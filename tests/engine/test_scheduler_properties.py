"""Whatever happens around a sequence, its answer is the one it would have got alone."""

from __future__ import annotations

import pytest
from engine_world import Code, Scenario, play, scenarios
from hypothesis import HealthCheck, given, settings

from worker_orcd.engine import block_tables, blocks, scheduler

REAL = Code(scheduler, block_tables, blocks)


@pytest.mark.slow
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_output_does_not_depend_on_anything_around_it(scenario: Scenario):
    play(REAL, scenario)
