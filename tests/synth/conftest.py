"""Lets these tests use the tiny models' runner: the directories are not packages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
