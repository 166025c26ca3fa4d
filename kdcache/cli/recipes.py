"""`kdcache recipes`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import format_bytes, format_table, progress_bar, show, show_lines, warn
from kdcache.options import device_option, option, option_names
from kdcache.paths import require_dataset
from kdcache.training.options import TrainOptions
from kdcache.views.options import ViewOptions

if TYPE_CHECKING:
    from kdcache.training.recipes import Cost, Recipe
    from kdcache.training.spec import TrainSpec
    from kdcache.views.spec import ViewSpec

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
NONE_AT_ZERO = ("num_averaged_views", "ema_decay", "ema_statistics", "label_weight")
HOURS = {"min": 1 / 60, "h": 1, "days": 24, "years": 24 * 365.25}
TOO_LARGE = "the batch is too large for {} images: give `train` a smaller --batch-size"


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    name: str | None = option(None, name="NAME", help="Show this recipe in full.", positional=True)
    data: Path | None = option(
        None,
        help="Costs for this .beton file instead of the recipes' own data.",
        metavar="DATA.beton",
        require=require_dataset,
    )
    no_measure: bool = option(False, help="Do not measure the time, which takes some seconds.")
    device: str | None = device_option()


def recipes(options: RecipesOptions, output: OutputOptions) -> None:
    """List the recipes of `train --recipe` with their costs, or show one in full."""
    from kdcache.models.device import choose_device
    from kdcache.training.recipes import NAMES, cost_of, get_recipe, measure_hours

    chosen = [get_recipe(name) for name in ([options.name] if options.name else NAMES)]
    costs = [cost_of(recipe, **_size(options.data)) for recipe in chosen]
    hours: Sequence[float | None] = [None] * len(chosen)
    if not options.no_measure:
        with progress_bar("measure", len(chosen), "recipes") as update:
            device = choose_device(options.device)
            hours, warnings = measure_hours(chosen, costs, device, update)
        warn(warnings)
    if output.as_json:
        results = [_as_json(*one) for one in zip(chosen, costs, hours, strict=True)]
        show(results[0] if options.name else {"recipes": results}, True)
    elif options.name:
        show(_page(chosen[0], costs[0], hours[0]), False)
        command = shlex.join(command_of(chosen[0])).replace(" --", " \\\n  --")
        show_lines([f"\nthe same as\n\n{command}"])
    else:
        show_lines(table(chosen, costs, hours))
        if not all(cost.steps for cost in costs):
            show_lines([f"-: {TOO_LARGE.format(costs[0].num_samples)}"])


def _size(data: Path | None) -> dict[str, int]:
    if data is None:
        return {}
    from kdcache.data.beton import open_dataset

    dataset = open_dataset(data)
    return {"num_samples": len(dataset), "num_classes": len(dataset.class_names)}


def table(
    chosen: Sequence[Recipe], costs: Sequence[Cost], hours: Sequence[float | None]
) -> list[str]:
    """At most 100 columns, whatever the terminal; without times where none is known."""
    rows = [list(HEADINGS), *map(_row, chosen, costs, hours)]
    return format_table(rows if any(hours) else [row[:-1] for row in rows])


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
        format_bytes(cost.cache_bytes) if cost.steps else "-",
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


def _as_json(recipe: Recipe, cost: Cost, hours: float | None) -> dict[str, Any]:
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
    estimate = ", an estimate" if cost.record == "transformed" else " before compression"
    one = {
        "recipe": recipe.name,
        "for": f"{recipe.data.part}: {recipe.data.num_samples} images, "
        f"{recipe.data.num_classes} classes",
        "student": recipe.student,
        "teacher": recipe.teacher or "yours, trained for the data",
        "view": spec.view_spec.describe(),
        **_hyperparameters(spec),
        "evaluation": recipe.evaluation,
    }
    if not cost.steps:
        return {**one, "steps": f"none: {TOO_LARGE.format(cost.num_samples)}"}
    one |= {
        "steps": f"{cost.steps}, of {cost.num_samples} images",
        "cache": f"{format_bytes(cost.cache_bytes)}{estimate}: {cost.num_views} views, "
        f"{cost.record} records of {cost.record_bytes} bytes",
    }
    if hours is not None:
        one["time"] = f"{duration(hours)} here, of the student's steps alone"
    return one


def _hyperparameters(spec: TrainSpec) -> dict[str, Any]:
    """The fields without the views, and without what is none or off."""
    idle = {"view_spec", "teacher_view_spec"} | ({"momentum"} if spec.optimizer != "sgd" else set())
    # An online teacher leaves no classes out.
    idle |= {"tail"} if spec.mode != "cached" else set()
    values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in idle}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and (value or name not in NONE_AT_ZERO)
    }


def command_of(recipe: Recipe) -> list[str]:
    """The command that `kdcache train --recipe NAME` stands for, with placeholders for paths and
    without what is the default."""
    names, spec = option_names(TrainOptions), recipe.spec
    line = ["kdcache", "train", names["data"], "TRAIN.beton", "--out", "RUN"]
    line += [names["student"], recipe.student, names["teachers"], recipe.teacher or "TEACHER"]
    for field in fields(spec):
        value = getattr(spec, field.name)
        # The views imply the setting.
        if field.name not in names or field.name == "setting" or value == field.default:
            continue
        line += [names[field.name]] if value is True else [names[field.name], _text(value)]
    return line + _view_options(spec.view_spec)


def _view_options(view: ViewSpec) -> list[str]:
    from kdcache.views.settings import make_view_spec

    names, line = option_names(ViewOptions), []
    default = make_view_spec({}, view.size_px)
    # The default scale follows from the crop, the default size from the data.
    defaults = {**asdict(make_view_spec({"crop": view.crop}, view.size_px)), "crop": default.crop}
    for field, name in names.items():
        value = getattr(view, field)
        if field == "size_px" or value != defaults[field]:
            negative = f"--no-{name.removeprefix('--')}"
            switch = isinstance(value, bool)
            line += [name if value else negative] if switch else [name, _text(value)]
    return line


def _text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
