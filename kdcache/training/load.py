"""From the options of `kdcache train` to a `TrainingRun`: everything loaded, everything checked.

In: `TrainOptions`. Out: a `TrainingRun`. What stays true: what does not go together is refused, in
one line, before anything is trained.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace

from kdcache.batch import TargetSource
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Sampled, TopK
from kdcache.cache.fidelity import CLOSE_COSINE, cosine_at
from kdcache.cache.setting import cached_view_spec
from kdcache.choices import TOP_K_TAIL
from kdcache.data.beton import Dataset, open_dataset, require_labels
from kdcache.data.loader import render_digest
from kdcache.errors import CacheMismatch, ClassesMismatch, UsageError
from kdcache.models import load
from kdcache.models.classifier import Classifier, Teacher
from kdcache.models.device import choose_device
from kdcache.models.weights import load_initial_weights
from kdcache.teacher import targets
from kdcache.teacher.load import load_checked_teacher
from kdcache.torchrun import current_process
from kdcache.training.loop import count_steps, set_determinism
from kdcache.training.optim import warmup_steps
from kdcache.training.options import TrainOptions
from kdcache.training.recipes import Recipe, get_recipe
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views import settings
from kdcache.views.spec import ViewSpec

LARGE_TAIL, TAIL_RECORDS = 0.4, 256


def load_training_run(
    options: TrainOptions, *, workers: int | None = None, begun: TrainSpec | None = None
) -> TrainingRun:
    """Load what a run needs, and check that it goes together.

    workers   threads that decode what an online teacher averages over
    begun     of the run that is to be resumed; some defaults were others when it began

    Raises UsageError for options that do not go together, CacheMismatch for a cache that is not of
    these data, views or classes, and what opening and loading raise.
    """
    dataset, cache = open_dataset(options.data), None
    if not dataset.class_names:
        if options.mode == "labels" or options.label_weight:
            require_labels(dataset)
        options = replace(options, unlabeled=True)
    if options.cache is not None:
        cache = _open_cache(options, options.cache, dataset)
    recipe = get_recipe(options.recipe) if options.recipe else None
    name = options.student or (recipe.student if recipe else None)
    if name is None:
        raise UsageError("give --student MODEL, or a --recipe, which names one")
    sizes = (load.natural_size_px(name), *map(load.trained_size_px, options.teachers[:1]))
    natural_px = next(filter(None, sizes), dataset.natural_size_px)
    spec = make_train_spec(options, recipe, cache, natural_px)
    if begun:
        spec = replace(spec, decay_embeddings=begun.decay_embeddings)
    if cache and isinstance(cache.spec.codec, TopK) and options.tail is None:
        spec = replace(spec, tail=begun.tail if begun else TOP_K_TAIL)
    teacher, warnings = _load_teacher(options, spec, cache, dataset)
    source = cache.spec if cache else teacher
    num_classes = source.num_classes if source else len(dataset.class_names)
    warmup_steps(
        spec, count_steps(spec, len(dataset))[1]
    )  # refuses one that is longer than the run
    # Before the student is made: its initial weights come from torch's seed.
    set_determinism(spec)
    student, fresh = _load_student(options, name, num_classes, spec.view_spec.size_px)
    val = open_dataset(options.val) if options.val else None
    if val:
        require_labels(val)
    class_names = _class_names(options, dataset, val, num_classes)
    # In the other modes it serves evaluation alone, and is no part of the run's identity.
    live = teacher if options.mode == "online" else None
    return TrainingRun(
        spec,
        dataset,
        student,
        _targets(options, spec, cache, live, dataset, num_classes, workers),
        val=val,
        reference_teacher=teacher,
        reference_size_px=_teacher_size_px(spec, cache),
        cache=cache.manifest.identity if cache else None,
        teacher=live.content_hash() if live else None,
        class_names=class_names,
        warnings=(*warnings, *fresh, *(_cache_warnings(cache, spec, recipe) if cache else ())),
        metadata={"cache": options.cache, "teacher": teacher.name if teacher else None},
    )


def loader_threads(workers: int | None) -> int | None:
    """Threads that decode; None: chosen by the loader. The processes of a machine divide its cores
    among them where nothing else is given."""
    processes = current_process().local_world_size
    if workers is not None or processes == 1:
        return workers
    # The cores that this process may use, which a container or a job may limit.
    return max(1, len(os.sched_getaffinity(0)) // processes)


def make_train_spec(
    options: TrainOptions, recipe: Recipe | None, cache: LogitCache | None, natural_px: int
) -> TrainSpec:
    """The spec of these options; what is not given comes from the cache, the recipe, the defaults.

    natural_px   side of a view where none is given
    """
    setting = settings.get_setting(options.setting) if options.setting else None
    names = {field.name for field in fields(TrainSpec)}
    given = {name: value for name, value in options.given().items() if name in names}
    if cache:
        given_view, seen = options.view.given(), None
        name, view = cached_view_spec(setting, cache.spec, cache.url, given_view, natural_px)
        if cache.spec.row_order == "view":
            given["num_views"] = cache.spec.num_views
    else:
        name, view, seen, averaged = _live_views(options, recipe, setting, natural_px)
        given["num_averaged_views"] = averaged
    base = recipe.spec if recipe else TrainSpec(options.mode, view)
    if options.mode == "labels":
        base = replace(base, temperature=1.0)
    spec = replace(base, **{**given, "view_spec": view, "setting": name, "teacher_view_spec": seen})
    if spec.optimizer != "sgd" and options.momentum is not None:
        raise UsageError(f"--momentum goes with --optimizer sgd, not with {spec.optimizer}")
    return spec


def _load_student(
    options: TrainOptions, name: str, num_classes: int, size_px: int
) -> tuple[Classifier, tuple[str, ...]]:
    """The student with its initial weights, and warnings about these."""
    device = choose_device(options.device)
    student = load.load_model(
        name, "student", num_classes=num_classes, size_px=size_px, device=device
    )
    keys = load_initial_weights(student, options.init) if options.init else []
    if options.compile_student:
        # In place: the names of the weights, and so the files of a run, stay the same.
        student.network.compile()
    return student, tuple(f"{key} of {name} is initialised randomly" for key in keys)


def _open_cache(options: TrainOptions, url: str, dataset: Dataset) -> LogitCache:
    """The cache, checked against the data."""
    cache = LogitCache.open(url)
    spec = cache.spec
    if spec.num_classes != len(dataset.class_names) and not options.unlabeled:
        raise CacheMismatch(
            f"{url} has {spec.num_classes} classes, {dataset.path} has "
            f"{len(dataset.class_names)}: give the cache's own data, or --unlabeled if the "
            "classes of the data are not the teacher's"
        )
    views = options.num_views or spec.num_views
    if spec.row_order == "view" and views != spec.num_views:
        raise CacheMismatch(f"{url} has {spec.num_views} views, not {views}: leave --views out")
    _require_tail(options, cache)
    return cache


def _require_tail(options: TrainOptions, cache: LogitCache) -> None:
    """Raise UsageError for a --tail that changes nothing: the run would differ in name only."""
    spec, tail = cache.spec, options.tail
    if tail is None:
        return
    if spec.codec.num_named(spec.num_classes) == spec.num_classes:
        raise UsageError(
            f"--tail goes with a cache whose records leave classes out: {cache.url} has "
            f"{spec.codec.describe(spec.num_classes)}"
        )
    # Draws estimate the probability of every class, 0 for those that none hit: nothing is left to
    # spread, and they sum to 1 already.
    if isinstance(spec.codec, Sampled) and tail in ("uniform", "renormalise"):
        raise UsageError(
            f"--tail {tail} goes with top-k records: the draws of {cache.url} have no tail; leave "
            "--tail out, or give none, which is the same loss"
        )


def _cache_warnings(cache: LogitCache, spec: TrainSpec, recipe: Recipe | None) -> tuple[str, ...]:
    """What follows from the cache that one may not expect."""
    warnings = []
    own = replace(spec.view_spec, seed=recipe.spec.view_spec.seed) if recipe else None
    if recipe and own != recipe.spec.view_spec:
        warnings.append(
            "the views come from the cache, not from the recipe: "
            f"{spec.setting}, {spec.view_spec.describe()}"
        )
    warnings += _lossy_record_warnings(cache, spec.temperature)
    lasting = spec.setting != settings.CUSTOM and settings.get_setting(spec.setting).fixed
    views = cache.spec.num_views
    if views < spec.epochs and not lasting:
        warnings.append(
            f"{cache.url} has {views} view{'s' * (views > 1)} for {spec.epochs} epochs: epoch e "
            "trains on view " + (f"e mod {views}" if views > 1 else "0")
        )
    return tuple(warnings)


def _lossy_record_warnings(cache: LogitCache, temperature: float) -> list[str]:
    """Where training from these records is not training from the live teacher."""
    remedy = (
        f"precompute a new cache with --record auto --temperature {temperature:g}, or train at a "
        "lower --temperature"
    )
    cosine = cosine_at(cache.metadata, temperature)
    if cosine is not None:
        if cosine >= CLOSE_COSINE:
            return []
        return [
            f"at T = {temperature:g} the records of {cache.url} give a student near the teacher a "
            f"gradient with a cosine of {cosine:.2f} to the live teacher's: {remedy}"
        ]
    if not isinstance(cache.spec.codec, TopK):
        return []
    # Nobody has measured it: of a cache that was imported, or that an earlier version made.
    some = range(min(TAIL_RECORDS, cache.spec.num_samples))
    log_tail_B = cache.target(0, some, temperature).log_tail_B
    mass = 0.0 if log_tail_B is None else float(log_tail_B.exp().mean())
    if mass <= LARGE_TAIL:
        return []
    return [
        f"at T = {temperature:g} the classes that the records of {cache.url} do not name hold "
        f"{mass:.0%} of the probability, whose shape is lost: {remedy}"
    ]


def _live_views(
    options: TrainOptions, recipe: Recipe | None, setting: settings.Setting | None, natural_px: int
) -> tuple[str, ViewSpec, ViewSpec | None, int]:
    """The setting's name, what the student and the teacher see, and over how many views the teacher
    averages, where there is no cache."""
    given = options.view.given()
    if recipe:
        # Another setting than the recipe's has its own crop and mixing.
        names = ("size_px",) if setting else ("size_px", "crop", "min_scale", "flip", "mixup")
        given = {**{name: getattr(recipe.spec.view_spec, name) for name in names}, **given}
    if setting:
        view = setting.student_view_spec(given, natural_px)
        look = setting.cache_view_spec if setting.num_averaged_views else setting.teacher_view_spec
        seen = look(view, size_px=options.teacher_size_px)
    else:
        view = settings.make_view_spec(given, natural_px)
        resized = replace(view, size_px=options.teacher_size_px or view.size_px)
        seen = None if resized == view else resized
    if options.mode == "labels":
        return settings.setting_name(view), view, None, 0
    average = options.num_averaged_views or (setting.num_averaged_views if setting else 0)
    if average and not (setting and setting.num_averaged_views):
        raise UsageError("--average-views goes with --setting fixed-average")
    return setting.name if setting else settings.setting_name(view, seen), view, seen, average


def _teacher_size_px(spec: TrainSpec, cache: LogitCache | None) -> int:
    """The size of what the teacher sees."""
    view = (cache.spec.view_spec if cache else spec.teacher_view_spec) or spec.view_spec
    return view.size_px


def _load_teacher(
    options: TrainOptions, spec: TrainSpec, cache: LogitCache | None, dataset: Dataset
) -> tuple[Teacher | None, tuple[str, ...]]:
    """The teacher where one is given, and warnings about it."""
    if not options.teachers:
        return None, ()
    teacher, warnings = load_checked_teacher(
        options.teachers,
        dataset,
        _teacher_size_px(spec, cache),
        choose_device(options.device),
        spec.precision,
        options.output,
        unlabeled=options.unlabeled,
    )
    if cache and teacher.num_classes != cache.spec.num_classes:
        raise ClassesMismatch(
            f"{teacher.name} has {teacher.num_classes} classes, {cache.url} has "
            f"{cache.spec.num_classes}"
        )
    return teacher, warnings


def _targets(
    options: TrainOptions,
    spec: TrainSpec,
    cache: LogitCache | None,
    live: Teacher | None,
    dataset: Dataset,
    num_classes: int,
    workers: int | None,
) -> TargetSource:
    if live and spec.num_averaged_views:
        assert spec.teacher_view_spec is not None
        return targets.AverageTargets(
            live,
            dataset,
            spec.teacher_view_spec,
            spec.num_averaged_views,
            spec.batch_size,
            workers=workers,
        )
    if live:
        return targets.OnlineTargets(live)
    if cache is None:
        return targets.LabelTargets(num_classes)
    cache.spec.codec.require_temperature(spec.temperature)
    if cache.spec.row_order == "dataset":
        return targets.FixedTargets(cache, dataset.content_hash, spec.view_spec)
    resized = "size_px" in options.view.given()
    source = targets.CachedTargets(cache, dataset.content_hash, spec.view_spec, resized=resized)
    assert cache.spec.view_spec is not None
    # Over the cache's own views: with a student of another size, the pixels differ by design.
    cache.require_same_rendering(render_digest(dataset, cache.spec.view_spec))
    return source


def _class_names(
    options: TrainOptions, dataset: Dataset, val: Dataset | None, num_classes: int
) -> tuple[str, ...]:
    """The names of the student's classes. Raises UsageError where `val` has others."""
    names = dataset.class_names
    if options.unlabeled:
        names = val.class_names if val else tuple(str(c) for c in range(num_classes))
    if val and (val.class_names != names or len(names) != num_classes):
        raise UsageError(
            f"{options.val} has other classes than {options.data}"
            if not options.unlabeled
            else f"{options.val} has {len(val.class_names)} classes, the teacher has {num_classes}"
        )
    return names
