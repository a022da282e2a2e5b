"""
Injects faults into real workers and checks what becomes of them: `python benchmarks/faults.py`.

Every fault of docs/reliability.md's table: what happened, how long until the next answer or the end of the
process, and what others than the named job lost. The exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import fault_engine
import fault_files
import fault_life
from fault_worker import Bench, Row
from worker_client import Wrong

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- benchmarks/faults.py --markdown -->", "<!-- end of the table -->"

Case = Callable[[Bench], Awaitable[list[Row]]]
CASES: dict[str, Case] = {
    "kernel": fault_engine.kernel,
    "device": fault_engine.device,
    "hang": fault_engine.hang,
    "numbers": fault_engine.numbers,
    "load-memory": fault_engine.load_memory,
    "step-memory": fault_engine.step_memory,
    "limit": fault_engine.limit,
    "file": fault_files.file,
    "disk": fault_files.disk,
    "full": fault_files.full,
    "signals": fault_life.signals,
    "callback": fault_life.callback,
    "reader": fault_life.reader,
    "clock": fault_life.clock,
}


async def run(name: str, bench: Bench) -> tuple[list[Row], str | None]:
    """The rows of a case, or what was broken."""
    try:
        return await CASES[name](bench), None
    except (Wrong, OSError, ValueError) as error:  # TimeoutError is one of them; ValueError: no JSON
        return [], f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="faults, injected into real workers")
    parser.add_argument("--only", metavar="NAMES", help="cases, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of cases")
    parser.add_argument("--quick", action="store_true", help="a few of what there are many of")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("--markdown", action="store_true", help="put the table into docs/reliability.md")
    args = parser.parse_args(arguments)
    if args.list:
        for name, case in CASES.items():
            print(f"{name:<14}{(case.__doc__ or '').splitlines()[0]}")
        return 0
    names = list(CASES) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    rows: list[Row] = []
    broken: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), quick=args.quick)
        for name in names:
            begun = time.monotonic()
            found, wrong = asyncio.run(run(name, bench))
            rows += found
            if wrong is not None:
                broken[name] = wrong
            words = f"{name}: {wrong or 'kept'} ({time.monotonic() - begun:.1f} s)"
            print(words, file=sys.stderr, flush=True)
    if args.markdown and not broken:
        write_page(rows)
    if args.json:
        for row in rows:
            print(json.dumps(vars(row)))
    else:
        print("\n".join(table(rows)))
    return 1 if broken else 0


def write_page(rows: Sequence[Row]) -> None:
    """Put the table where the page says that it goes."""
    text = PAGE.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} has no place for the table")
    PAGE.write_text("\n".join([f"{head}{begin}", *table(rows), f"{end}{tail}"]), encoding="utf-8")


def table(rows: Sequence[Row]) -> list[str]:
    heads = ("fault", "what happened", "recovered after", "what others lost")
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (heads, ("---",) * len(heads), *(r.cells() for r in rows))
    ]


if __name__ == "__main__":
    sys.exit(main())
