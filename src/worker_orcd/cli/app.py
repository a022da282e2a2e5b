"""The commands, put together. Nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from worker_orcd.cli.bench import bench
from worker_orcd.cli.chat import run
from worker_orcd.cli.doctor import doctor
from worker_orcd.cli.inspect import inspect
from worker_orcd.cli.perplexity import perplexity
from worker_orcd.cli.quantize import quantize
from worker_orcd.cli.serve import serve
from worker_orcd.cli.synth import synth
from worker_orcd.cli.terminal import progress_bar, reports_errors
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION


def build() -> typer.Typer:
    """The application; calling it runs the command line and exits."""
    app = typer.Typer(
        name="worker-orcd",
        help="An LLM inference worker: one GGUF model, one device, reproducible answers.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (serve, run, inspect, bench, doctor, fetch, synth, quantize, perplexity):
        app.command()(reports_errors(command))
    app.command()(version)
    app.callback()(_options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="print the version and exit", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """What is given before a command; `_print_version` has done it when this is called."""


def fetch(
    model: Annotated[str, typer.Argument(help="hf:org/repo/file.gguf, or demo", metavar="MODEL")],
) -> None:
    """Download a model into the cache.

    If it is not there already; then print where its file is.
    """
    from worker_orcd import hub

    with progress_bar() as report:
        path = hub.resolve(model, report)
    print(path)


def version() -> None:
    """Print the version."""
    print(f"worker-orcd {VERSION} (reproducibility contract {REPRODUCIBILITY_CONTRACT})")
