"""Options, each described once: a field of a frozen dataclass.

In: a dataclass whose fields are made by `option`, or are such dataclasses themselves. Out: what a
command line, or a page of docs, needs of each. What stays true: the name of an option is derived
here and nowhere else. Imports nothing large, so that `--help` is quick.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        lr: float | None = option(None, help="Peak learning rate.", group=OPTIMIZATION)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard, TypeVar, get_origin, get_type_hints

from kdcache.errors import UsageError
from kdcache.paths import require_dataset
from kdcache.waiting import DEFAULT_TIMEOUT_S

DATA, TEACHER, VIEWS = "Data", "Teacher and cache", "Views"
OPTIMIZATION, RUN, LOGGING = "Optimization", "Run", "Logging"

T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What a field says of its option.

    name        where it is not the field's; for an argument, its metavar
    default_text  what help shows as the default of a field whose default is None
    at_least    the smallest value
    require     raises UsageError for a value that cannot be used, a path for instance
    positional  an argument of the command
    """

    help: str
    group: str = ""
    name: str = ""
    metavar: str | None = None
    default_text: str | None = None
    at_least: int | None = None
    require: Callable[[Any], None] | None = None
    positional: bool = False


@dataclass(frozen=True)
class Described:
    """An option of a dataclass.

    name     as it is typed; key: the same as an identifier
    default  MISSING where the option is required
    """

    name: str
    key: str
    type: Any
    default: Any
    option: Option


def option(default: Any = MISSING, *, help: str, **description: Any) -> Any:
    """A field with this default; `description` are the other fields of `Option`."""
    return field(default=default, metadata={_KEY: Option(help, **description)})


def describe(kind: type) -> list[Described]:
    """The options of a dataclass, in the order of its fields; those of a dataclass in it there."""
    found: list[Described] = []
    for one, hint in _fields(kind):
        found += describe(hint) if is_options(hint) else [_described(one, hint)]
    return found


def option_names(kind: type) -> dict[str, str]:
    """The names of a dataclass's own options, by field."""
    return {f.name: _name(f) for f, hint in _fields(kind) if not is_options(hint)}


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass of these values, by `Described.key`. Raises UsageError for a wrong one."""
    found: dict[str, Any] = {}
    for one, hint in _fields(kind):
        if is_options(hint):
            found[one.name] = build(hint, values)
            continue
        described = _described(one, hint)
        value = values[described.key]
        if get_origin(hint) is tuple:
            value = tuple(value or ())
        # A variable of a script that is not set.
        if value == "" or value == ("",):
            raise UsageError(f"{described.name} is empty")
        if described.option.require and value is not None:
            described.option.require(value)
        found[one.name] = value
    return kind(**found)


def is_options(hint: Any) -> TypeGuard[type[Any]]:
    """Whether a type is a dataclass."""
    return isinstance(hint, type) and is_dataclass(hint)


def _fields(kind: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return ((one, hints[one.name]) for one in fields(kind))


def _described(one: Field[Any], hint: Any) -> Described:
    name, text = _name(one), one.metadata[_KEY]
    key = one.name if text.positional else name.removeprefix("--").replace("-", "_")
    return Described(name, key, hint, one.default, text)


def _name(one: Field[Any]) -> str:
    return one.metadata[_KEY].name or f"--{one.name.replace('_', '-')}"


# --- options that several dataclasses have ----------------------------------------------------


def data_option() -> Any:
    text = "The .beton file to read."
    return option(help=text, group=DATA, metavar="DATA.beton", require=require_dataset)


def batch_size_option() -> Any:
    return option(256, help="Images per forward pass.", group=RUN, metavar="N")


def precision_option() -> Any:
    text = "Precision of the teacher's forward passes, by autocast."
    return option("float32", help=text, group=TEACHER)


def workers_option() -> Any:
    return option(
        None,
        help="Threads that decode images.",
        default_text="all cores; half of them if the model runs on the CPU",
        group=RUN,
        metavar="N",
        at_least=1,
    )


def timeout_option() -> Any:
    text = "How long to wait for other processes while nothing of theirs comes."
    return option(
        DEFAULT_TIMEOUT_S, name="--timeout", help=text, group=RUN, metavar="SECONDS", at_least=1
    )


def device_option() -> Any:
    return option(
        None,
        help="cpu, cuda, cuda:1, ...",
        default_text="cuda if available",
        group=RUN,
        metavar="DEVICE",
    )
