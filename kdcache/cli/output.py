"""How the commands print: results, tables, notices and a progress bar.

rich is imported in the functions that use it: not every command prints with it.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcache.torchrun import current_process

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out_console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


@functools.cache
def err_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def show(result: dict[str, Any], as_json: bool) -> None:
    """A result: one line of JSON, or a line for each of its values."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in result.items():
        table.add_row(name, Text(printable(str(value)), overflow="fold"))
    out_console().print(table)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns under the headings in the first row: the first column to the left, the
    others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def show_lines(lines: Sequence[str]) -> None:
    """Lines as they are: neither wrapped nor read as markup."""
    for line in lines:
        out_console().print(printable(line), markup=False, soft_wrap=True)


def say(line: str, style: str | None = None) -> None:
    """A line on stderr, as it is but for what a terminal would obey."""
    err_console().print(printable(line), markup=False, soft_wrap=True, style=style)


def notice(line: str, style: str | None = None) -> None:
    """A line on stderr, from the main process only."""
    if current_process().rank == 0:
        say(f"kdcache: {line}", style)


def printable(text: str) -> str:
    """Control characters as escapes: names of files and classes may hold any."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class _LogToStderr(logging.Handler):
    """What the library logs, as lines on stderr, from every process."""

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        where = f" (process {process.rank} of {process.world_size})" if process.rank else ""
        say(f"kdcache{where}: {record.getMessage()}", "yellow")


LOG_TO_STDERR = _LogToStderr()


def warn(lines: Sequence[str]) -> None:
    """Warnings on stderr, from the main process only."""
    for line in lines:
        notice(line, "yellow")


def format_bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_evaluation(evaluation: dict[str, Any] | None) -> dict[str, str]:
    """The figures of an evaluation, by their names, as text."""
    if evaluation is None:
        return {}
    fractions = {
        "top-1": "top1",
        "top-5": "top5",
        "teacher's top-1": "teacher_top1",
        "agreement": "agreement",
        "agreement at 5": "agreement5",
        "calibration error": "calibration_error",
    }
    numbers = {
        "KL(teacher||model)": "kl",
        "distance of logits": "euclidean",
        "CKA of features": "cka",
    }
    known = {name: value for name, value in evaluation.items() if value is not None}
    return {
        **{name: f"{known[key]:.2%}" for name, key in fractions.items() if key in known},
        **{name: f"{known[key]:.4f}" for name, key in numbers.items() if key in known},
    }


@contextmanager
def progress_bar(name: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on stderr with rate and time left; the value is called with (done, text).

    Without a terminal, and in all processes but the main one, there is none.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    silent = not err_console().is_terminal or current_process().rank > 0
    with Progress(*columns, console=err_console(), transient=True, disable=silent) as progress:
        task = progress.add_task(name, total=total, completed=done, rate="", text="")

        def update(done: int, text: str = "") -> None:
            rate = f"{progress.tasks[task].speed or 0:,.0f} {unit}/s"
            progress.update(task, completed=done, rate=rate, text=text)

        yield update
