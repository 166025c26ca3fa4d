"""From the options of `kdcache precompute` and `verify` to what they run, loaded and checked.

In: `RecordOptions`, `VerifyOptions`. Out: a `PrecomputeRun`, a `Recomputation`. What stays true:
what does not go together is refused, in one line, before anything is computed or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import CodecSpec, Dense, Sampled, Transformed, choose_codec
from kdcache.cache.fidelity import CLOSE_COSINE, LiveError, cosine_at
from kdcache.cache.spec import CacheSpec
from kdcache.cache.verify import Picked
from kdcache.data.beton import Dataset, open_dataset
from kdcache.data.loader import Loader
from kdcache.errors import ClassesMismatch, UsageError
from kdcache.models import load
from kdcache.models.classifier import Teacher
from kdcache.models.device import choose_device
from kdcache.models.options import OutputOptions
from kdcache.spec import Precision
from kdcache.teacher import precompute, recompute
from kdcache.teacher.calibration import (
    DEFAULT_TOP_K,
    DENSE_CLASSES,
    MEASURED_RECORDS,
    Progress,
    RecordChoice,
    calibrate,
    choose_record,
    measure_codec,
)
from kdcache.teacher.check import check_teacher
from kdcache.teacher.options import PrecomputeOptions, RecordOptions, VerifyOptions
from kdcache.teacher.recompute import Measure
from kdcache.torchrun import current_process
from kdcache.views.settings import RowOrder, get_setting, make_view_spec
from kdcache.views.spec import ViewSpec


@dataclass(frozen=True)
class PrecomputeRun:
    """What a cache is made from.

    choice        of the record codec, measured on live logits; None where the cache exists
    class_names   of the teacher's classes if the data is unlabeled, as in `precompute`; else None
    warnings      lines that the user should read before it begins
    """

    dataset: Dataset
    teacher: Teacher
    spec: CacheSpec
    choice: RecordChoice | None = None
    class_names: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()


def load_precompute_run(
    options: RecordOptions, out: str | None = None, progress: Progress = lambda rows: None
) -> PrecomputeRun:
    """Load what a cache is made from, and choose and measure its record codec.

    out       the cache that is there is completed: its codec, where the options leave that open
    progress  is called with the rows of live logits that are done

    Raises UsageError for options that do not go together, and what opening and loading raise.
    """
    dataset = open_dataset(options.data)
    if not dataset.class_names:
        options = replace(options, unlabeled=True)
    view_spec, row_order, num_averaged_views = _views(options, dataset)
    teacher, warnings = load_checked_teacher(
        options.teachers,
        dataset,
        view_spec.size_px,
        choose_device(options.device),
        options.precision,
        options.output,
        unlabeled=options.unlabeled,
    )
    existing = LogitCache.open(out) if out and LogitCache.exists(out) else None
    if existing:
        _require_close(existing, options)
    spec = precompute.make_cache_spec(
        dataset,
        teacher,
        view_spec,
        _codec(options, teacher.num_classes, existing.spec if existing else None),
        num_views=options.num_views,
        row_order=row_order,
        num_averaged_views=num_averaged_views,
    )
    choice = None if existing else _choose(options, dataset, teacher, spec, progress)
    return PrecomputeRun(
        dataset,
        teacher,
        replace(spec, codec=choice.codec) if choice else spec,
        choice,
        _teacher_class_names(options) if options.unlabeled else None,
        warnings,
    )


def run_precompute(
    run: PrecomputeRun,
    options: PrecomputeOptions,
    *,
    error: LiveError | None = None,
    on_start: Callable[[LogitCache], None] = lambda cache: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> LogitCache:
    """Make, complete or extend the cache; this process's part of it, under torchrun.

    The main process returns when all of --part is complete. `on_start` is called with the cache
    before the first record, `progress` with the records that are done; `error` is as there. Raises
    what `precompute` does.
    """
    process = current_process()
    i, n = options.parts
    cache = precompute.precompute(
        run.dataset,
        run.teacher,
        run.spec,
        options.out,
        batch_size=options.records.batch_size,
        workers=options.records.workers,
        part=(i * process.world_size + process.rank, n * process.world_size),
        class_names=run.class_names,
        choice=run.choice,
        timeout_s=options.timeout_s,
        error=error,
        on_start=on_start,
        progress=progress,
    )
    if process.rank == 0:
        precompute.wait_for_parts(cache, i, n, progress, options.timeout_s)
    return cache


def load_checked_teacher(
    names: Sequence[str],
    dataset: Dataset,
    size_px: int,
    device: str,
    precision: Precision,
    output: OutputOptions,
    *,
    unlabeled: bool = False,
) -> tuple[Teacher, tuple[str, ...]]:
    """The teacher of these names, and warnings about it.

    Raises ClassesMismatch unless it has the data's classes, or these are not looked at (unlabeled),
    and what `load_teacher` raises.
    """
    class_names = () if unlabeled else dataset.class_names
    try:
        teacher = load.load_teacher(
            names,
            num_classes=None if unlabeled else len(dataset.class_names),
            size_px=size_px,
            device=device,
            precision=precision,
            output=output.output,
            class_names=class_names,
            teacher_class_names=output.read_class_names(),
            data=dataset.path,
        )
    except ClassesMismatch as error:
        raise ClassesMismatch(
            f"{error}; if the classes of the data are not the teacher's, give --unlabeled"
        ) from error
    return teacher, tuple(check_teacher(teacher, names, dataset, size_px, labeled=not unlabeled))


def _teacher_class_names(options: RecordOptions) -> tuple[str, ...]:
    """Of the teacher's classes, () where they are not known: they are the cache's."""
    own = options.output.read_class_names()
    known = None if own else load.class_names_of(options.teachers[0])
    return own or (tuple(names[0] for names in known.names) if known else ())


def _views(options: RecordOptions, dataset: Dataset) -> tuple[ViewSpec, RowOrder, int]:
    """View spec, row order and number of averaged views of the cache."""
    natural_px = load.trained_size_px(options.teachers[0]) or dataset.natural_size_px
    given, averaged = options.view.given(), options.num_averaged_views
    if options.setting is not None:
        return get_setting(options.setting).cache_fields(
            given,
            natural_px,
            num_views=options.num_views,
            row_order=options.row_order,
            num_averaged_views=averaged,
        )
    row_order: RowOrder = "dataset" if averaged else options.row_order or "view"
    given = {"mixup": 0, **given} if row_order == "dataset" else given
    return make_view_spec(given, natural_px), row_order, averaged


def _codec(options: RecordOptions, num_classes: int, existing: CacheSpec | None) -> CodecSpec:
    """What the options name; of auto, what the cache has, or what `choose_record` begins with."""
    name, dtype, k = options.record_name, options.dtype or "float16", options.num_logits
    if name == "draws":
        return Sampled(options.num_draws, options.temperature)
    if name == "transformed":
        distortion = Transformed.distortion if options.distortion is None else options.distortion
        k = Transformed.k if k is None else k
        return Transformed(distortion, k, options.num_calibration_records)
    if name == "top-k":
        return choose_codec(num_classes, min(DEFAULT_TOP_K, num_classes) if k is None else k, dtype)
    if name == "auto" and existing is not None:
        return existing.codec
    if name == "auto" and num_classes > DENSE_CLASSES and options.dtype:
        raise UsageError(
            f"--dtype goes with dense and top-k records, and the teacher's {num_classes} classes "
            "get transformed ones: give --record"
        )
    return Dense(dtype)


def _require_close(cache: LogitCache, options: RecordOptions) -> None:
    """Raises UsageError where the cache's records, which auto goes on with, are not for the
    temperature that the options name."""
    T = options.temperature
    cosine = cosine_at(cache.metadata, T) if options.record_name == "auto" and T != 1 else None
    if cosine is not None and cosine < CLOSE_COSINE:
        raise UsageError(
            f"{cache.url} has records for a lower temperature: at T = {T:g} they give a student "
            f"near the teacher a gradient with a cosine of {cosine:.2f} to the live teacher's; "
            "give another --out, or leave --temperature out to go on with such records"
        )


def _choose(
    options: RecordOptions, dataset: Dataset, teacher: Teacher, spec: CacheSpec, progress: Progress
) -> RecordChoice | None:
    """Of the spec's codec or, with auto, the best one; None where there is nothing to measure."""
    auto = options.record_name == "auto" and spec.num_classes > DENSE_CLASSES
    exact = isinstance(spec.codec, Dense) and spec.codec.dtype != "uint8"
    if not auto and (exact or isinstance(spec.codec, Sampled)):
        return None  # exact to rounding, or right on average
    assert spec.view_spec is not None
    calibrated = auto or isinstance(spec.codec, Transformed)
    count = options.num_calibration_records if calibrated else MEASURED_RECORDS
    with Loader(
        dataset, spec.view_spec, options.batch_size, workers=options.workers, device=teacher.device
    ) as loader:
        live = calibrate(loader, teacher, spec, count, progress)
    return choose_record(spec, live, options) if auto else measure_codec(spec, live)


@dataclass(frozen=True)
class Recomputation:
    """What records of a cache are computed again from, and which ones: rows by view.

    measures   of data, teacher and pixels, which need no record
    """

    dataset: Dataset
    teacher: Teacher
    rows: dict[int, NDArray[np.int64]]
    measures: list[Measure]

    def measure(
        self,
        cache: LogitCache,
        picked: list[Picked],
        options: VerifyOptions,
        progress: Callable[[int], None] = lambda records: None,
    ) -> list[Measure]:
        """All measures; of the picked records too where the data has as many samples."""
        if len(self.dataset) != cache.spec.num_samples:
            return self.measures
        return self.measures + recompute.recompute(
            cache,
            self.dataset,
            self.teacher,
            picked,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
        )


def load_recomputation(cache: LogitCache, options: VerifyOptions) -> Recomputation:
    """Raises UsageError for a cache whose views are not kdcache's, and what loading raises."""
    recompute.require_recomputable(cache)
    spec = cache.spec
    assert spec.view_spec is not None
    assert options.data is not None
    dataset = open_dataset(options.data)
    teacher = load.load_teacher(
        options.teachers,
        num_classes=spec.num_classes,
        size_px=spec.view_spec.size_px,
        device=choose_device(options.device),
        precision=options.precision,
        output=options.output.output,
        class_names=() if cache.metadata.get("unlabeled") else dataset.class_names,
        teacher_class_names=options.output.read_class_names(),
        data=dataset.path,
    )
    rows = verify.sample(spec, options.num_samples)
    return Recomputation(dataset, teacher, rows, recompute.identify(cache, dataset, teacher))
