"""`worker-orcd doctor`: what this machine can do, and why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from worker_orcd.cli import machine

_ROOT = Path("/")
MIN_CACHE_BYTES = 500 << 20  # the demo model, its wheel, and a compiled library

Verdict = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `bad`: the worker cannot serve; `note`: something is slower or absent."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON for machines")] = False) -> None:
    """Report what this machine can do.

    And what it cannot, and why not. The exit status is 1 if it cannot serve at all.
    """
    findings = examine()
    if as_json:
        import json

        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(1)


def examine(root: Path = _ROOT) -> list[Finding]:
    """Everything there is to say. Compiles the CPU kernels if that has not been done."""
    here = machine.describe(root)
    checks: Iterable[Callable[[], Finding]] = (
        _versions,
        lambda: _cpu(here),
        lambda: _cores(here),
        _memory,
        _compiler,
        _kernels,
        lambda: _gpu(root),
        *([_nvml] if _has_gpu(root) else []),
        _cache,
    )
    return [check() for check in checks]


def _versions() -> Finding:
    found = machine.versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name, version in found.items() if version == "missing"]
    if missing:
        return Finding("versions", "bad", text, f"install {', '.join(missing)}")
    return Finding("versions", "ok", text)


def _cpu(here: machine.Machine) -> Finding:
    sets = ", ".join(here.instruction_sets) or "no vector extension that the kernels use"
    return Finding("CPU", "ok", f"{here.cpu} ({here.architecture}): {sets}")


def _cores(here: machine.Machine) -> Finding:
    load = machine.load_average()[0]
    text = f"{here.usable_cores} of {here.cores} usable, load average {load}"
    if load > here.usable_cores:
        return Finding("cores", "note", text, "other work is running: answers will be slower")
    return Finding("cores", "ok", text)


def _memory() -> Finding:
    from worker_orcd.kernels.cpu.memory import available_memory

    available = available_memory()
    text = f"{available / 1e9:.1f} GB available to this process"
    if available < 1 << 30:
        return Finding("memory", "note", text, "enough for the demo model and little else")
    return Finding("memory", "ok", text)


def _compiler() -> Finding:
    from worker_orcd.kernels.cpu.build import COMPILERS

    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, errors="replace", check=False
            )
            return Finding("C compiler", "ok", f"{name}: {(done.stdout.splitlines() or ['?'])[0]}")
    advice = "needed once, to compile the CPU kernels, unless they came with the package: install gcc"
    return Finding("C compiler", "note", f"none of {', '.join(COMPILERS)}", advice)


def _kernels() -> Finding:
    from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library

    try:
        library = load_library()
    except LibraryUnavailable as error:
        reason = str(error).splitlines()[0]
        return Finding("CPU kernels", "note", reason, "the reference backend will be used: much slower")
    text = f"native library, {library.isa} instructions"
    if library.isa == "scalar":
        return Finding("CPU kernels", "note", text, "this processor has none that the kernels know: slow")
    return Finding("CPU kernels", "ok", text)


def _has_gpu(root: Path) -> bool:
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "proc/driver/nvidia/version").is_file()


def _gpu(root: Path) -> Finding:
    if not _has_gpu(root):
        return Finding("GPU", "note", "none", "the CPU is used")
    devices = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    version = root / "proc/driver/nvidia/version"
    driver = version.read_text().splitlines()[0].strip() if version.is_file() else ""
    text = f"{', '.join(devices) or 'no device nodes'}; {driver or 'no driver'}"
    from worker_orcd.kernels.cuda.backend import missing_for_cuda

    missing = missing_for_cuda()
    if missing is not None:
        return Finding("GPU", "note", text, f"{missing}; the CPU is used")
    return Finding("GPU", "ok", text)


def _nvml() -> Finding:
    from worker_orcd.nvml import NvmlUnavailable, open_nvml

    try:
        count = len(open_nvml().pids())
    except NvmlUnavailable as error:
        advice = (
            "temperature, power, faults and other processes are not watched; --yield-to-others does nothing"
        )
        return Finding("NVML", "note", f"not available: {error}", advice)
    return Finding("NVML", "ok", f"answers; {count} processes on the GPUs")


def _cache() -> Finding:
    from worker_orcd import hub

    directory = hub.models_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        writable = os.access(directory, os.W_OK)
    except OSError as error:
        return Finding("cache", "note", str(directory), f"{error.strerror}; set XDG_CACHE_HOME")
    demo = "with" if (directory / hub.DEMO.file_name).is_file() else "without"
    text = f"{directory} ({demo} the demo model), {free / 1e9:.1f} GB free"
    if not writable:
        return Finding("cache", "note", text, "not writable; set XDG_CACHE_HOME")
    if free < MIN_CACHE_BYTES:
        return Finding("cache", "note", text, "too little space for the demo model")
    return Finding("cache", "ok", text)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    from worker_orcd.cli.tables import table

    styles = {"ok": "green", "note": "yellow", "bad": "red"}
    rows = table("", "what", "found", title="worker-orcd doctor")
    for finding in findings:
        text = finding.found + (f"\n{finding.advice}" if finding.advice else "")
        rows.add_row(Text(finding.verdict, style=styles[finding.verdict]), finding.what, Text(text))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(rows)
