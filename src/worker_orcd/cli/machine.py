"""What machine this is: for `doctor`, and stamped on every `bench` result. Reads, never changes anything."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from worker_orcd.kernels.cpu.cores import usable_cores
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION

LIBRARIES = ("torch", "numpy", "tokenizers", "jinja2", "fastapi", "starlette", "uvicorn", "pydantic")
# What the CPU kernels know how to use, as the Linux kernel spells it.
INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "asimd", "asimddp")
_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts that explain a measurement."""

    cpu: str
    architecture: str
    instruction_sets: tuple[str, ...]
    cores: int  # of the machine
    usable_cores: int  # that the kernels will use
    memory_bytes: int
    system: str


def describe(root: Path = _ROOT) -> Machine:
    """The machine as this process sees it."""
    fields = _cpu_fields(root)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Machine(
        cpu=fields.get("model name", platform.processor() or "unknown"),
        architecture=platform.machine(),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
    )


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def versions() -> dict[str, str]:
    """Of the worker, Python, and the libraries that decide speed and bits."""
    found = {"worker-orcd": VERSION, "contract": str(REPRODUCIBILITY_CONTRACT)}
    found["python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _cpu_fields(root: Path) -> dict[str, str]:
    """Of the first core in /proc/cpuinfo."""
    try:
        first = (root / "proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
