"""How many cores this process may use: its affinity, and the quota of its control group."""

from __future__ import annotations

import os
from pathlib import Path

from worker_orcd.errors import InvalidConfiguration

# cgroup v2: "<quota> <period>" in microseconds, or "max <period>"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")

MAX_THREADS = 256


def check_threads(num_threads: int) -> int:
    """The same number. Raises InvalidConfiguration."""
    if not 1 <= num_threads <= MAX_THREADS:
        raise InvalidConfiguration(f"cpu_threads is {num_threads}; allowed are 1 to {MAX_THREADS}")
    return num_threads


def usable_cores(quota_file: Path = CGROUP_QUOTA) -> int:
    """At least 1. A quota of 1.5 cores counts as 2: a thread may wait, an idle core may not."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota_cores(quota_file)
    return affinity if quota is None else max(1, min(affinity, quota))


def _quota_cores(quota_file: Path) -> int | None:
    try:
        quota, period = quota_file.read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
