"""Lets the tests of the engine share modules: the directory is not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
