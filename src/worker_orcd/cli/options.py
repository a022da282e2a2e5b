"""
Command-line options made from the settings, so that each is described once.

`with_settings` adds one option a setting to a command; what was given arrives in the command's `given`
parameter, unparsed: `settings` checks the command line, the environment and the file in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from worker_orcd.cli.settings import PREFIX, Settings, about, allowed, choices, is_flag
from worker_orcd.errors import InvalidConfiguration

_PANELS = {
    "model": "Model",
    "device": "Device",
    "engine": "Engine",
    "server": "Server",
    "callback": "Callback",
    "watch": "Watch",
}


def with_settings(
    sections: Collection[str], *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command whose parameters include `given: dict[str, Any]` (setting name -> value)."""
    names = [
        name
        for name, info in Settings.model_fields.items()
        if about(info)["section"] in sections and name not in without and not about(info)["secret"]
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**values: Any) -> None:
            given = {name: value for name in names if (value := values.pop(name)) is not None}
            command(**values, given=given)

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [_parameter(name) for name in names]
        wrapper.__name__ = command.__name__
        wrapper.__doc__ = command.__doc__
        wrapper.__dict__["__signature__"] = inspect.Signature(parameters)
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    info = Settings.model_fields[name]
    section = about(info)["section"]
    help_text = info.description or ""
    default = info.default
    if default is not None and not info.is_required():
        help_text += f" (default: {str(default).lower() if is_flag(info) else default})"
    flag = "--" + name.replace("_", "-")
    flags = f"{flag}/--no-{name.replace('_', '-')}" if is_flag(info) else flag
    option = typer.Option(
        flags,
        help=help_text,
        metavar=None if is_flag(info) else _metavar(name),
        rich_help_panel=_PANELS[section],
        show_default=False,
    )
    kind = Annotated[bool | None, option] if is_flag(info) else Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _metavar(name: str) -> str:
    info = Settings.model_fields[name]
    if found := choices(info):
        return "|".join(found)
    expected = allowed(info)
    for start, short in (("an integer", "N"), ("a number", "X"), ("a path", "FILE")):
        if expected.startswith(start):
            return short
    return "TEXT"


def with_model(given: dict[str, Any], named: str | None) -> dict[str, Any]:
    """`given` with the model that was named without `--model`. Raises InvalidConfiguration if two differ."""
    if named is None:
        return given
    option = given.get("model", named)
    if option != named:
        raise InvalidConfiguration(f"model: found both {named!r} and --model {option!r}; expected one model")
    return {**given, "model": named}


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="path, file: URI, hf:org/repo/file.gguf, or demo (--model is the same)",
        metavar="MODEL",
        show_default=False,
    ),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help=f"a TOML file of settings (also {PREFIX}CONFIG)", metavar="FILE", show_default=False
    ),
]
