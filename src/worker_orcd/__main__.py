"""`python -m worker_orcd`: the command line without the installed script."""

from __future__ import annotations

from worker_orcd.cli import main

if __name__ == "__main__":
    main()
