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
from kdcache.losses import distillation
from kdcache.models import load
from kdcache.models.classifier import Teacher
from kdcache.models.weights import load_initial_weights
from kdcache.teacher import targets
from kdcache.training.loop import num_steps, set_determinism
from kdcache.training.optim import warmup_steps
from kdcache.training.recipes import Recipe, get_recipe
from kdcache.training.session import TrainingRun
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
    setup: str | None = None
    other_domain: bool = False
    teacher_size: int | None = None
    init: str | None = None
    deterministic: bool = False
    compile: bool = False
    device: str = "cpu"
    training: dict[str, Any] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    workers: int | None = None


def make_training_run(asked: TrainOptions) -> TrainingRun:
    """Raises UsageError for options that do not go together, TapeMismatch for a tape that is not
    of these data, views or classes, and what opening them raises."""
    _require_mode(asked)
    dataset = open_dataset(asked.data)
    recipe = get_recipe(asked.recipe) if asked.recipe else None
    student_name = asked.student or (recipe.student if recipe else None)
    if student_name is None:
        raise UsageError("give --student MODEL, or a --recipe, which names one")
    tape = _tape(asked, dataset)
    sizes = map(load.natural_size_px, (student_name, *asked.teachers[:1]))
    natural_px = next(filter(None, sizes), dataset.natural_size_px)
    spec = _spec(asked, recipe, tape, natural_px)
    teacher = _teacher(asked, spec, tape, dataset)
    answers = tape.spec.classes if tape else teacher.num_classes if teacher else None
    classes = answers or len(dataset.classes)
    if spec.optimizer != "sgd" and "momentum" in asked.training:
        raise UsageError(f"--momentum goes with --optimizer sgd, not with {spec.optimizer}")
    warmup_steps(spec, num_steps(spec, dataset)[1])  # refuses one that is longer than the run
    set_determinism(spec)
    student = load.load_model(
        student_name, "student", num_classes=classes, size_px=spec.view.size_px, device=asked.device
    )
    if asked.init:
        for key in load_initial_weights(student, asked.init):
            notice(f"{key} of {student_name} starts fresh")
    if asked.compile:
        student.network.compile()
    val = open_dataset(asked.val) if asked.val else None
    names = _class_names(asked, dataset, val, classes)
    live = teacher if asked.mode == "online" else None
    source = _targets(asked, spec, tape, live, dataset, classes)
    return TrainingRun(
        spec,
        dataset,
        student,
        source,
        labels=targets.LabelTargets(classes) if spec.label_weight else None,
        val=val,
        judge=teacher,
        judge_size_px=_seen_px(spec, tape),
        tape=tape.spec.digest if tape else None,
        teacher=live.fingerprint() if live else None,
        class_names=names,
        notes=_notes(tape, spec, recipe) if tape else (),
        about={"cache": asked.cache, "teacher": teacher.name if teacher else None},
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
            mode == "labels" and asked.other_domain,
            "--other-domain leaves labels out: it goes with --mode online or cached",
        ),
        (
            asked.other_domain and weight,
            "--label-weight needs labels of the teacher's classes, which --other-domain says that "
            "the data has not",
        ),
        (
            asked.teacher_size and not live,
            f"--teacher-size goes with --mode online, not with --mode {mode}: a tape has its size",
        ),
        (
            "average" in asked.training and not live,
            f"--average goes with --mode online, not with --mode {mode}",
        ),
    ):
        if wrong:
            raise UsageError(line)


def _tape(asked: TrainOptions, dataset: Dataset) -> LogitCache | None:
    """The tape of a cached run, checked against the data; None in other modes."""
    if asked.cache is None:
        return None
    tape = LogitCache.open(asked.cache)
    spec = tape.spec
    if spec.classes != len(dataset.classes) and not asked.other_domain:
        raise CacheMismatch(
            f"{asked.cache} has {spec.classes} classes, {dataset.path} has "
            f"{len(dataset.classes)}: give the tape's own data, or --other-domain where its images "
            "are of another domain than the teacher's"
        )
    views = asked.training.get("views", spec.views)
    if spec.order == "position" and views != spec.views:
        raise CacheMismatch(f"{asked.cache} has {spec.views} views, not {views}: leave --views out")
    return tape


def _spec(
    asked: TrainOptions, recipe: Recipe | None, tape: LogitCache | None, natural_px: int
) -> TrainSpec:
    setup = settings.get_setting(asked.setup) if asked.setup else None
    training, seen = dict(asked.training), None
    if tape:
        name, view = cached_view_spec(setup, tape.spec, tape.url, asked.view, natural_px)
        if tape.spec.order == "position":
            training["views"] = tape.spec.views
    else:
        name, view, seen, average = _live_views(asked, recipe, setup, natural_px)
        training["average"] = average
    base = recipe.spec if recipe else TrainSpec(asked.mode, view)
    if asked.mode == "labels":
        base = replace(base, temperature=1.0)
    spec = replace(
        base,
        mode=asked.mode,
        view=view,
        setup=name,
        teacher_view=seen,
        deterministic=asked.deterministic,
        **training,
    )
    return spec


def _notes(tape: LogitCache, spec: TrainSpec, recipe: Recipe | None) -> tuple[str, ...]:
    """What a tape decides that one may not expect."""
    notes = []
    own = replace(spec.view, seed=recipe.spec.view.seed) if recipe else None
    if recipe and own != recipe.spec.view:
        notes.append(
            f"the tape decides what is seen, not the recipe: {spec.setup}, {describe(spec.view)}"
        )
    lasting = spec.setup != settings.CUSTOM and settings.get_setting(spec.setup).fixed
    views = tape.spec.views
    if views < spec.epochs and not lasting:
        notes.append(
            f"{tape.url} has {views} view{'s' * (views > 1)} for {spec.epochs} epochs: it wraps, "
            "epoch e plays view " + (f"e mod {views}" if views > 1 else "0")
        )
    return tuple(notes)


def _live_views(
    asked: TrainOptions, recipe: Recipe | None, setup: settings.Setting | None, natural_px: int
) -> tuple[str, ViewSpec, ViewSpec | None, int]:
    """The set-up's name, what the student and the teacher see, and over how many views the teacher
    averages, where there is no tape."""
    given = asked.view
    if recipe:
        own = recipe.spec.view.to_json()
        # Another set-up than the recipe's has its own crop and mixing.
        fields = ("size_px",) if setup else ("size_px", "crop", "min_area", "flip", "mixup")
        given = {**{name: own[name] for name in fields}, **given}
    if setup:
        view = setup.student_view(given, natural_px)
        look = setup.tape_view if setup.average else setup.teacher_view
        seen = look(view, size_px=asked.teacher_size)
    else:
        view = settings.make_view_spec(given, natural_px)
        resized = replace(view, size_px=asked.teacher_size or view.size_px)
        seen = None if resized == view else resized
    if asked.mode == "labels":
        return settings.setting_name(view), view, None, 0
    average = asked.training.get("average", setup.average if setup else 0)
    if average and not (setup and setup.average):
        raise UsageError("--average goes with --setup fixed-average")
    return setup.name if setup else settings.setting_name(view, seen), view, seen, average


def _seen_px(spec: TrainSpec, tape: LogitCache | None) -> int:
    """The size of what the teacher sees."""
    view = (tape.spec.view if tape else spec.teacher_view) or spec.view
    return view.size_px


def _teacher(
    asked: TrainOptions, spec: TrainSpec, tape: LogitCache | None, dataset: Dataset
) -> Teacher | None:
    if not asked.teachers:
        return None
    teacher = load_teacher(
        list(asked.teachers),
        dataset,
        _seen_px(spec, tape),
        asked.device,
        spec.precision,
        other_domain=asked.other_domain,
    )
    if tape and teacher.num_classes != tape.spec.classes:
        raise UsageError(
            f"{teacher.name} has {teacher.num_classes} classes, {tape.url} has {tape.spec.classes}"
        )
    return teacher


def _targets(
    asked: TrainOptions,
    spec: TrainSpec,
    tape: LogitCache | None,
    live: Teacher | None,
    dataset: Dataset,
    classes: int,
) -> TargetSource:
    if live and spec.average:
        assert spec.teacher_view is not None
        return targets.AverageTargets(
            live, dataset, spec.teacher_view, spec.average, spec.batch_size, workers=asked.workers
        )
    if live:
        return targets.OnlineTargets(live)
    if tape is None:
        return targets.LabelTargets(classes)
    if not tape.spec.draws:
        distillation.check_temperature(spec.temperature, sparse=not tape.spec.dense)
    elif spec.temperature != tape.spec.temperature:
        raise UsageError(
            f"{tape.url} holds draws at T = {tape.spec.temperature:g}: train with "
            f"--temperature {tape.spec.temperature:g}, or precompute at {spec.temperature:g}"
        )
    if tape.spec.order == "sample":
        return targets.FixedTargets(tape, dataset.fingerprint, spec.view)
    resized = "size_px" in asked.view
    source = targets.CachedTargets(tape, dataset.fingerprint, spec.view, resized=resized)
    assert tape.spec.view is not None
    tape.require_pixels(render_digest(dataset, tape.spec.view))
    return source


def _class_names(
    asked: TrainOptions, dataset: Dataset, val: Dataset | None, classes: int
) -> tuple[str, ...]:
    """The names of the student's classes. Raises UsageError where `val` has others."""
    names = dataset.classes
    if asked.other_domain:
        names = val.classes if val else tuple(str(c) for c in range(classes))
    if val and (val.classes != names or len(names) != classes):
        raise UsageError(
            f"{asked.val} has other classes than {asked.data}"
            if not asked.other_domain
            else f"{asked.val} has {len(val.classes)} classes, the teacher has {classes}"
        )
    return names
