"""Tables as the commands print them. Imports rich: only from inside a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from worker_orcd.runner.plan import MemoryPlan


def table(*headings: str, title: str) -> Table:
    """An empty table. A heading that starts with ">" stands over numbers, aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        number = heading.startswith(">")
        made.add_column(heading.removeprefix(">"), justify="right" if number else "left", overflow="fold")
    return made


def plan_table(plan: MemoryPlan) -> Table:
    """What a model takes of its device's memory."""
    rows = table("memory", ">MiB", "", "changed by", title=f"memory plan on {plan.device}")
    for row in plan.rows():
        rows.add_row(row.what, f"{row.num_bytes / (1 << 20):,.1f}", row.remark, row.flag)
    return rows
