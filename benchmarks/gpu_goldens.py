"""
Digests of the bits that tiny models' logits have on a kind of GPU, pinned in tests/data/gpu_goldens.json.

Bits belong to a contract (`version.REPRODUCIBILITY_CONTRACT`) and a kind of GPU. Where they have changed and
should have, raise the contract and write the new ones: `gpu_model.py --only tiny --update`. A kind of GPU or
a model that nobody has pinned yet is no failure.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker_orcd.version import REPRODUCIBILITY_CONTRACT

GOLDENS = Path(__file__).parent.parent / "tests" / "data" / "gpu_goldens.json"


def digest(logits: NDArray[np.float32]) -> str:
    """SHA-256 of the bits, row by row, as little-endian words."""
    return hashlib.sha256(np.ascontiguousarray(logits, dtype="<f4").tobytes()).hexdigest()


class Goldens:
    """The digests in a file: contract → kind of GPU → model; beside a kind's, the compiler that made them."""

    def __init__(
        self, path: Path, kind: str, compiler: str, *, contract: int = REPRODUCIBILITY_CONTRACT, update: bool
    ) -> None:
        """`kind`: the GPU's name; `compiler`: Triton's version, which may change bits. Raises OSError."""
        self._path, self._kind, self._update = path, kind, update
        self._compiler = compiler
        self._all: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._of_contract: dict[str, Any] = self._all.setdefault(f"contract {contract}", {})

    def check(self, model: str, logits: NDArray[np.float32]) -> tuple[str, bool]:
        """What is to be said of a model's logits, and whether they are as pinned, or are not pinned."""
        found = digest(logits)
        mine = self._of_contract.get(self._kind, {"compiler": self._compiler, "sha256": {}})
        pinned, compiler = mine["sha256"].get(model), mine["compiler"]
        others = [
            kind
            for kind, one in self._of_contract.items()
            if kind != self._kind and one["sha256"].get(model) == found
        ]
        told = f"sha256 {found[:12]}" + "".join(f", as on {kind}" for kind in others)
        if self._update:
            self._pin(model, found)
            return f"{told}, {'as before' if pinned == found else 'pinned'}", True
        if pinned is None:
            return f"{told}, not pinned for {self._kind}", True
        if pinned == found:
            return f"{told}, as pinned", True
        made_by = "" if compiler == self._compiler else f" by {compiler}, this is {self._compiler}"
        return f"{told}, but {pinned[:12]} is pinned{made_by}", False

    def _pin(self, model: str, found: str) -> None:
        mine = self._of_contract.setdefault(self._kind, {"sha256": {}})
        mine["compiler"] = self._compiler
        mine["sha256"][model] = found
        self._path.write_text(json.dumps(self._all, indent=1, sort_keys=True) + "\n")
