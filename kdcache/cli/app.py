"""The command line: its commands, and what an error looks like: one line, and exit code 2.

What takes long to import is imported in the commands that use it, after their paths are checked.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Annotated

import typer

from kdcache import __version__
from kdcache.cli.bench import bench_loss
from kdcache.cli.convert import convert
from kdcache.cli.demo import demo
from kdcache.cli.eval import evaluate
from kdcache.cli.export import export
from kdcache.cli.import_ import import_logits
from kdcache.cli.inspect import inspect
from kdcache.cli.options import command
from kdcache.cli.output import LOG_TO_STDERR, say
from kdcache.cli.plan import plan
from kdcache.cli.precompute import precompute
from kdcache.cli.recipes import recipes
from kdcache.cli.streams import tolerant_streams
from kdcache.cli.train import train
from kdcache.cli.verify import verify
from kdcache.errors import KDCacheError, PeerFailed
from kdcache.torchrun import current_process

# When one process ends, torchrun ends all others. So the main process prints first, as an error is
# often the same in all; and a process that only notices that another one failed waits for that one.
OTHERS_WAIT_S = 5.0
PEER_FAILED_WAIT_S = 15.0

app = typer.Typer(
    help="Record a teacher's logits for deterministic views once; train any number of students.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure on this machine, from a checkout.", no_args_is_help=True)


def main() -> None:
    """Entry point: the app, with errors that have a reason outside of kdcache as one line."""
    logging.getLogger("kdcache").addHandler(LOG_TO_STDERR)
    with tolerant_streams():
        try:
            app()
        except KeyboardInterrupt:  # before a command handles it
            sys.exit(130)
        except Exception as error:
            line = _explain(error)
            if line is None:
                raise
            if isinstance(error, PeerFailed):
                time.sleep(PEER_FAILED_WAIT_S)
            elif current_process().rank > 0:
                time.sleep(OTHERS_WAIT_S)
            # One line, whatever names from a file are in it.
            say(f"kdcache: {line}".replace("\n", "\\n"), "red")
            sys.exit(2)


def _explain(error: Exception) -> str | None:
    """The line of an error that is not a fault of kdcache; None for one that is."""
    if isinstance(error, KDCacheError):
        return str(error)
    text = (str(error).splitlines() or [""])[0]
    # By its name, as torch is not imported by every command; its CPU allocator has no type.
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return f"out of memory ({text or 'no more of it'}): give a smaller --batch-size or --size"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    return None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command()(command(convert))
app.command()(command(plan))
app.command()(command(precompute))
app.command()(command(train))
app.command("eval")(command(evaluate))
app.command()(command(inspect))
app.command()(command(verify))
app.command()(command(export))
app.command("import")(command(import_logits))
app.command()(command(recipes))
app.command()(command(demo))
bench.command("loss")(command(bench_loss))
app.add_typer(bench, name="bench")
