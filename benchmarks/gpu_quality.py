"""
A real file on a GPU: its greedy tokens on the golden prompts, and how well it predicts a text.

    python benchmarks/gpu_quality.py SmolLM2-135M-Instruct.Q4_1.gguf --windows 40

Beside the CPU backend in float32 on the same machine, which is at transformers' float32 on the dequantised
weights (docs/perf/quality.md, where llama.cpp's divergence on the same text is, too). Needs a GPU, a C
compiler and the package's own requirements; no network. Greedy tokens must be the recorded reference's up to
where its two most likely tokens are close; the divergence must not be above `--most`, llama.cpp's on the same
file and text. Windows as in `worker-orcd perplexity`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpu_report import Session
from worker_orcd.cli.perplexity import default_text
from worker_orcd.config import DeviceConfig, EngineConfig, WorkerConfig
from worker_orcd.runner.perplexity import log_softmax, perplexity, window_logits, windows
from worker_orcd.runner.scoring import score
from worker_orcd.worker import LoadedModel, load

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "smollm2-q4_1.json"
CLOSE = 0.05  # logits nearer than that may change places: float16 operands
LLAMA_CPP_KL = 0.002790  # SmolLM2 Q4_1, all of the text: docs/perf/quality.md
ROWS = 64  # of logits compared at a time


def loaded_on(path: Path, device: Any, context: int) -> LoadedModel:
    settings = DeviceConfig(device=device, cpu_activations="float32")
    engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=512, max_model_len=context)
    return load(WorkerConfig(model=str(path), device=settings, engine=engine), warn=print)


def check_golden(session: Session, gpu: LoadedModel) -> None:
    """Greedy continuations, teacher-forced: each next token from the reference's own text so far."""
    checked = wrong = total = same = 0
    for entry in json.loads(GOLDEN.read_text())["results"]:
        ids, out = entry["prompt_ids"], entry["out_ids"]
        logits = score(gpu.runner, ids + out[:-1])[len(ids) - 1 :]
        chosen = logits.argmax(axis=1)
        for token, wanted, gap in zip(chosen.tolist(), out, entry["gaps"], strict=True):
            total, same = total + 1, same + (token == wanted)
            if gap >= CLOSE:
                checked, wrong = checked + 1, wrong + (token != wanted)
    found = {"tokens": total, "the reference's": same, "beyond doubt": checked, "of these others": wrong}
    session.keep("golden", found)
    session.say(f"golden prompts: {found}", ok=checked >= 100 and wrong == 0)


def check_text(session: Session, gpu: LoadedModel, cpu: LoadedModel) -> None:
    args = session.args
    ids = gpu.tokenizer.encode(default_text())[: args.windows * args.context]
    ours: list[float] = []
    theirs: list[float] = []
    divergences: list[float] = []
    for window, first in windows(ids, args.context):
        targets, position = window[first + 1 :], 0
        reference = np.concatenate(list(window_logits(cpu.runner, window, first)))
        found = np.concatenate(list(window_logits(gpu.runner, window, first)))
        for start in range(0, len(found), ROWS):
            rows = slice(start, start + ROWS)
            wanted, mine = log_softmax(reference[rows]), log_softmax(found[rows])
            these = targets[position : position + len(mine)]
            ours += mine[np.arange(len(mine)), these].tolist()
            theirs += wanted[np.arange(len(mine)), these].tolist()
            divergences += (np.exp(wanted) * (wanted - mine)).sum(axis=-1).tolist()
            position += len(mine)
    result = {
        "positions": len(ours), "kl": float(np.mean(divergences)), "most": float(np.max(divergences)),
        "perplexity": perplexity(np.array(ours)).value, "float32": perplexity(np.array(theirs)).value,
    }  # fmt: skip
    session.keep("text", result)
    session.say(
        f"text: {result['positions']} positions, KL mean {result['kl']:.7f}, most {result['most']:.6f};"
        f" perplexity {result['perplexity']:.4f}, float32's {result['float32']:.4f}",
        ok=result["kl"] <= args.most,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("file", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--most", type=float, default=LLAMA_CPP_KL, help="mean KL that is allowed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_quality.json"))
    parser.add_argument("--commit")
    session = Session(parser.parse_args())
    gpu = loaded_on(session.args.file, session.args.device, session.args.context)
    cpu = loaded_on(session.args.file, "cpu", session.args.context)
    session.guarded("golden", lambda: check_golden(session, gpu))
    session.guarded("text", lambda: check_text(session, gpu, cpu))
    gpu.close()
    cpu.close()
    print("\n".join(session.lines))
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
