"""`worker-orcd quantize`: the same model with its matrices in other formats."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker_orcd.cli.terminal import progress_bar, warn
from worker_orcd.errors import InvalidConfiguration

if TYPE_CHECKING:
    from worker_orcd.convert import PlannedTensor

HEADER_BYTES = 64 << 20  # metadata are copied; they are rarely larger
_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".ckpt")


def quantize(
    model: Annotated[str, typer.Argument(help="a GGUF file, hf:org/repo/file.gguf, or demo", metavar="IN")],
    out: Annotated[Path, typer.Argument(help="the file to write", metavar="OUT")],
    mix: Annotated[
        str, typer.Option(help="quantisation, as Q4_K_M, Q4_0, MXFP4, Q8_0 or F16", metavar="NAME")
    ],
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
) -> None:
    """Write a model with its matrices in other formats.

    Each tensor gets the type that files of the name have; vectors and metadata stay as they are.
    """
    from worker_orcd import hub
    from worker_orcd.cli.output import check_output, described, mixture_option, writing
    from worker_orcd.convert import plan, requantize, tensor_bytes
    from worker_orcd.gguf.mixture import counts
    from worker_orcd.gguf.reader import GGUFFile

    _refuse_other_formats(model)
    mixture = mixture_option(mix)
    started = time.monotonic()
    with progress_bar() as report, GGUFFile(hub.resolve(model, report)) as file:
        planned = plan(file, mixture)
        check_output(out, tensor_bytes(planned) + HEADER_BYTES, force=force)
        _warn_of_loss(planned)
        with writing(out):
            threads = len(os.sched_getaffinity(0))
            requantize(file, out, mixture, threads=threads, on_progress=report)
    types = counts(tensor.target.name for tensor in planned)
    print(f"{out}: {mixture}, {described(out.stat().st_size, time.monotonic() - started, types)}")


def _refuse_other_formats(model: str) -> None:
    path = Path(model)
    if path.is_dir() or path.suffix.lower() in _OTHERS:
        raise InvalidConfiguration(
            f"IN: {path.name!r} is no GGUF file; make one first with llama.cpp's convert_hf_to_gguf.py "
            "(--outtype f16 or bf16), then quantise that"
        )


def _warn_of_loss(planned: list[PlannedTensor]) -> None:
    from worker_orcd.gguf.mixture import counts

    again = counts(tensor.source.name for tensor in planned if tensor.loses_twice)
    if again:
        types = ", ".join(f"{name} {count}" for name, count in again.items())
        warn(
            f"weights that are quantised already ({types}) lose precision a second time; "
            "quantising the original F16 or BF16 file gives a better model"
        )
