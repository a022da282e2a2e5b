"""`worker-orcd synth`: a file of random weights in the true shape and formats of a known model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker_orcd.cli.terminal import progress_bar
from worker_orcd.errors import InvalidConfiguration

if TYPE_CHECKING:
    from worker_orcd.synth import Shape

HEADER_BYTES = 16 << 20  # more than the metadata of any of them


def synth(
    architecture: Annotated[
        str, typer.Argument(help="the architecture: llama, qwen2, phi3, gpt-oss or another", metavar="ARCH")
    ],
    out: Annotated[Path, typer.Argument(help="the file to write", metavar="OUT")],
    shape: Annotated[
        str,
        typer.Option(help="a model whose shape it has, as gpt-oss-20b; tiny: to test with", metavar="NAME"),
    ] = "tiny",
    mix: Annotated[
        str | None,
        typer.Option(
            help="quantisation, as Q4_K_M, Q4_0 or F16 (default: Q4_K_M; gpt-oss: MXFP4)",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="the same seed gives the same file", metavar="N", min=0, max=2**64 - 1)
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
) -> None:
    """Write a model of random weights.

    True shape, true mixture of tensor types, a working tokenizer; for measuring and testing.
    """
    from worker_orcd.cli.output import check_output, described, mixture_option, writing
    from worker_orcd.gguf.mixture import counts
    from worker_orcd.synth import plan, tensor_bytes, write_model

    chosen = _shape(architecture, shape)
    mixture = mixture_option(mix or ("MXFP4" if architecture == "gpt-oss" else "Q4_K_M"))
    planned = plan(chosen, mixture)
    check_output(out, tensor_bytes(planned) + HEADER_BYTES, force=force)
    name = f"tiny {architecture}" if shape == "tiny" else shape
    started = time.monotonic()
    with writing(out), progress_bar() as report:
        threads = len(os.sched_getaffinity(0))
        write_model(out, chosen, name, mixture, seed=seed, threads=threads, on_progress=report)
        size = out.stat().st_size
    types = counts(tensor.type_name for tensor in planned)
    print(f"{out}: {mixture}, {described(size, time.monotonic() - started, types)}")


def _shape(architecture: str, name: str) -> Shape:
    from worker_orcd.synth import ARCHITECTURES, shape_named, shapes_of

    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InvalidConfiguration(f"ARCH: found {architecture!r}; expected one of {known}")
    shape = shape_named(architecture, name)
    if shape is None:
        known = ", ".join(shapes_of(architecture))
        raise InvalidConfiguration(f"--shape: found {name!r}; {architecture} has {known}")
    return shape
