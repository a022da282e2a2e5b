"""Lets the simulation share modules with its tests and with those of the engine: none is a package."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]
