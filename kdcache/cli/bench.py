"""`kdcache bench`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kdcache.errors import MissingDependency, UsageError
from kdcache.options import option


def _require_shapes(shapes: tuple[str, ...]) -> None:
    for shape in shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise UsageError(f"--shape is ROWSxCLASSES, such as 512x1000, not {shape!r}")


@dataclass(frozen=True, kw_only=True)
class BenchLossOptions:
    shape: tuple[str, ...] = option(
        (),
        help="Rows and classes of the logits. Repeat the option for several shapes.",
        default_text="those of the docs",
        metavar="ROWSxCLASSES",
        require=_require_shapes,
    )
    rounds: int = option(100, help="Interleaved measurements of each form.", metavar="N")
    threads: int = option(2, help="CPU threads.", metavar="N")
    save: bool = option(False, help="Save the result lines.")


def bench_loss(options: BenchLossOptions) -> None:
    """Time the distillation loss, forward and backward, against other ways to compute it."""
    try:
        from benchmarks.bench_loss import main as measure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"no module {error.name!r}: benchmarks are not part of an installed kdcache; run this "
            "in a checkout's top folder, as python -m kdcache bench loss"
        ) from error
    arguments = ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    arguments += ["--save"] * options.save
    for shape in options.shape:
        arguments += ["--shape", shape]
    measure(arguments)
