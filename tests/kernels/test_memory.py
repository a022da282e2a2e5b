"""Available memory in containers: control groups of both versions, as files."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from worker_orcd.config import DeviceConfig
from worker_orcd.kernels.cpu.memory import available_memory, unused_memory
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.select import select_backend

MIB = 1 << 20


def write(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_without_limits_it_is_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = psutil.virtual_memory()  # others take and free memory meanwhile
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now)
    assert available_memory(tmp_path) == now.available
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"})
    assert available_memory(tmp_path) == now.available


def test_here_it_is_something(tmp_path: Path):
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_version_2_takes_the_tightest_group_and_gives_file_pages_back(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/memory.max": 100 * MIB,
            "sys/fs/cgroup/pod/memory.current": 40 * MIB,
            "sys/fs/cgroup/pod/box/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.current": 30 * MIB,
        },
    )
    assert available_memory(tmp_path) == 60 * MIB
    stat = f"anon {MIB}\ninactive_file {5 * MIB}\nactive_file {2 * MIB}"
    write(tmp_path, {"sys/fs/cgroup/pod/memory.stat": stat})
    assert available_memory(tmp_path) == 67 * MIB
    write(tmp_path, {"sys/fs/cgroup/pod/box/memory.max": 20 * MIB})
    assert available_memory(tmp_path) == 0  # over its limit already


def test_what_is_unused_has_no_file_pages_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now)
    assert unused_memory(tmp_path) == now.free
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box",
            "sys/fs/cgroup/box/memory.max": 10 * MIB,
            "sys/fs/cgroup/box/memory.current": 8 * MIB,
            "sys/fs/cgroup/box/memory.stat": f"inactive_file {5 * MIB}\nactive_file {2 * MIB}",
        },
    )
    assert unused_memory(tmp_path) == 2 * MIB
    assert available_memory(tmp_path) == 9 * MIB


@pytest.mark.parametrize("reference", [False, True])
def test_weights_displace_files_where_they_are_more_than_is_unused(
    reference: bool, monkeypatch: pytest.MonkeyPatch
):
    made = ReferenceBackend() if reference else select_backend(DeviceConfig(device="cpu"), print)
    monkeypatch.setattr(sys.modules[type(made).__module__], "unused_memory", lambda: 5 * MIB)
    assert [made.displaces_files(size * MIB) for size in (5, 6)] == [False, True]
    made.close()


def test_version_1(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n1:name=systemd:/x",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 64 * MIB,
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 14 * MIB,
        },
    )
    assert available_memory(tmp_path) == 50 * MIB


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../elsewhere",
            "sys/fs/cgroup/memory.max": 32 * MIB,
            "sys/fs/cgroup/memory.current": 12 * MIB,
        },
    )
    assert available_memory(tmp_path) == 20 * MIB
