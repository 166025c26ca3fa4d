"""From what `kdcache train` was asked for to a `Job`: everything loaded, and everything checked.

In: options, as they were given. Out: a job that `session.run` can run. What stays true: what does
not go together is refused before anything is trained, in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcache.batch import TargetSource
from kdcache.cache.cache import LogitCache
from kdcache.cache.setting import cached_view_spec
from kdcache.cli.output import describe, load_teacher, notice
from kdcache.data.beton import Dataset, open_dataset
from kdcache.data.loader import render_digest
from kdcache.errors import CacheMismatch, UsageError
from kdcache.models import load
from kdcache.models.classifier import Teacher
from kdcache.models.weights import load_initial_weights
from kdcache.teacher import targets
from kdcache.training.loop import count_steps, set_determinism
from kdcache.training.optim import warmup_steps
from kdcache.training.recipes import Recipe, get_recipe
from kdcache.training.run import TrainingRun
from kdcache.training.spec import Mode, TrainSpec
from kdcache.views import settings
from kdcache.views.spec import ViewSpec


@dataclass(frozen=True)
class TrainOptions:
    """The options of `kdcache train`; None, or absent, where one was not given.

    training   fields of TrainSpec; view: fields of the student's ViewSpec
    workers    threads that decode what a live teacher averages over
    """

    mode: Mode
    data: Path
    student: str | None = None
    cache: str | None = None
    teachers: tuple[str, ...] = ()
    val: Path | None = None
    recipe: str | None = None
    setting: str | None = None
    unlabeled: bool = False
    teacher_size: int | None = None
    init: str | None = None
    deterministic: bool = False
    compile: bool = False
    device: str = "cpu"
    training: dict[str, Any] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    workers: int | None = None


def make_training_run(asked: TrainOptions) -> TrainingRun:
    """Raises UsageError for options that do not go together, TapeMismatch for a cache that is not
    of these data, views or classes, and what opening them raises."""
    _require_mode(asked)
    dataset = open_dataset(asked.data)
    recipe = get_recipe(asked.recipe) if asked.recipe else None
    student_name = asked.student or (recipe.student if recipe else None)
    if student_name is None:
        raise UsageError("give --student MODEL, or a --recipe, which names one")
    cache = _cache(asked, dataset)
    sizes = map(load.natural_size_px, (student_name, *asked.teachers[:1]))
    natural_px = next(filter(None, sizes), dataset.natural_size_px)
    spec = _spec(asked, recipe, cache, natural_px)
    teacher = _teacher(asked, spec, cache, dataset)
    answers = cache.spec.num_classes if cache else teacher.num_classes if teacher else None
    classes = answers or len(dataset.class_names)
    if spec.optimizer != "sgd" and "momentum" in asked.training:
        raise UsageError(f"--momentum goes with --optimizer sgd, not with {spec.optimizer}")
    warmup_steps(
        spec, count_steps(spec, len(dataset))[1]
    )  # refuses one that is longer than the run
    set_determinism(spec)
    student = load.load_model(
        student_name,
        "student",
        num_classes=classes,
        size_px=spec.view_spec.size_px,
        device=asked.device,
    )
    if asked.init:
        for key in load_initial_weights(student, asked.init):
            notice(f"{key} of {student_name} starts fresh")
    if asked.compile:
        student.network.compile()
    val = open_dataset(asked.val) if asked.val else None
    names = _class_names(asked, dataset, val, classes)
    live = teacher if asked.mode == "online" else None
    source = _targets(asked, spec, cache, live, dataset, classes)
    return TrainingRun(
        spec,
        dataset,
        student,
        source,
        val=val,
        reference_teacher=teacher,
        reference_size_px=_seen_px(spec, cache),
        cache=cache.manifest.identity if cache else None,
        teacher=live.content_hash() if live else None,
        class_names=names,
        warnings=_notes(cache, spec, recipe) if cache else (),
        metadata={"cache": asked.cache, "teacher": teacher.name if teacher else None},
    )


def _require_mode(asked: TrainOptions) -> None:
    """Raise UsageError for options that another mode has."""
    mode, live = asked.mode, asked.mode == "online"
    weight, tempered = asked.training.get("label_weight"), "temperature" in asked.training
    for wrong, line in (
        (live and not asked.teachers, "--mode online needs --teacher MODEL"),
        (mode == "cached" and not asked.cache, "--mode cached needs --cache C.zarr"),
        (
            mode != "cached" and asked.cache,
            f"--cache goes with --mode cached, not with --mode {mode}",
        ),
        (
            mode == "labels" and asked.teachers,
            "--teacher goes with --mode online or cached, not with --mode labels",
        ),
        (mode == "labels" and weight, "--label-weight goes with a teacher, not with --mode labels"),
        (
            mode == "labels" and tempered and asked.training["temperature"] != 1,
            "--temperature goes with a teacher, not with --mode labels",
        ),
        (
            mode == "labels" and asked.unlabeled,
            "--unlabeled leaves labels out: it goes with --mode online or cached",
        ),
        (
            asked.unlabeled and weight,
            "--label-weight needs labels of the teacher's classes, which --unlabeled says that "
            "the data has not",
        ),
        (
            asked.teacher_size and not live,
            f"--teacher-size goes with --mode online, not with --mode {mode}: a cache has its size",
        ),
        (
            "num_averaged_views" in asked.training and not live,
            f"--average-views goes with --mode online, not with --mode {mode}",
        ),
    ):
        if wrong:
            raise UsageError(line)


def _cache(asked: TrainOptions, dataset: Dataset) -> LogitCache | None:
    """The cache of a cached run, checked against the data; None in other modes."""
    if asked.cache is None:
        return None
    cache = LogitCache.open(asked.cache)
    spec = cache.spec
    if spec.num_classes != len(dataset.class_names) and not asked.unlabeled:
        raise CacheMismatch(
            f"{asked.cache} has {spec.num_classes} classes, {dataset.path} has "
            f"{len(dataset.class_names)}: give the cache's own data, or --unlabeled where its images "
            "are of another domain than the teacher's"
        )
    views = asked.training.get("num_views", spec.num_views)
    if spec.row_order == "view" and views != spec.num_views:
        raise CacheMismatch(
            f"{asked.cache} has {spec.num_views} views, not {views}: leave --views out"
        )
    return cache


def _spec(
    asked: TrainOptions, recipe: Recipe | None, cache: LogitCache | None, natural_px: int
) -> TrainSpec:
    setting = settings.get_setting(asked.setting) if asked.setting else None
    training, seen = dict(asked.training), None
    if cache:
        name, view = cached_view_spec(setting, cache.spec, cache.url, asked.view, natural_px)
        if cache.spec.row_order == "view":
            training["num_views"] = cache.spec.num_views
    else:
        name, view, seen, average = _live_views(asked, recipe, setting, natural_px)
        training["num_averaged_views"] = average
    base = recipe.spec if recipe else TrainSpec(asked.mode, view)
    if asked.mode == "labels":
        base = replace(base, temperature=1.0)
    spec = replace(
        base,
        mode=asked.mode,
        view_spec=view,
        setting=name,
        teacher_view_spec=seen,
        deterministic=asked.deterministic,
        **training,
    )
    return spec


def _notes(cache: LogitCache, spec: TrainSpec, recipe: Recipe | None) -> tuple[str, ...]:
    """What a cache decides that one may not expect."""
    notes = []
    own = replace(spec.view_spec, seed=recipe.spec.view_spec.seed) if recipe else None
    if recipe and own != recipe.spec.view_spec:
        notes.append(
            f"the cache decides what is seen, not the recipe: {spec.setting}, {describe(spec.view_spec)}"
        )
    lasting = spec.setting != settings.CUSTOM and settings.get_setting(spec.setting).fixed
    views = cache.spec.num_views
    if views < spec.epochs and not lasting:
        notes.append(
            f"{cache.url} has {views} view{'s' * (views > 1)} for {spec.epochs} epochs: it wraps, "
            "epoch e plays view " + (f"e mod {views}" if views > 1 else "0")
        )
    return tuple(notes)


def _live_views(
    asked: TrainOptions, recipe: Recipe | None, setting: settings.Setting | None, natural_px: int
) -> tuple[str, ViewSpec, ViewSpec | None, int]:
    """The setting's name, what the student and the teacher see, and over how many views the teacher
    averages, where there is no cache."""
    given = asked.view
    if recipe:
        own = recipe.spec.view_spec.to_json()
        # Another setting than the recipe's has its own crop and mixing.
        fields = ("size_px",) if setting else ("size_px", "crop", "min_scale", "flip", "mixup")
        given = {**{name: own[name] for name in fields}, **given}
    if setting:
        view = setting.student_view_spec(given, natural_px)
        look = setting.cache_view_spec if setting.num_averaged_views else setting.teacher_view_spec
        seen = look(view, size_px=asked.teacher_size)
    else:
        view = settings.make_view_spec(given, natural_px)
        resized = replace(view, size_px=asked.teacher_size or view.size_px)
        seen = None if resized == view else resized
    if asked.mode == "labels":
        return settings.setting_name(view), view, None, 0
    average = asked.training.get("num_averaged_views", setting.num_averaged_views if setting else 0)
    if average and not (setting and setting.num_averaged_views):
        raise UsageError("--average-views goes with --setting fixed-average")
    return setting.name if setting else settings.setting_name(view, seen), view, seen, average


def _seen_px(spec: TrainSpec, cache: LogitCache | None) -> int:
    """The size of what the teacher sees."""
    view = (cache.spec.view_spec if cache else spec.teacher_view_spec) or spec.view_spec
    return view.size_px


def _teacher(
    asked: TrainOptions, spec: TrainSpec, cache: LogitCache | None, dataset: Dataset
) -> Teacher | None:
    if not asked.teachers:
        return None
    teacher = load_teacher(
        list(asked.teachers),
        dataset,
        _seen_px(spec, cache),
        asked.device,
        spec.precision,
        unlabeled=asked.unlabeled,
    )
    if cache and teacher.num_classes != cache.spec.num_classes:
        raise UsageError(
            f"{teacher.name} has {teacher.num_classes} classes, {cache.url} has {cache.spec.num_classes}"
        )
    return teacher


def _targets(
    asked: TrainOptions,
    spec: TrainSpec,
    cache: LogitCache | None,
    live: Teacher | None,
    dataset: Dataset,
    num_classes: int,
) -> TargetSource:
    if live and spec.num_averaged_views:
        assert spec.teacher_view_spec is not None
        return targets.AverageTargets(
            live,
            dataset,
            spec.teacher_view_spec,
            spec.num_averaged_views,
            spec.batch_size,
            workers=asked.workers,
        )
    if live:
        return targets.OnlineTargets(live)
    if cache is None:
        return targets.LabelTargets(num_classes)
    cache.spec.codec.require_temperature(spec.temperature)
    if cache.spec.row_order == "dataset":
        return targets.FixedTargets(cache, dataset.content_hash, spec.view_spec)
    resized = "size_px" in asked.view
    source = targets.CachedTargets(cache, dataset.content_hash, spec.view_spec, resized=resized)
    assert cache.spec.view_spec is not None
    cache.require_same_rendering(render_digest(dataset, cache.spec.view_spec))
    return source


def _class_names(
    asked: TrainOptions, dataset: Dataset, val: Dataset | None, num_classes: int
) -> tuple[str, ...]:
    """The names of the student's classes. Raises UsageError where `val` has others."""
    names = dataset.class_names
    if asked.unlabeled:
        names = val.class_names if val else tuple(str(c) for c in range(num_classes))
    if val and (val.class_names != names or len(names) != num_classes):
        raise UsageError(
            f"{asked.val} has other classes than {asked.data}"
            if not asked.unlabeled
            else f"{asked.val} has {len(val.class_names)} classes, the teacher has {num_classes}"
        )
    return names
