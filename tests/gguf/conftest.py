"""Lets the tests of GGUF files share modules: the directory is not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
