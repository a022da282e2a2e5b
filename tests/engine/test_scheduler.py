"""The promises of block pool and scheduler, by example."""

from __future__ import annotations

import pytest
from engine_checks import CHECKS, Check
from engine_world import Code

from worker_orcd.engine import block_tables, blocks, scheduler


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(check: Check):
    check(Code(scheduler, block_tables, blocks))
