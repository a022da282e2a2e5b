"""How a model's memory is told: as planned before it is loaded, and as measured once it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker_orcd.narration import Narration

if TYPE_CHECKING:
    from worker_orcd.runner.plan import MemoryPlan

_MIB = 1 << 20


def tell_plan(narration: Narration, plan: MemoryPlan) -> None:
    pretty = narration.is_pretty
    narration.tell(
        "memory_plan",
        f"The model takes {plan.weights_bytes / _MIB:,.0f} MiB of weights and"
        f" {plan.workspace_bytes / _MIB:,.0f} MiB of workspace on {plan.device};"
        f" {plan.kv_cache_bytes / _MIB:,.0f} MiB of KV cache are reserved and filled as needed.",
        bytes=None if pretty else {what: num_bytes for what, num_bytes, _remark in plan.rows()},
        max_model_len=None if pretty else plan.max_model_len,
    )
    width = max(len(what) for what, _bytes, _remark in plan.rows())
    narration.show(
        f"  {what:<{width}}{num_bytes / _MIB:>14,.1f} MiB  {remark}"
        for what, num_bytes, remark in plan.rows()
    )
