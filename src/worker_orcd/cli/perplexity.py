"""`worker-orcd perplexity`: how well a model predicts a text, to compare formats and kernels."""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker_orcd.cli import machine
from worker_orcd.cli.options import ConfigFile, ModelArgument, with_model, with_settings
from worker_orcd.cli.output import write_text
from worker_orcd.cli.settings import load_config
from worker_orcd.cli.terminal import progress_bar, warn, warn_all
from worker_orcd.errors import InvalidConfiguration

if TYPE_CHECKING:
    from worker_orcd.config import WorkerConfig
    from worker_orcd.worker import LoadedModel

DEFAULT_TEXT = "alice.txt"  # Alice's Adventures in Wonderland, in the public domain
MIN_CONTEXT = 4


@with_settings(["model", "device", "engine"], without=["worker_id", "max_model_len"])
def perplexity(
    given: dict[str, Any],
    named: ModelArgument = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="a text in UTF-8 (default: Alice in Wonderland)", metavar="FILE", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="how much of it, from its start", metavar="N", min=1)] = 20480,
    context: Annotated[
        int,
        typer.Option(help="tokens of a window, whose second half is scored", metavar="N", min=MIN_CONTEXT),
    ] = 512,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write the result here", metavar="FILE", show_default=False),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Measure how well a model predicts a text.

    Windows of equal length from an empty cache, the second half of each scored, as llama.cpp does it.
    """
    given = {"max_model_len": context, **with_model(given, named)}
    settings, warnings = load_config(given, config_file=config)
    warn_all(warnings)
    name, content = (DEFAULT_TEXT, default_text()) if text is None else (text.name, _read(text))
    report = _measure(settings, name, content, tokens, context)
    _print(report)
    if json_file is not None:
        write_text("--json", json_file, json.dumps(report, indent=2) + "\n")


def default_text() -> str:
    """What is scored where no other text is named: 148,481 characters of English prose and verse."""
    stored = resources.files("worker_orcd.cli").joinpath(f"{DEFAULT_TEXT}.xz").read_bytes()
    return lzma.decompress(stored).decode("ascii")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidConfiguration(f"--text: {path.name!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(f"--text: {path.name!r} is not UTF-8 (byte {error.start})") from None


def _measure(config: WorkerConfig, name: str, text: str, num_tokens: int, context: int) -> dict[str, Any]:
    from worker_orcd import worker

    with progress_bar() as report:
        loaded = worker.load(config, warn=warn, on_progress=report)
    try:
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(text)[:num_tokens]
        if len(ids) < context:
            raise InvalidConfiguration(
                f"--context: found {context}; expected at most {len(ids)}, the tokens used of {name!r}"
            )
        bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
        result, seconds = _score(loaded, ids, context, bos_id)
        return {
            "text": {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "context": context,
            "windows": len(ids) // context,
            "tokens": len(ids) // context * context,
            **result,
            "seconds": seconds,
            "tokens_per_second": len(ids) // context * context / seconds,
            "model": {
                "id": loaded.model_id,
                "architecture": loaded.config.architecture,
                "quant_kind": loaded.quant_kind,
                "backend": loaded.backend.description,
            },
            "device": asdict(config.device),
            "versions": machine.versions(),
        }
    finally:
        loaded.close()


def _score(
    loaded: LoadedModel, ids: list[int], context: int, bos_id: int | None
) -> tuple[dict[str, Any], float]:
    import numpy as np

    from worker_orcd.runner.perplexity import perplexity, score_text

    started = time.perf_counter()
    total = len(ids) // context * context
    scored: list[Any] = []
    with progress_bar(unit="tokens") as report:
        report("scoring", 0, total)
        for logprobs in score_text(loaded.runner, ids, context, bos_id):
            scored.append(logprobs)
            report("scoring", len(scored) * context, total)
    found = perplexity(np.concatenate(scored))
    result = {
        "scored": found.num_tokens,
        "mean_nll": found.mean_nll,
        "mean_nll_error": found.mean_nll_error,
        "perplexity": found.value,
        "perplexity_error": found.error,
    }
    return result, time.perf_counter() - started


def _print(report: dict[str, Any]) -> None:
    model = report["model"]
    print(f"{model['id']} ({model['quant_kind']}) on {model['backend']}")
    print(
        f"{report['text']['name']}: {report['windows']} windows of {report['context']} tokens, each from an "
        f"empty cache; scored: the second half of each, {report['scored']:,} tokens"
    )
    print(f"mean negative log-likelihood  {report['mean_nll']:.5f} ± {report['mean_nll_error']:.5f}")
    print(f"perplexity                    {report['perplexity']:.4f} ± {report['perplexity_error']:.4f}")
    print(f"{report['tokens_per_second']:.0f} tokens a second", file=sys.stdout)
