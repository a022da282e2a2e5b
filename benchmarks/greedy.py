"""
Greedy continuations of the golden prompts beside transformers in float32 and llama.cpp.

    python benchmarks/greedy.py FILE [FILE …]

For each file (architecture `llama` or `gemma3`) and each of our activation modes: over how many of 64 tokens
our continuation is the reference's, and how close the reference's two most likely tokens were where it first
is not (the margin rule: two implementations that round differently part where two tokens are nearly as
likely). Beside it llama.cpp's on the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from llamacpp import LlamaCpp
from reference import greedy, load_reference
from stepping import Stepper

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "smollm2-q4_1.json"
NUM_TOKENS = 64
Continue = Callable[[list[int]], list[int]]


def ours(stepper: Stepper) -> Continue:
    def run(prompt_ids: list[int]) -> list[int]:
        sequence = stepper.start(prompt_ids)
        while len(sequence.token_ids) < len(prompt_ids) + NUM_TOKENS:
            stepper.step(sequence)
        return sequence.token_ids[len(prompt_ids) :]

    return run


def theirs(peer: LlamaCpp) -> Continue:
    def run(prompt_ids: list[int]) -> list[int]:
        peer.clear()
        out = [int(peer.decode(prompt_ids, 0)[-1].argmax())]
        while len(out) < NUM_TOKENS:
            out.append(int(peer.decode(out[-1:], len(prompt_ids) + len(out) - 1)[-1].argmax()))
        return out

    return run


def report(
    name: str, run: Continue, prompts: list[list[int]], expected: list[dict[str, list[float]]]
) -> None:
    cells: list[str] = []
    for ids, reference in zip(prompts, expected, strict=True):
        found = run(ids)
        same = next((i for i in range(NUM_TOKENS) if found[i] != reference["out_ids"][i]), NUM_TOKENS)
        cells.append(f"{same}" if same == NUM_TOKENS else f"{same} ({reference['gaps'][same]:.2f})")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def compare(path: Path) -> None:
    stepper = Stepper(path, threads=1, activations="float32")
    golden = json.loads(GOLDEN.read_text())["results"]
    is_chat = stepper.loaded.config.architecture == "llama"  # the other is a base model
    texts = [entry["text" if is_chat else "prompt"] for entry in golden]
    prompts = [stepper.loaded.tokenizer.encode(text, parse_special=True) for text in texts]
    model = load_reference(path)
    expected = [greedy(model, ids) for ids in prompts]
    del model
    print(f"\n{path.name}: tokens equal to the reference's, of {NUM_TOKENS} (gap at the first other one)\n")
    print("| |" + "".join(f" prompt {i + 1} |" for i in range(len(prompts))))
    print("|---" * (len(prompts) + 1) + "|")
    report("ours, float32", ours(stepper), prompts, expected)
    stepper.close()
    for activations in ("int16", "int8"):
        stepper = Stepper(path, threads=1, activations=activations)
        report(f"ours, {activations}", ours(stepper), prompts, expected)
        stepper.close()
    with LlamaCpp(path, threads=1) as peer:
        report("llama.cpp", theirs(peer), prompts, expected)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    torch.set_num_threads(1)
    for path in parser.parse_args().files:
        compare(path)


if __name__ == "__main__":
    main()
