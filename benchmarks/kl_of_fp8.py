"""
What keys and values of fp8 do to what a model predicts: KL from the reference backend's own predictions.

    python benchmarks/kl_of_fp8.py FILE… [--tokens 270]

Roundings are the GPU backend's (`worker_orcd.kernels.cuda.cache_type`), others for comparison: keys times
other powers of two, a power of two for each token and head that makes its largest number fill the range, and
keys or values alone. Minutes a file: the reference is slow.
"""

from __future__ import annotations

import argparse
import lzma
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fp8_reference import RoundedReference, Rounding, as_fp8, fp8_key
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.cuda.cache_type import KEY_SCALE, LARGEST_FP8
from worker_orcd.model.architectures import configure
from worker_orcd.model.decoder import Decoder
from worker_orcd.model.weights import load_weights
from worker_orcd.runner.plan import make_plan, tensor_bytes
from worker_orcd.runner.runner import ModelRunner
from worker_orcd.runner.scoring import score
from worker_orcd.text.tokenizer import load_tokenizer

ENGINE = EngineConfig(max_num_seqs=256, max_num_batched_tokens=512, max_model_len=1024)
DEVICE = DeviceConfig(memory_fraction=0.5, kv_cache_size_mb=128)


def exact(values: torch.Tensor) -> torch.Tensor:
    return values


def filled(head_dim: int, values: torch.Tensor) -> torch.Tensor:
    """Each head of each token by a power of two of its own."""
    heads = values.reshape(len(values), -1, head_dim)
    most = heads.abs().amax(dim=2, keepdim=True).clamp_min(1e-30)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST_FP8 / most)))
    return (as_fp8(heads * scale) / scale).reshape(values.shape)


def roundings(head_dim: int) -> dict[str, tuple[Rounding, Rounding]]:
    """Of keys and of values."""
    own = partial(filled, head_dim)
    scaled = {
        f"keys times {scale:g}": (partial(as_fp8, scale=scale), as_fp8)
        for scale in (1.0, 0.25, 0.0625, 0.015625)
    }
    return {
        f"as shipped: keys times {KEY_SCALE:g}": (fp8_key, as_fp8),
        **scaled,
        "a scale a token and head": (own, own),
        "keys alone": (fp8_key, exact),
        "values alone": (exact, as_fp8),
    }


def log_p(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


def compare(path: Path, num_tokens: int) -> None:
    backend = RoundedReference(exact, exact)
    with GGUFFile(path) as file:
        config = configure(file)
        plan = make_plan(config, tensor_bytes(file), backend, ENGINE, DEVICE, backend.available_memory())
        config = config.serving(plan.max_model_len)
        text = lzma.decompress((files("worker_orcd.cli") / "alice.txt.xz").read_bytes()).decode()
        ids = load_tokenizer(file.metadata).encode(text[3000 : 3000 + 8 * num_tokens])[:num_tokens]
        runner = ModelRunner(
            Decoder(config, load_weights(file, config, backend), backend), backend, plan, ENGINE
        )
    wanted = log_p(score(runner, ids))
    print(f"{path.name}: {len(ids)} positions\n| | mean KL | most | same top 1 |\n|---|---|---|---|")
    for name, (backend.keys, backend.values) in roundings(config.layers[0].attention.head_dim).items():
        found = log_p(score(runner, ids))
        kl = (np.exp(wanted) * (wanted - found)).sum(axis=1)
        same = (wanted.argmax(axis=1) == found.argmax(axis=1)).mean()
        print(f"| {name} | {kl.mean():.6f} | {kl.max():.4f} | {same:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=270)
    args = parser.parse_args()
    for path in args.files:
        compare(path, args.tokens)


if __name__ == "__main__":
    main()
