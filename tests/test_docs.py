"""The docs say what is true: the command line's page is current, Python blocks run, files exist.

`python -m tests.test_docs` writes docs/cli.md anew.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer.models

import benchmarks.page
from kdcache.cli import app
from kdcache.data.beton import Dataset
from kdcache.models.load import load_model
from kdcache.teacher.precompute import precompute
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec

ROOT = Path(__file__).parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def cli_page() -> str:
    """docs/cli.md from the commands' own declarations."""
    note = "Generated from the commands: `kdcache COMMAND --help` says the same."
    parts = ["# The command line", note]
    groups = [(None, app), *((g.name, g.typer_instance) for g in app.registered_groups)]
    for group, command in [(name, c) for name, one in groups for c in one.registered_commands]:
        function: Any = command.callback
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        pairs = [(p, *get_args(hints[p.name])) for p in parameters]
        positional = [i.metavar or p.name.upper() for p, _, i in pairs if _is_argument(i)]
        names = ["## kdcache", *filter(None, [group]), command.name or function.__name__]
        parts.append(" ".join([*names, *positional]))
        parts.append(inspect.cleandoc(function.__doc__))
        rows = [_row(*pair) for pair in pairs if not _is_argument(pair[2])]
        parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _is_argument(info: Any) -> bool:
    return isinstance(info, typer.models.ArgumentInfo)


def _row(parameter: inspect.Parameter, kind: Any, info: Any) -> str:
    # In an Annotated the first name stands where a default would.
    names = [n for n in (info.default, *(info.param_decls or ())) if str(n).startswith("--")]
    flag = "/".join(names or [f"--{parameter.name.replace('_', '-')}"])
    text, _, noted = info.help.partition("[default: ")
    default = noted.rstrip("]")
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    elif not noted and parameter.default is not None and parameter.default is not False:
        default = str(parameter.default)
    literals = [a for k in (kind, *get_args(kind)) if get_origin(k) is Literal for a in get_args(k)]
    choices = f" One of {', '.join(literals)}." if literals else ""
    return f"| `{flag}` | {default} | {text.strip()}{choices} |"


def test_the_page_of_the_command_line_is_current() -> None:
    assert CLI_PAGE.read_text() == cli_page(), "write it anew: python -m tests.test_docs"


def test_the_page_of_the_benchmarks_is_current() -> None:
    assert benchmarks.page.PAGE.read_text() == benchmarks.page.page(), "python -m benchmarks.page"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(
    page: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    view = ViewSpec(8)
    spec = cache_spec(digits, teacher, view, num_views=1, top_k=3, dtype="float16")
    precompute(digits, teacher, spec, tmp_path / "cache.zarr")
    for file in digits.path.parent.glob(digits.path.name + "*"):  # and what lies beside it
        (tmp_path / file.name.replace(digits.path.name, "train.beton")).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), {})


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page())
