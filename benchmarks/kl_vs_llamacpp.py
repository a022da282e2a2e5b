"""
How far from the reference: mean KL(reference ‖ implementation) of the next-token distributions, side by
side.

`python benchmarks/kl_vs_llamacpp.py [--model FILE]` teacher-forces the reference's greedy continuations of
the golden prompts (5 × 64 positions) through transformers in float32 on the dequantised weights, through
our CPU backend in each activation mode, and through llama.cpp on the same file with its defaults.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llamacpp import LlamaCpp
from reference import load_reference, reference_logits
from stepping import Stepper
from worker_orcd.hub import resolve

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "smollm2-q4_1.json"
Logits = Callable[[list[int]], NDArray[np.float32]]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(
    name: str, logits: Logits, texts: list[tuple[list[int], int]], expected: list[NDArray[np.float64]]
) -> None:
    divergences: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    for (ids, first), reference in zip(texts, expected, strict=True):
        ours = log_softmax(logits(ids)[first:])
        divergences.append((np.exp(reference) * (reference - ours)).sum(axis=-1))
        same.append(reference.argmax(-1) == ours.argmax(-1))
    kl, top1 = np.concatenate(divergences), np.concatenate(same)
    print(
        f"| {name:<22} | {kl.mean():.6f} | {np.median(kl):.6f} | {kl.max():.5f} "
        f"| {100 * top1.mean():5.1f} % |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a GGUF file of architecture llama; default: the demo model"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.model or resolve("demo", None)
    golden = json.loads(GOLDEN.read_text())["results"]
    # The last sampled token has no successor in the reference, so it is not fed back.
    texts = [(e["prompt_ids"] + e["out_ids"][:-1], len(e["prompt_ids"]) - 1) for e in golden]
    model = load_reference(path)
    expected = [log_softmax(reference_logits(model, ids)[first:]) for ids, first in texts]
    del model
    print(f"{path.name}: {sum(len(e) for e in expected)} positions, reference transformers float32")
    print("| implementation         | mean KL  | median   | max     | same top 1 |\n|---|---|---|---|---|")
    for activations in ("float32", "int16", "int8"):
        stepper = Stepper(path, threads=1, activations=activations)
        compare(f"ours, {activations}", stepper.logits, texts, expected)
        stepper.close()
    for repack in (True, False):
        with LlamaCpp(path, repack=repack) as peer:
            compare(f"llama.cpp{'' if repack else ', not repacked'}", peer.logits, texts, expected)


if __name__ == "__main__":
    main()
