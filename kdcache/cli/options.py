"""From options in dataclasses to a command: typer reads a signature that is made of their fields.

    @command
    def precompute(options: PrecomputeOptions, output: OutputOptions) -> None: ...

typer sees a function that has each option of both as a parameter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kdcache.options import LOGGING, Described, build, describe, is_options, option

GROUPED_OPTIONS = 10  # help shows fewer than this as one group


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How a command prints its result."""

    as_json: bool = option(
        False, name="--json", help="Print the result as one line of JSON.", group=LOGGING
    )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function with an option for each field of its dataclass parameters; others stay."""
    hints = get_type_hints(function)
    hints.pop("return", None)
    kinds = {name: hint for name, hint in hints.items() if is_options(hint)}
    described = [one for kind in kinds.values() for one in describe(kind)]
    grouped = len(described) >= GROUPED_OPTIONS

    @functools.wraps(function)
    def run(**values: Any) -> None:
        others = {name: values[name] for name in hints if name not in kinds}
        function(**{name: build(kind, values) for name, kind in kinds.items()}, **others)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint)
        for name, hint in hints.items()
        if name not in kinds
    ]
    parameters += [_parameter(one, grouped=grouped) for one in described]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameter(one: Described, *, grouped: bool) -> inspect.Parameter:
    text = one.option
    # typer would put a text in parentheses.
    default_text = f" [dim]\\[default: {text.default_text}][/dim]" if text.default_text else ""
    shared: dict[str, Any] = {
        "help": text.help + default_text,
        "show_default": not default_text,
        "rich_help_panel": text.group if grouped and text.group else None,
    }
    if text.at_least is not None:
        shared["min"] = text.at_least
    if Path in (one.type, *get_args(one.type)):
        shared["parser"] = _path
    if text.positional:
        info: Any = typer.Argument(metavar=one.name, **shared)
    else:
        # typer would show the type of a flag, <bool>.
        metavar = "" if _is_flag(one) else text.metavar
        info = typer.Option(*_declarations(one), metavar=metavar, **shared)
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    kind = one.type
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], default or None  # type: ignore[misc]
    return inspect.Parameter(
        one.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _path(text: str) -> Path:
    if not text:  # which pathlib takes as the working directory
        raise typer.BadParameter("it is empty")
    return Path(text)


def _declarations(one: Described) -> tuple[str, ...]:
    if not _is_flag(one):
        return (one.name,)
    # One that may be left to something else has both forms.
    return (one.name,) if one.type is bool else (f"{one.name}/--no-{one.name[2:]}",)


def _is_flag(one: Described) -> bool:
    return bool in (one.type, *get_args(one.type))
