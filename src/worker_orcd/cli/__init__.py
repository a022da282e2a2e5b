"""The command line: `worker-orcd serve`, `run`, `inspect`, `bench`, `doctor`, `fetch`, `version`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `worker-orcd` command."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to die
    try:
        from worker_orcd.cli.app import build

        build()(prog_name="worker-orcd")
    except KeyboardInterrupt:  # while modules are imported; later `reports_errors` is there
        sys.exit(130)
