"""The docs say what is true: the command line's page is current, Python blocks run, files exist.

`python -m tests.test_docs` writes docs/cli.md anew.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import typer.models

import benchmarks.page
import kdcache
from kdcache.cache.codecs import CODECS, Transformed
from kdcache.cli import app
from kdcache.data.beton import Dataset
from kdcache.data.sources import SOURCES
from kdcache.losses.loss import LOSSES
from kdcache.models.load import load_model
from kdcache.teacher.precompute import precompute
from kdcache.views.settings import SETTINGS
from kdcache.views.spec import ViewSpec
from kdcache.views.transforms import TRANSFORMS
from scripts import api_page
from tests.conftest import TEACHER, cache_spec

ROOT = Path(__file__).parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


# What `cli/options.py` adds to a help text where typer has no value to show.
DEFAULT = re.compile(r" \[dim\]\\\[default: (.*)\]\[/dim\]$")


def cli_page() -> str:
    """docs/cli.md from the signatures that typer reads: a table for each group of options."""
    note = "Generated from the commands: `kdcache COMMAND --help` prints the same."
    parts = ["# The command line", note]
    for name, function in _commands():
        parameters = inspect.signature(function).parameters.values()
        options = [p for p in parameters if get_origin(p.annotation) is Annotated]
        groups: dict[str, list[inspect.Parameter]] = {}
        for one in options:
            info = get_args(one.annotation)[1]
            group = "Arguments" if _is_argument(info) else info.rich_help_panel or "Options"
            groups.setdefault(group, []).append(one)
        infos = [get_args(one.annotation)[1] for one in groups.get("Arguments", ())]
        parts.append(" ".join(["## kdcache", name, *(info.metavar for info in infos)]))
        parts.append(inspect.cleandoc(function.__doc__ or ""))
        parts += [_table(group, members) for group, members in groups.items()]
    return "\n\n".join(parts) + "\n"


def _commands() -> Iterator[tuple[str, Any]]:
    groups = [("", app.app)]
    groups += [(f"{one.name} ", one.typer_instance) for one in app.app.registered_groups]
    for prefix, group in groups:
        for command in group.registered_commands:
            function: Any = command.callback
            yield f"{prefix}{command.name or function.__name__}", function


def _is_argument(info: Any) -> bool:
    return isinstance(info, typer.models.ArgumentInfo)


def _table(group: str, members: list[inspect.Parameter]) -> str:
    return "\n".join([f"| {group} | default | |", "| --- | --- | --- |", *map(_row, members)])


def _row(parameter: inspect.Parameter) -> str:
    kind, info = get_args(parameter.annotation)
    # typer.Option takes its first name where a default would stand.
    name = info.metavar if _is_argument(info) else info.default
    if info.metavar and not _is_argument(info):
        name += f" {info.metavar}"
    noted, default = DEFAULT.search(info.help), parameter.default
    if default is inspect.Parameter.empty:
        shown = "required"
    else:
        shown = noted[1] if noted else "" if default is None or default is False else str(default)
    literals = [a for k in (kind, *get_args(kind)) if get_origin(k) is Literal for a in get_args(k)]
    choices = f" One of {', '.join(literals)}." if literals else ""
    text = DEFAULT.sub("", info.help)
    return f"| `{name}` | {shown} | {text}{choices} |"


def test_the_page_of_the_command_line_is_current() -> None:
    assert CLI_PAGE.read_text() == cli_page(), "write it anew: python -m tests.test_docs"


@pytest.fixture
def tables() -> Iterator[None]:
    """What a page adds to the tables of the seams is taken away after it."""
    found: tuple[dict[str, Any], ...] = (SOURCES, TRANSFORMS, CODECS, LOSSES, SETTINGS)
    before = [dict(table) for table in found]
    yield
    for table, own in zip(found, before, strict=True):
        table.clear()
        table.update(own)


def test_the_page_of_the_library_is_current() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "python -m scripts.api_page"


def test_the_page_of_the_library_has_every_public_name() -> None:
    listed = [name for names in api_page.GROUPS.values() for name in names]
    assert sorted(listed) == kdcache.__all__


def test_the_page_of_the_benchmarks_is_current() -> None:
    assert benchmarks.page.PAGE.read_text() == benchmarks.page.page(), "python -m benchmarks.page"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(
    page: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None
) -> None:
    teacher = load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    view = ViewSpec(8)
    spec = cache_spec(digits, teacher, view, num_views=1, top_k=3, dtype="float16")
    precompute(digits, teacher, spec, tmp_path / "cache.zarr")
    transformed = replace(spec, codec=Transformed(k=2, num_calibration_records=64))
    precompute(digits, teacher, transformed, tmp_path / "transformed.zarr")
    for file in digits.path.parent.glob(digits.path.name + "*"):  # and what lies beside it
        (tmp_path / file.name.replace(digits.path.name, "train.beton")).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}  # later blocks of a page use what earlier ones define
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), space)


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page())
