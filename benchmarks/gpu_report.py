"""What a GPU script says as it works: lines, results in a stamped JSON file, and how many checks failed."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_timing import stamp


class Session:
    """One run of a script. `args`: at least `out` (a path) and `commit`; `device` where there is a choice."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, Any] = {"stamp": stamp(args.commit, getattr(args, "device", "cuda"))}
        self.lines: list[str] = []
        self.failed = 0

    def say(self, line: str, *, ok: bool = True) -> None:
        self.failed += not ok
        self.lines.append(line if ok else f"{line}   <-- FAILED")
        print(self.lines[-1], flush=True)

    def keep(self, name: str, value: Any) -> None:
        self.results[name] = value
        out: Path = self.args.out
        out.write_text(json.dumps(self.results, indent=1))

    def guarded(self, name: str, work: Callable[[], None]) -> None:
        """What goes wrong is said, counted, and hides nothing of the rest."""
        try:
            work()
        except Exception:
            traceback.print_exc()
            self.say(f"{name}: an exception", ok=False)
