"""`worker-orcd inspect`: what a GGUF file holds, and what serving it would take."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker_orcd.cli.options import ConfigFile, ModelArgument, with_model, with_settings
from worker_orcd.cli.settings import load_config
from worker_orcd.cli.terminal import progress_bar, warn_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from worker_orcd.config import WorkerConfig
    from worker_orcd.gguf.metadata import Value
    from worker_orcd.gguf.reader import GGUFFile
    from worker_orcd.runner.plan import MemoryPlan

ARRAY_ITEMS_SHOWN = 8
STRING_CHARACTERS_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Planned:
    """A memory plan, or why there is none."""

    plan: MemoryPlan | None
    reason: str = ""


@with_settings(
    ["model", "device", "engine"], without=["model_sha256", "tokenizer", "worker_id", "max_model_len"]
)
def inspect(
    given: dict[str, Any],
    named: ModelArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for machines")] = False,
    context: Annotated[
        int | None, typer.Option(help="tokens to plan the memory for", metavar="N", min=1, show_default=False)
    ] = None,
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = True,
    config: ConfigFile = None,
) -> None:
    """Print what a model file holds.

    Metadata, tensors, how the bytes divide among tensor types, and what serving it would take here.
    """
    given = {"max_model_len": context, **with_model(given, named)}
    settings, warnings = load_config(given, config_file=config)
    warn_all(warnings)
    from worker_orcd import hub
    from worker_orcd.gguf.reader import GGUFFile

    with progress_bar() as report:
        path = hub.resolve(settings.model, report)
    with GGUFFile(path) as file:
        planned = _plan(file, settings)
        if as_json:
            json.dump(_as_json(file, planned), sys.stdout, indent=2, allow_nan=False)
            print()
        else:
            _print(file, planned, tensors=tensors)


def _plan(file: GGUFFile, config: WorkerConfig) -> Planned:
    """What serving would take on this machine. A file that cannot be served can still be looked at."""
    from worker_orcd.errors import LoadError
    from worker_orcd.worker import plan_memory

    try:
        return Planned(plan_memory(file, config))
    except LoadError as error:
        return Planned(None, error.message)


# -- for machines ----------------------------------------------------------------------------------------


def _as_json(file: GGUFFile, planned: Planned) -> dict[str, Any]:
    from worker_orcd.gguf.kind import quant_kind, type_shares
    from worker_orcd.gguf.types import TENSOR_TYPES

    plan = planned.plan
    return {
        "version": file.version,
        "file_bytes": file.file_bytes,
        "quant_kind": quant_kind(file),
        "metadata": {key: _json_value(value) for key, value in _metadata(file)},
        "types": [asdict(share) for share in type_shares(file)],
        "tensors": [
            {**asdict(tensor), "type": TENSOR_TYPES[tensor.ggml_type].name}
            for tensor in file.tensors.values()
        ],
        "memory_plan": None if plan is None else {**asdict(plan), "total_bytes": plan.total_bytes},
        "no_memory_plan_because": planned.reason or None,
    }


def _metadata(file: GGUFFile) -> Iterator[tuple[str, Value]]:
    for key in file.metadata:
        value = file.metadata.raw(key)
        if value is not None:
            yield key, value


def _json_value(value: Value) -> Any:
    """JSON has no NaN and no infinity, and nobody reads 50,000 tokens: long arrays keep their first items."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, str | int):
        return value
    size, items = _items(value)
    shown = [_json_value(item) for item in items]
    return shown if len(shown) == size else {"length": size, "first": shown}


def _items(value: Any) -> tuple[int, list[Any]]:
    """How many items an array has, and the first of them as Python values."""
    first: Any = value[:ARRAY_ITEMS_SHOWN]
    return len(value), list(first) if isinstance(value, list) else first.tolist()


# -- for people ------------------------------------------------------------------------------------------


def _print(file: GGUFFile, planned: Planned, *, tensors: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    _print_metadata(console, file)
    if tensors:
        _print_tensors(console, file)
    _print_types(console, file)
    _print_plan(console, planned)


def _print_metadata(console: Console, file: GGUFFile) -> None:
    from rich.text import Text

    from worker_orcd.cli.tables import table

    metadata = table("key", "value", title=f"GGUF version {file.version}, {file.file_bytes:,} bytes")
    for key, value in _metadata(file):
        metadata.add_row(Text(ascii(key)[1:-1]), Text(_shown(value)))
    console.print(metadata)


def _shown(value: Value) -> str:
    """On one line and printable: the file may hold escape sequences for the terminal."""
    if isinstance(value, str):
        start = value[:STRING_CHARACTERS_SHOWN]
        more = f" … ({len(value):,} characters)" if len(value) > len(start) else ""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start) + more
    if isinstance(value, float):
        return f"{value:.7g}"  # most are float32
    if isinstance(value, bool | int):
        return str(value).lower()
    size, items = _items(value)
    shown = ", ".join(_shown(item) for item in items)
    return f"[{shown}]" if size == len(items) else f"[{shown}, …] ({size:,} items)"


def _print_tensors(console: Console, file: GGUFFile) -> None:
    from rich.text import Text

    from worker_orcd.cli.tables import table
    from worker_orcd.gguf.types import TENSOR_TYPES

    rows = table("tensor", "shape", "type", ">bytes", title=f"{len(file.tensors)} tensors")
    for tensor in file.tensors.values():
        shape = " x ".join(str(n) for n in tensor.shape)
        kind = TENSOR_TYPES[tensor.ggml_type].name
        rows.add_row(Text(ascii(tensor.name)[1:-1]), shape, kind, f"{tensor.nbytes:,}")
    console.print(rows)


def _print_types(console: Console, file: GGUFFile) -> None:
    from worker_orcd.cli.tables import table
    from worker_orcd.gguf.kind import quant_kind, type_shares

    shares = type_shares(file)
    total = sum(share.num_bytes for share in shares) or 1
    mix = table("type", ">tensors", ">weights", ">bytes", ">share", title=f"quantisation: {quant_kind(file)}")
    for share in shares:
        numbers = (share.num_tensors, share.num_weights, share.num_bytes)
        mix.add_row(share.name, *(f"{n:,}" for n in numbers), f"{share.num_bytes / total:.1%}")
    console.print(mix)


def _print_plan(console: Console, planned: Planned) -> None:
    if planned.plan is None:
        console.print(f"no memory plan: {planned.reason}")
        return
    from worker_orcd.cli.tables import plan_table

    console.print(plan_table(planned.plan))
    for note in planned.plan.notes:
        console.print(f"note: {note}")
