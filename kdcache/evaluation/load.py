"""From the options of `kdcache eval` to what it evaluates, loaded and checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from kdcache.data.beton import Dataset, open_dataset, require_labels
from kdcache.evaluation.options import EvaluateOptions
from kdcache.models import load
from kdcache.models.classifier import Classifier, Teacher
from kdcache.models.device import choose_device
from kdcache.views.spec import evaluation_view_spec


@dataclass(frozen=True)
class EvaluationRun:
    """A model, and the teacher that it is compared with; the sizes are of their views."""

    model: Classifier
    dataset: Dataset
    size_px: int
    teacher: Teacher | None
    teacher_size_px: int | None


def load_evaluation_run(options: EvaluateOptions) -> EvaluationRun:
    """Raises ClassesMismatch for a model of other classes than the data's, UsageError, and what
    opening and loading raise."""
    dataset = open_dataset(options.data)
    require_labels(dataset)
    size_px = options.size_px
    if size_px is None:
        size_px = load.natural_size_px(options.model) or dataset.natural_size_px
    teacher_px = options.teacher_size_px or size_px
    for px in (size_px, teacher_px):
        evaluation_view_spec(px)  # refuses an impossible size before anything is loaded
    load_one = partial(
        load.load_teacher,
        num_classes=len(dataset.class_names),
        device=choose_device(options.device),
        class_names=dataset.class_names,
        data=dataset.path,
    )
    model, teacher = load_one(options.model, size_px=size_px), None
    assert isinstance(model, Classifier)
    if options.teachers:
        teacher = load_one(
            options.teachers,
            size_px=teacher_px,
            output=options.output.output,
            teacher_class_names=options.output.read_class_names(),
        )
    return EvaluationRun(model, dataset, size_px, teacher, options.teacher_size_px)
