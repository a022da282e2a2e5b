"""
Draw what commands print, as they print it, into docs/demo.svg: `python scripts/record.py docs/demo.svg`.

Nothing is made up: each command runs, and its output is drawn. Run `make install` first: what a first
installation prints is left to the reader.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ("make run ONESHOT=1",)
WIDTH = 110
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # the picture loads nothing from anywhere


def run(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    return done.stdout


def draw(commands: tuple[str, ...], path: Path) -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, highlight=False)
        for command in commands:
            console.print(Text(f"$ {command}", style="bold green"))
            for line in run(command).splitlines():
                answer = not line.startswith(("  ", "ready", "serving")) and "tok/s" not in line
                console.print(Text(line, style="bright_white" if answer else "dim"))
    svg = console.export_svg(title="worker-orcd", unique_id="demo")
    svg = FONT.sub("", svg).replace("Fira Code", "ui-monospace, Menlo, Consolas")
    path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


if __name__ == "__main__":
    draw(COMMANDS, Path(sys.argv[1]))
