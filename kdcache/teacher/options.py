"""The options of `kdcache precompute`, `plan` and `verify`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdcache.choices import CALIBRATION_RECORDS, Precision, RecordName, RowOrder, ValueType
from kdcache.errors import UsageError
from kdcache.models.options import OutputOptions
from kdcache.options import (
    DATA,
    RUN,
    TEACHER,
    batch_size_option,
    data_option,
    device_option,
    option,
    precision_option,
    timeout_option,
    workers_option,
)
from kdcache.paths import require_cache, require_dataset
from kdcache.views.options import ViewOptions

SETTING_HELP = (
    "What teacher and student see: fixed-whole, fixed-center, fixed-average, independent-random, "
    "independent-inception, consistent-random, consistent-inception or function-matching."
)
# The cosine that --record auto reaches, at the temperature of training, for a student near the
# teacher: between its gradient from records and that from the live teacher.
LEAST_COSINE = 0.98
# The options that change a record, beside those that every record has.
RECORD_OPTIONS: dict[RecordName, set[str]] = {
    "auto": {"temperature", "dtype"},
    "dense": {"top-k", "dtype"},
    "transformed": {"distortion", "top-k"},
    "top-k": {"top-k", "dtype"},
    "draws": {"num-draws", "temperature"},
}


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What a cache is to hold, and how it is computed; None where an option is not given."""

    data: Path = data_option()
    unlabeled: bool = option(
        False,
        help="Ignore the labels and class names of the data: its classes are not the teacher's.",
        group=DATA,
    )
    teachers: tuple[str, ...] = option(
        name="--teacher",
        help="The teacher. Repeat the option to average the probabilities of several.",
        group=TEACHER,
        metavar="MODEL",
    )
    setting: str | None = option(
        None,
        help=SETTING_HELP,
        default_text="as the other options imply, function-matching without any",
        group=TEACHER,
        metavar="NAME",
    )
    num_views: int = option(1, name="--views", help="Views to store.", group=TEACHER, metavar="N")
    record: RecordName | None = option(
        None,
        help="What a record keeps. dense: every class's logit; transformed: all of them to a mean "
        "squared error, in far fewer bytes; top-k: the largest logits and a summary of the others; "
        "draws: random draws. auto: dense up to 100 classes, else transformed at the --distortion "
        f"that gives a gradient cosine of {LEAST_COSINE} at --temperature.",
        default_text="as the other options imply, else auto",
        group=TEACHER,
    )
    distortion: float | None = option(
        None,
        help="Mean squared error of a logit in transformed records, in nats^2.",
        default_text="0.1",
        group=TEACHER,
        metavar="D",
    )
    top_k: str | None = option(
        None,
        help="Logits that a top-k record keeps, or that a transformed one keeps exactly: the N "
        "largest. all: dense records.",
        default_text="16; 8 of transformed records",
        group=TEACHER,
        metavar="N or all",
    )
    dtype: ValueType | None = option(
        None,
        help="Format of a stored logit, in dense and top-k records.",
        default_text="float16",
        group=TEACHER,
    )
    num_calibration_records: int = option(
        CALIBRATION_RECORDS,
        name="--calibration-records",
        help="Teacher logits that transformed records are calibrated on, before the first record.",
        group=TEACHER,
        metavar="N",
        at_least=2,
    )
    row_order: RowOrder | None = option(
        None,
        help="Order of the records. view: the student trains on the teacher's views; dataset: on "
        "other views, without mixing.",
        default_text="the setting's, else view",
        group=TEACHER,
    )
    num_averaged_views: int = option(
        0,
        name="--average-views",
        help="One record per sample: the mean probabilities over this many views of it; 0: off. "
        "--setting fixed-average has 1024.",
        group=TEACHER,
        metavar="N",
        at_least=0,
    )
    num_draws: int = option(
        0,
        help="Store this many random draws per record instead of the largest logits; 0: off.",
        group=TEACHER,
        metavar="N",
        at_least=0,
    )
    temperature: float = option(
        1.0,
        help="Temperature that students will train at: auto chooses by it, draws are made at it.",
        group=TEACHER,
        metavar="T",
    )
    precision: Precision = precision_option()
    output: OutputOptions = OutputOptions()
    view: ViewOptions = ViewOptions()
    batch_size: int = batch_size_option()
    workers: int | None = workers_option()
    device: str | None = device_option()

    def __post_init__(self) -> None:
        name, given = self.record_name, set(self._given())
        belongs = RECORD_OPTIONS[name]
        for option_name in sorted(given - belongs):
            records = [n for n, options in RECORD_OPTIONS.items() if option_name in options]
            raise UsageError(
                f"--{option_name} goes with --record {' or '.join(records)}, not with {name}"
            )
        if self.top_k is not None and (self.top_k == "all") != (name == "dense"):
            raise UsageError(f"--top-k {self.top_k} does not go with --record {name}")
        if name == "draws" and not self.num_draws:
            raise UsageError("--record draws needs --num-draws N")
        if self.num_averaged_views and name == "draws":
            raise UsageError("--num-draws goes without --average-views")
        self.num_logits  # noqa: B018  refuses a wrong one

    @property
    def record_name(self) -> RecordName:
        """What --record says, or what the other options imply."""
        if self.record is not None:
            return self.record
        if self.num_draws:
            return "draws"
        if self.distortion is not None:
            return "transformed"
        if self.top_k is not None:
            return "dense" if self.top_k == "all" else "top-k"
        return "auto"

    @property
    def num_logits(self) -> int | None:
        """The number of --top-k; None where it is not given, or all. Raises UsageError for a text
        that is neither."""
        if self.top_k in (None, "all"):
            return None
        try:
            return int(self.top_k or "")
        except ValueError:
            raise UsageError(f"top-k must be a number or 'all', not {self.top_k!r}") from None

    def _given(self) -> Iterator[str]:
        if self.distortion is not None:
            yield "distortion"
        if self.top_k is not None:
            yield "top-k"
        if self.dtype is not None:
            yield "dtype"
        if self.num_draws:
            yield "num-draws"
        if self.temperature != 1:
            yield "temperature"


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions:
    """A cache, and where it is made by which process."""

    records: RecordOptions
    out: str = option(
        help="The cache to create, to complete or to extend: a folder, or s3://...",
        group=DATA,
        metavar="C.zarr",
    )
    part: str | None = option(
        None,
        help="Compute only part I of N; N such jobs complete the cache. Under torchrun, the "
        "processes divide the part among them.",
        default_text="all",
        group=RUN,
        metavar="I/N",
    )
    timeout_s: float = timeout_option()

    def __post_init__(self) -> None:
        self.parts  # noqa: B018  refuses a wrong one

    @property
    def parts(self) -> tuple[int, int]:
        """(i, n) of --part I/N, i from 0."""
        if self.part is None:
            return 0, 1
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.part)
        if not match or int(match[1]) > int(match[2]):
            raise UsageError(f"--part is i/n with i from 1 to n, such as 1/4, not {self.part!r}")
        return int(match[1]) - 1, int(match[2])


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """A cache to check, perhaps against its data and its teacher."""

    cache: str = option(
        name="C.zarr", help="The cache to check.", positional=True, require=require_cache
    )
    data: Path | None = option(
        None,
        help="The data of the cache: with --teacher, recompute records.",
        group=DATA,
        metavar="DATA.beton",
        require=require_dataset,
    )
    teachers: tuple[str, ...] = option(
        (),
        name="--teacher",
        help="The teacher of the cache. Repeat the option where it has several, in their order.",
        group=TEACHER,
        metavar="MODEL",
    )
    num_samples: int = option(
        512,
        name="--samples",
        help="Records to recompute, spread over the cache.",
        group=TEACHER,
        metavar="N",
        at_least=1,
    )
    precision: Precision = precision_option()
    output: OutputOptions = OutputOptions()
    delete_damaged: bool = option(False, help="Delete damaged shards.", group=RUN)
    batch_size: int = batch_size_option()
    workers: int | None = workers_option()
    device: str | None = device_option()

    def __post_init__(self) -> None:
        if (self.data is None) == bool(self.teachers):
            raise UsageError("--data and --teacher go together; without both, shards are checked")
