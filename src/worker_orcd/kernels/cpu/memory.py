"""What this process may keep in memory: how much (the machine's, a control group's), and which KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from worker_orcd.config import KVCacheDtype
from worker_orcd.errors import InvalidConfiguration
from worker_orcd.kernels.memory import DeviceFacts, Held, Region, Use

_ROOT = Path("/")


class HostMemory:
    """Implements `kernels.memory.DeviceMemory`: the machine's, of which nothing is counted."""

    counts = False

    def __init__(self) -> None:
        self.facts = DeviceFacts(memory_bytes=psutil.virtual_memory().total)

    def regions(self) -> Sequence[Region]:
        return ()

    def allocated_bytes(self) -> int:
        return 0

    def taken_bytes(self) -> int:
        return 0

    def forget(self, use: Use) -> None:
        """No region has been noted."""

    def held(self) -> Held | None:
        return None

    def seal(self) -> None:
        """The machine's memory is not the worker's to close."""

    def release(self) -> int | None:
        return None


def available_memory(root: Path = _ROOT) -> int:
    """Bytes. The least of what the system has and what each control group above this process has left.

    File pages count as available: they are given back when somebody needs memory.
    """
    return max(0, min([psutil.virtual_memory().available, *_group_headrooms(root)]))


def unused_memory(root: Path = _ROOT) -> int:
    """Bytes. As `available_memory`, but without what the page cache would have to give back."""
    return max(0, min([psutil.virtual_memory().free, *_group_headrooms(root, files=False)]))


def check_cache(kv_cache_dtype: KVCacheDtype) -> None:
    """Raises InvalidConfiguration for what only a GPU has."""
    if kv_cache_dtype == "fp8":
        raise InvalidConfiguration(
            "kv_cache_dtype is fp8; on the CPU keys and values are float16 or float32, fp8 needs a GPU"
        )


def _group_headrooms(root: Path, *, files: bool = True) -> list[int]:
    """What is left under each limit; of cgroup v2 and v1, whichever is there. `files`: with page cache."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    headrooms: list[int] = []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if controllers == "":
            headrooms += _headrooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current", files=files)
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            headrooms += _headrooms(root / "sys/fs/cgroup/memory", path, *names, files=files)
    return headrooms


def _headrooms(mount: Path, path: str, limit_name: str, usage_name: str, *, files: bool) -> list[int]:
    """Of the group at `path` and of every group above it that this process can see."""
    group = mount / path.strip("/")
    headrooms: list[int] = []
    for directory in (group, *group.parents):
        if directory == mount.parent:
            break
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is not None and usage is not None:
            cached = _file_bytes(directory / "memory.stat") if files else 0
            headrooms.append(limit - usage + cached)
    return headrooms


def _number(path: Path) -> int | None:
    """None where the file is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _file_bytes(path: Path) -> int:
    """Page cache of files that the group is charged for."""
    try:
        stat = dict(line.split() for line in path.read_text().splitlines())
        return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):
        return 0
