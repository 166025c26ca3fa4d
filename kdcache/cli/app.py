"""The command line: parse, compose the library, print. Errors are one line and exit code 2.

Heavy modules are imported in the commands that use them, so `kdcache --help` is quick and works
without FFCV.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kdcache import __version__
from kdcache.cli import exchange, inspect, precompute, recipes, train
from kdcache.cli.output import JsonOption, err_console, out_console, progress_bar, rank, show
from kdcache.data.convert import OnError
from kdcache.data.sources import Split
from kdcache.errors import KDCacheError, MissingDependency, PeerFailed, UsageError

# torchrun ends all other processes when the first one has spoken and ended.
AFTER_S = 5.0  # the first process speaks first: what all have met is said once
LOST_S = 15.0  # and then the one that knows why

app = typer.Typer(
    help="Record a teacher's answers to deterministic views once; train any number of students.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure on this machine, from a checkout.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: the app, with our own errors as one line."""
    try:
        app()
    except KDCacheError as error:
        if isinstance(error, PeerFailed):
            time.sleep(LOST_S)
        elif rank()[0] > 0:
            time.sleep(AFTER_S)
        err_console.print(f"kdcache: {error}", markup=False, soft_wrap=True, style="red")
        sys.exit(2)
    except KeyboardInterrupt:  # before there was a command
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of class folders, fashion-mnist, digits, or torchvision:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", show_default=False)],
    split: Annotated[Split, typer.Option(help="Which part of the data set.")] = "train",
    max_side: Annotated[
        int | None, typer.Option(help="Shrink images whose longer side is above this many px.")
    ] = None,
    quality: Annotated[
        int, typer.Option(help="Of the JPEGs that must be made; others keep their bytes.")
    ] = 95,
    on_error: Annotated[OnError, typer.Option(help="What an unreadable image does.")] = "fail",
    as_json: JsonOption = False,
) -> None:
    """Turn images into a .beton file with a sidecar of checksums."""
    from kdcache.data import sources
    from kdcache.data.convert import convert

    start = time.perf_counter()
    found = sources.open_source(source, split)
    with progress_bar("convert", len(found.images), "images") as update:
        data, skipped = convert(
            found, out, max_side_px=max_side, quality=quality, on_error=on_error, progress=update
        )
    for line in skipped:
        err_console.print(f"skipped {line}", markup=False, soft_wrap=True)
    answer = {
        "path": str(out),
        "samples": len(data),
        "classes": len(data.class_names),
        "skipped": len(skipped),
        "bytes": out.stat().st_size,
        "fingerprint": data.content_hash,
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(answer, as_json)


app.command()(exchange.plan)
app.command()(precompute.precompute)


app.command()(train.train)
app.command("eval")(train.evaluate)
app.command()(inspect.inspect)
app.command()(inspect.verify)
app.command()(exchange.export)
app.command("import")(exchange.import_cache)
app.command()(recipes.recipes)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that the demo makes.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every training.")] = 3,
) -> None:
    """Do the whole job on Fashion-MNIST: convert, teacher, cache, three students, one table."""
    from kdcache.cli import demo as demonstration

    demonstration.run(out, epochs, lambda line: app(line, standalone_mode=False), out_console)


@bench.command("loss")
def bench_loss(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="ROWSxCLASSES; may be given again.  [default: those of the docs]"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved measurements of each form.")] = 100,
    threads: Annotated[int, typer.Option(help="On the CPU.")] = 2,
    save: Annotated[bool, typer.Option("--save", help="Keep the result lines.")] = False,
) -> None:
    """Time of the distillation loss, forward and backward, against other ways to compute it."""
    try:
        from benchmarks.bench_loss import main as measure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"no module {error.name!r}: benchmarks are not part of an installed kdcache; run this "
            "in a checkout's top folder, as python -m kdcache bench loss"
        ) from error
    arguments = ["--rounds", str(rounds), "--threads", str(threads), *["--save"] * save]
    for one in shape or ():
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", one):
            raise UsageError(f"--shape is ROWSxCLASSES, such as 512x1000, not {one!r}")
        arguments += ["--shape", one]
    measure(arguments)
