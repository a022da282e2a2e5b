"""
Every architecture against llama.cpp on the same tiny file: `python benchmarks/tiny_vs_llamacpp.py`.

Each file of random weights (`tests/model`) is written twice: as F32, where both compute the same thing, and
in a mixture of formats, where llama.cpp rounds activations to int8. The table has our float32 reference
against llama.cpp over a 300-token prompt: mean KL(ours ‖ llama.cpp), the largest difference over the range of
the logits, and at how many positions the most likely token is the same.

Two models differ by decision, so what llama.cpp computes is compared: YaRN's range is rounded to whole
dimensions for gpt-oss, and phi3 has no window (see docs/decisions).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model"))

from tiny_models import MODELS, Tiny, load_runner
from tiny_variants import VARIANTS, tiny_file

from llamacpp import LlamaCpp
from worker_orcd.config import EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.model.architectures.rope import read_rope
from worker_orcd.model.config import ModelConfig
from worker_orcd.runner.scoring import score

PROMPT = np.random.default_rng(7).integers(0, 320, 300).tolist()
NAMES = (
    "llama", "llama3", "qwen2", "qwen3", "qwen3moe", "phi3", "phi3-long", "gpt-oss", "gpt2", "gemma3",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    kl: float  # mean over the positions
    error: float  # the largest difference, over the range of our logits
    same_top_1: int
    closest: float  # the smallest gap between our two most likely tokens where theirs is another


def compare(tiny: Tiny, path: Path) -> Comparison:
    """Writes the file to `path`."""
    vocabulary = {
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.tokens": None,
        f"{tiny.architecture}.vocab_size": tiny.vocab,
    }
    tiny_file(replace(tiny, metadata=tiny.metadata | vocabulary)).write(path)
    backend = ReferenceBackend()
    engine = EngineConfig(max_num_seqs=512, max_num_batched_tokens=512)
    runner = load_runner(path, backend, engine, lambda config: _as_llamacpp(config, path))
    ours = score(runner, PROMPT).astype(np.float64)
    backend.close()
    with LlamaCpp(path, n_ctx=512, exact=True) as peer:
        theirs = peer.logits(PROMPT).astype(np.float64)
    a, b = _log_softmax(ours), _log_softmax(theirs)
    best, other = ours.argmax(axis=1), theirs.argmax(axis=1)
    rows = np.arange(len(ours))
    gaps = (ours[rows, best] - ours[rows, other])[best != other]
    return Comparison(
        kl=float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        error=float((np.abs(ours - theirs).max(axis=1) / np.ptp(ours, axis=1)).max()),
        same_top_1=int((best == other).sum()),
        closest=float(gaps.max()) if len(gaps) else 0.0,
    )


def _as_llamacpp(config: ModelConfig, path: Path) -> ModelConfig:
    if config.architecture != "gpt-oss":
        return config
    with GGUFFile(path) as file:
        rope = read_rope(file, config.layers[0].attention.head_dim, truncate=True)
    return replace(config, layers=tuple(replace(layer, rope=rope) for layer in config.layers))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main() -> None:
    print("| model | file | mean KL | largest difference | same top 1 of 300 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name in NAMES:
            tiny = (MODELS | VARIANTS)[name]
            mixed = {part: kind for part, kind in tiny.formats.items() if part != "attn_norm"}  # it wants F32
            for kind, formats in (("F32", {}), ("mixed", mixed)):
                variant = replace(tiny, formats=formats)
                c = compare(variant, Path(directory) / "tiny.gguf")
                print(f"| {name} | {kind} | {c.kl:.2e} | {c.error:.1e} | {c.same_top_1} |", flush=True)


if __name__ == "__main__":
    main()
