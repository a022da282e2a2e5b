"""The version of the package, and of the promise it makes about bits."""

from __future__ import annotations

VERSION = "0.1.0"

# Raised whenever the bits of an answer may change for an unchanged request, model file and device kind.
REPRODUCIBILITY_CONTRACT = 1
