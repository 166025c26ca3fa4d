"""The command about recipes: `kdcache recipes`.

Heavy modules are imported in the functions that use them.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.output import (
    DeviceOption,
    JsonOption,
    describe,
    device_of,
    err_console,
    out_console,
    progress_bar,
    show,
    size_of,
)
from kdcache.errors import MissingDependency
from kdcache.training.spec import TrainSpec
from kdcache.views.settings import make_view_spec
from kdcache.views.spec import ViewSpec

if TYPE_CHECKING:
    from kdcache.training.recipes import Cost, Recipe

HEADINGS = (
    "recipe",
    "images",
    "px",
    "batch",
    "epochs",
    "steps",
    "T",
    "lr",
    "decay",
    "cache",
    "time",
)
# Of these 0 means none.
NONE_AT_ZERO = ("average", "ema", "label_weight")
HOURS = {"min": 1 / 60, "h": 1, "days": 24, "years": 24 * 365.25}
TOO_LARGE = "the batch is too large for {} images: give `train` a smaller --batch-size"


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One, to see all of it.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Say what they cost on this .beton file, not on their own.")
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Leave out the hours, which take some seconds.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes for `train --recipe` with what they cost, or show one in full."""
    from kdcache.training.recipes import NAMES, cost_of, get_recipe

    chosen = [get_recipe(one) for one in ([name] if name else NAMES)]
    size: dict[str, int] = {}
    if data:
        from kdcache.data import beton as datasets

        found = datasets.open_dataset(data)
        size = {"samples": len(found), "classes": len(found.class_names)}
    costs = [cost_of(recipe, **size) for recipe in chosen]
    paces = [None] * len(chosen) if no_measure else _paces(chosen, costs, device_of(device))
    hours = [_hours(r, c, pace) for r, c, pace in zip(chosen, costs, paces, strict=True)]
    answers = [_answer(*one) for one in zip(chosen, costs, hours, strict=True)]
    if as_json:
        show(answers[0] if name else {"recipes": answers}, True)
    elif name:
        show(_page(chosen[0], costs[0], hours[0]), False)
        command = shlex.join(command_of(chosen[0])).replace(" --", " \\\n  --")
        out_console.print(f"\nthe same as\n\n{command}", markup=False, soft_wrap=True)
    else:
        lines = table(chosen, costs, hours)
        if not all(cost.steps for cost in costs):
            lines.append(f"-: {TOO_LARGE.format(costs[0].num_samples)}")
        for line in lines:
            out_console.print(line, markup=False, soft_wrap=True)


def _paces(chosen: list[Recipe], costs: list[Cost], device: str) -> list[float | None]:
    """Seconds that a step takes for each image; each student is measured once at each size."""
    from kdcache.training.recipes import seconds_per_image

    pace: dict[tuple[str, int], float | None] = {}
    with progress_bar("measure", len(chosen), "recipes") as update:
        for done, (recipe, cost) in enumerate(zip(chosen, costs, strict=True), 1):
            key = recipe.student, recipe.spec.view_spec.size_px
            if cost.steps and key not in pace:
                try:
                    pace[key] = seconds_per_image(recipe, cost.num_classes, device)
                except MissingDependency as error:
                    err_console.print(f"no hours of {key[0]}: {error}", markup=False)
                    pace[key] = None
            update(done)
    return [pace.get((recipe.student, recipe.spec.view_spec.size_px)) for recipe in chosen]


def _hours(recipe: Recipe, cost: Cost, pace: float | None) -> float | None:
    if pace is None or not cost.steps:
        return None
    return cost.steps * recipe.spec.batch_size * pace / 3600


def table(chosen: list[Recipe], costs: list[Cost], hours: list[float | None]) -> list[str]:
    """At most 100 columns, whatever the terminal; without times where none is known."""
    rows = [list(HEADINGS), *map(_row, chosen, costs, hours)]
    if not any(hours):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _row(recipe: Recipe, cost: Cost, hours: float | None) -> list[str]:
    spec = recipe.spec
    return [
        recipe.name,
        _short(cost.num_samples),
        str(spec.view_spec.size_px),
        str(spec.batch_size),
        str(spec.epochs),
        str(cost.steps or "-"),
        f"{spec.temperature:g}",
        f"{spec.lr:g}",
        f"{spec.weight_decay:.2g}",
        size_of(cost.cache_bytes) if cost.steps else "-",
        "-" if hours is None else duration(hours),
    ]


def _short(value: float) -> str:
    for unit in ("", "k"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}M"


def duration(hours: float) -> str:
    """In the largest unit of which it is one, or two of days and years."""
    unit = "min"
    for one, least in (("h", 1), ("days", 48), ("years", 2 * HOURS["years"])):
        unit = one if hours >= least else unit
    return f"{_short(hours / HOURS[unit])} {unit}"


def _answer(recipe: Recipe, cost: Cost, hours: float | None) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "student": recipe.student,
        "teacher": recipe.teacher,
        "part": recipe.data.part,
        "evaluation": recipe.evaluation,
        "spec": recipe.spec.to_json(),
        **asdict(cost),
        "hours": hours,
        "command": command_of(recipe),
    }


def _page(recipe: Recipe, cost: Cost, hours: float | None) -> dict[str, Any]:
    spec = recipe.spec
    kept = "all" if cost.top_k == cost.num_classes else f"the top {cost.top_k}"
    one = {
        "recipe": recipe.name,
        "for": f"{recipe.data.part}: {recipe.data.num_samples} images, {recipe.data.num_classes} classes",
        "student": recipe.student,
        "teacher": recipe.teacher or "yours, trained for the data",
        "view": describe(spec.view_spec),
        **_settings(spec),
        "evaluation": recipe.evaluation,
    }
    if not cost.steps:
        return {**one, "steps": f"none: {TOO_LARGE.format(cost.num_samples)}"}
    one |= {
        "steps": f"{cost.steps}, of {cost.num_samples} images",
        "cache": f"{size_of(cost.cache_bytes)} before compression: {cost.num_views} views, "
        f"{kept} of {cost.num_classes} classes in {cost.record_bytes} bytes",
    }
    if hours is not None:
        one["time"] = f"{duration(hours)} here, of the student's steps alone"
    return one


def _settings(spec: TrainSpec) -> dict[str, Any]:
    """The fields that say something: without the views, and what is none or off."""
    idle = {"view", "teacher_view_spec"} | ({"momentum"} if spec.optimizer != "sgd" else set())
    found = {f.name: getattr(spec, f.name) for f in fields(TrainSpec) if f.name not in idle}
    return {
        name: value
        for name, value in found.items()
        if value is not None and value is not False and (value or name not in NONE_AT_ZERO)
    }


def command_of(recipe: Recipe) -> list[str]:
    """The command that `kdcache train --recipe NAME` stands for, with words for what is yours and
    without what is so by default."""
    spec = recipe.spec
    line = [
        "kdcache",
        "train",
        "--data",
        "TRAIN.beton",
        "--out",
        "RUN",
        "--student",
        recipe.student,
        "--teacher",
        recipe.teacher or "TEACHER",
    ]
    for field in fields(TrainSpec):
        value = getattr(spec, field.name)
        if field.name != "view" and value != field.default:
            line += [f"--{field.name.replace('_', '-')}", _text(value)]
    return line + _view_options(spec.view_spec)


def _view_options(view: ViewSpec) -> list[str]:
    default = make_view_spec({"crop": view.crop}, view.size_px)
    line = ["--size", _text(view.size_px)]  # by default that of the data
    if view.crop != make_view_spec({}, view.size_px).crop:
        line += ["--crop", view.crop]
    for option, field in (("min-scale", "min_scale"), ("mixup", "mixup"), ("view-seed", "seed")):
        if getattr(view, field) != getattr(default, field):
            line += [f"--{option}", _text(getattr(view, field))]
    if view.flip != default.flip:
        line.append("--flip" if view.flip else "--no-flip")
    return line


def _text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
