"""From the options of `kdcache eval` to what it evaluates, loaded and checked."""

from __future__ import annotations

from dataclasses import dataclass

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
    device, num_classes = choose_device(options.device), len(dataset.class_names)
    for name in (options.model, *options.teachers):
        load.require_class_names(name, dataset.class_names, dataset.path)
    model = load.load_model(
        options.model, "teacher", num_classes=num_classes, size_px=size_px, device=device
    )
    teacher = None
    if options.teachers:
        teacher = load.load_teacher(
            options.teachers, num_classes=num_classes, size_px=teacher_px, device=device
        )
    return EvaluationRun(model, dataset, size_px, teacher, options.teacher_size_px)
