"""The options of `kdcache eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcache.models.options import OutputOptions
from kdcache.options import (
    TEACHER,
    VIEWS,
    batch_size_option,
    data_option,
    device_option,
    option,
    workers_option,
)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """A model to evaluate; None where an option is not given."""

    model: str = option(
        name="MODEL", help="The folder of a finished run, or a model.", positional=True
    )
    data: Path = data_option()
    teachers: tuple[str, ...] = option(
        (),
        name="--teacher",
        help="Also report agreement with this teacher. Repeat the option to average several.",
        group=TEACHER,
        metavar="MODEL",
    )
    output: OutputOptions = OutputOptions()
    size_px: int | None = option(
        None,
        name="--size",
        help="Side of the square views.",
        default_text="the model's if it has one, else the images' up to 64, else 224",
        group=VIEWS,
        metavar="PX",
    )
    teacher_size_px: int | None = option(
        None,
        name="--teacher-size",
        help="Side of the teacher's views.",
        default_text="--size",
        group=VIEWS,
        metavar="PX",
        at_least=1,
    )
    batch_size: int = batch_size_option()
    workers: int | None = workers_option()
    device: str | None = device_option()
