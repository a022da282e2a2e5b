"""Throughput and latency over batch size, drawn from a `bench` report. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from worker_orcd.errors import InvalidConfiguration


def plot(report: dict[str, Any], path: Path) -> None:
    """Write the picture in the format that the suffix of `path` names. Raises InvalidConfiguration."""
    figures: Any = importlib.import_module("matplotlib.figure")  # no pyplot: no display is needed
    results = report["results"]
    sizes = [result["batch_size"] for result in results]
    figure = figures.Figure(figsize=(9, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for axes, unit in ((rates, "tokens a second"), (times, "ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("requests at the same time")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    for name, label in (("decode_rate", "decode"), ("output_rate", "output, whole run")):
        rates.plot(sizes, [result[name] for result in results], marker="o", label=label)
    for name, label in (("between_tokens_ms", "between tokens, median"), ("between_tokens_ms_p95", "p95")):
        times.plot(sizes, [result[name] for result in results], marker="o", label=label)
    for axes in (rates, times):
        axes.set_ylim(bottom=0)
        axes.legend()
    model = report["model"]
    figure.suptitle(f"{model['id']} ({model['quant_kind']}) on {model['backend']}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InvalidConfiguration(f"--plot {path}: {error.strerror}") from None
    except ValueError as error:  # an unknown suffix
        raise InvalidConfiguration(f"--plot {path}: {error}") from None
