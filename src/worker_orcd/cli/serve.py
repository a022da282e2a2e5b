"""`worker-orcd serve`: load one model and answer HTTP requests until told to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from worker_orcd.cli.options import ConfigFile, ModelArgument, with_model, with_settings
from worker_orcd.cli.settings import is_loopback, load_config
from worker_orcd.cli.terminal import progress_bar, warn, warn_all
from worker_orcd.errors import InvalidConfiguration


@with_settings(["model", "device", "engine", "server", "callback", "watch"])
def serve(
    given: dict[str, Any],
    named: ModelArgument = None,
    config: ConfigFile = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="holds the bearer tokens that clients must present, one a line",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="holds the bearer token for /shutdown and for cancelling anybody's job",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="listen beyond this machine without an API key")
    ] = False,
    api_key: Annotated[str | None, typer.Option("--api-key", hidden=True)] = None,
    admin_key: Annotated[str | None, typer.Option("--admin-key", hidden=True)] = None,
) -> None:
    """Load a model and serve it over HTTP.

    Until SIGTERM or Ctrl-C; running requests get the grace period to finish.
    """
    for name, key in (("api", api_key), ("admin", admin_key)):
        if key is not None:  # known only to be refused with a reason
            raise InvalidConfiguration(
                f"--{name}-key: keys on a command line are visible to everybody on the machine; "
                f"use WORKER_ORCD_{name.upper()}_KEY or --{name}-key-file"
            )
    settings, warnings = load_config(
        with_model(given, named),
        config_file=config,
        key_files={"api_key": api_key_file, "admin_key": admin_key_file},
        insecure=insecure,
    )
    warn_all(warnings)
    server = settings.server
    if insecure and server.api_key is None and not is_loopback(server.host):
        warn("anybody who can reach this machine can use and stop this worker (--insecure)")
    from worker_orcd import hub

    path = hub.check_local(settings.model)
    # What ends the process from outside of Python says at least where that was. Before anybody watches pages.
    with contextlib.suppress(OSError, ValueError):  # stderr is not a file, or closed
        faulthandler.enable()
    # After the settings are known to be good: what follows takes seconds.
    from worker_orcd.worker import ahead

    ahead.begin(settings.device, path)
    from worker_orcd import worker

    pretty = settings.server.narration != "json" and sys.stderr.isatty()
    raise typer.Exit(worker.serve(settings, drawing=progress_bar if pretty else None))
