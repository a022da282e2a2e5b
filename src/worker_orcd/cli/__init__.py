"""The command line: `worker-orcd serve`, `run`, `inspect`, `bench`, `doctor`, `fetch`, `version`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `worker-orcd` command."""
    from worker_orcd.cli.app import build

    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to die
    build()(prog_name="worker-orcd")
