"""`worker-orcd bench`: how fast a model is on this machine, as a table, JSON and a picture."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker_orcd.cli import machine
from worker_orcd.cli.options import ConfigFile, ModelArgument, with_model, with_settings
from worker_orcd.cli.output import write_text
from worker_orcd.cli.settings import load_config
from worker_orcd.cli.terminal import warn, warn_all
from worker_orcd.errors import InvalidConfiguration

if TYPE_CHECKING:
    from worker_orcd.cli.measure import BatchResult
    from worker_orcd.config import WorkerConfig
    from worker_orcd.worker import LoadedModel

BATCH_SIZES = "1,2,4,8,16"


@with_settings(["model", "device", "engine"], without=["worker_id"])
def bench(
    given: dict[str, Any],
    named: ModelArgument = None,
    batch_sizes: Annotated[
        str, typer.Option(help="requests sent at the same moment", metavar="N,N,…")
    ] = BATCH_SIZES,
    prompt_tokens: Annotated[int, typer.Option(help="length of each prompt", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(help="length of each answer", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="runs of each batch size; the median counts", min=1)] = 3,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write the results here", metavar="FILE", show_default=False),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="draw throughput and latency here", metavar="FILE", show_default=False),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Measure how fast a model is here.

    Load time, time to first token, and rates over batch sizes, through the engine that serves.
    """
    sizes = _parse_sizes(batch_sizes)
    settings, warnings = load_config(with_model(given, named), config_file=config)
    warn_all(warnings)
    if plot_file is not None and find_spec("matplotlib") is None:
        raise InvalidConfiguration("--plot needs matplotlib: install worker-orcd[plot]")
    if max(sizes) > settings.engine.max_num_seqs:
        allowed = settings.engine.max_num_seqs
        raise InvalidConfiguration(f"--batch-sizes: found {max(sizes)}; max_num_seqs allows 1 to {allowed}")
    report = _measure(settings, sizes, prompt_tokens, output_tokens, repeats)
    _print(report)
    if json_file is not None:
        write_text("--json", json_file, json.dumps(report, indent=2) + "\n")
    if plot_file is not None:
        from worker_orcd.cli.plot import plot

        plot(report, plot_file)


def _parse_sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise InvalidConfiguration(
            f"--batch-sizes: found {text!r}; expected positive integers, as in {BATCH_SIZES}"
        )
    return sizes


def _measure(
    config: WorkerConfig, sizes: list[int], prompt_tokens: int, output_tokens: int, repeats: int
) -> dict[str, Any]:
    from worker_orcd.cli.local import local_engine
    from worker_orcd.cli.measure import StepRecorder, Workload, measure_batch, warm_up

    recorder = StepRecorder()
    workload = Workload(prompt_tokens, output_tokens, repeats)
    before = machine.load_average()
    started = time.time()
    with local_engine(config, recorder) as engine:
        longest = engine.loaded.plan.max_model_len
        if prompt_tokens + output_tokens > longest:
            raise InvalidConfiguration(
                f"--prompt-tokens and --output-tokens: found {prompt_tokens} and {output_tokens}; "
                f"expected at most {longest} together"
            )
        warm_up(engine, recorder)
        results: list[BatchResult] = []
        for size in sizes:
            print(f"measuring batch size {size}", file=sys.stderr, flush=True)
            results.append(measure_batch(engine, recorder, size, workload))
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "versions": machine.versions(),
            "machine": asdict(machine.describe()),
            "load_average": {"before": before, "after": machine.load_average()},
            "model": _facts(engine.loaded),
            "settings": {"device": asdict(config.device), "engine": asdict(engine.loaded.engine_config)},
            "workload": asdict(workload),
            "load_seconds": {**asdict(engine.loaded.timings), "total": engine.loaded.timings.total},
            "results": [asdict(result) for result in results],
        }


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    from worker_orcd import hub

    return {
        "id": loaded.model_id,
        "sha256": loaded.sha256 or hub.file_sha256(loaded.path),
        "architecture": loaded.config.architecture,
        "quant_kind": loaded.quant_kind,
        "file_bytes": loaded.file_bytes,
        "backend": loaded.backend.description,
        "memory_bytes": loaded.plan.total_bytes,
        "kv_cache_tokens": loaded.plan.kv_cache_tokens,
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from worker_orcd.cli.tables import table

    model, load = report["model"], report["load_seconds"]
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{model['id']} ({model['quant_kind']}, {model['file_bytes'] / 1e6:.0f} MB) on {model['backend']}"
    )
    console.print(f"{report['machine']['cpu']}, load average {report['load_average']['before'][0]}")
    stages = ", ".join(f"{name} {load[name]:.2f}" for name in load if name != "total")
    console.print(f"loaded in {load['total']:.2f} s ({stages})")
    workload = report["workload"]
    lengths = f"{workload['prompt_tokens']} prompt and {workload['output_tokens']} output tokens a request"
    columns = ("batch", "first token ms", "p95", "prompt tok/s", "between tokens ms", "p95", "step ms")
    rates = ("decode tok/s", "output tok/s")
    rows = table(*(f">{name}" for name in (*columns, *rates)), title=lengths)
    for result in report["results"]:
        rows.add_row(
            str(result["batch_size"]),
            f"{result['first_token_ms']:.0f}",
            f"{result['first_token_ms_p95']:.0f}",
            f"{result['prompt_rate']:.0f}",
            f"{result['between_tokens_ms']:.1f}",
            f"{result['between_tokens_ms_p95']:.1f}",
            f"{result['decode_step_ms']:.1f}",
            f"{result['decode_rate']:.1f}",
            f"{result['output_rate']:.1f}",
        )
    console.print(rows)
    if max(report["load_average"]["before"][0], 0.0) > report["machine"]["usable_cores"] / 2:
        warn("the machine was busy before this began: these figures are too low")
