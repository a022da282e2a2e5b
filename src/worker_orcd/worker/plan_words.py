"""How a model's memory is told: as planned before it is loaded, and as measured once it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker_orcd.narration import Narration

if TYPE_CHECKING:
    from worker_orcd.kernels.memory import Held
    from worker_orcd.runner.plan import MemoryPlan

_MIB = 1 << 20


def tell_plan(narration: Narration, plan: MemoryPlan) -> None:
    """What it will take, and the setting that would change each part."""
    pretty = narration.is_pretty
    rows = plan.rows()
    narration.tell(
        "memory_plan",
        f"The model takes {plan.weights_bytes / _MIB:,.0f} MiB of weights and"
        f" {plan.workspace_bytes / _MIB:,.0f} MiB of workspace on {plan.device};"
        f" {plan.kv_cache_bytes / _MIB:,.0f} MiB of KV cache are reserved and filled as needed.",
        bytes=None if pretty else {row.what: row.num_bytes for row in rows},
        flags=None if pretty else {row.what: row.flag for row in rows if row.flag},
        max_model_len=None if pretty else plan.max_model_len,
    )
    width, flag_width = max(len(row.what) for row in rows), max(len(row.flag) for row in rows)
    narration.show(
        f"  {row.what:<{width}}{row.num_bytes / _MIB:>12,.1f} MiB  {row.flag:<{flag_width}}  {row.remark}"
        for row in rows
    )


def tell_held(narration: Narration, plan: MemoryPlan, held: Held) -> None:
    """What all of it takes in fact, as allocator and driver count it."""
    pretty = narration.is_pretty
    measured = {
        "weights": held.weights_bytes,
        "workspace and sampler": held.workspace_bytes,
        "KV cache": held.kv_cache_bytes,
        "between allocations": held.spare_bytes,
        "graphs and code": held.driver_bytes,
        "total": held.total_bytes,
    }
    narration.tell(
        "memory_measured",
        f"All of it takes {held.total_bytes / _MIB:,.1f} MiB, of {plan.total_bytes / _MIB:,.1f} MiB planned;"
        " nothing more will be taken.",
        bytes=None if pretty else measured,
    )
    width = max(map(len, measured))
    narration.show(
        f"  {what:<{width}}{size / _MIB:>12,.1f} MiB  {size:>17,} bytes" for what, size in measured.items()
    )
