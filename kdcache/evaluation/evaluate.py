"""How good is a model, and how close is it to its teacher, on the plain view of a dataset.

In: a model, a dataset, perhaps a teacher. Out: an `Evaluation`; docs/measuring.md says what each of
its figures means. What stays true: figures are of every sample once, however batches and processes
divide them; NaN and infinity are errors. Cost: one forward pass of each model; the figures stay on
the device until the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import NonFinite, UsageError
from kdcache.evaluation.metrics import (
    WIDEST_FEATURES,
    Sums,
    accuracy_sums,
    calibration_error,
    feature_sums,
    fidelity_sums,
    linear_cka,
)
from kdcache.models.classifier import Teacher
from kdcache.views.order import view_order
from kdcache.views.spec import evaluation_view_spec


@dataclass(frozen=True)
class Evaluation:
    """Shares of 1, but cross_entropy and kl, which are nats, and euclidean, which is logits.

    top5 and agreement5 are absent below six classes; agreement and all after it without a teacher,
    but for calibration_error; cka also where `Classifier.features` finds none.
    """

    num_samples: int
    top1: float
    top5: float | None
    cross_entropy: float
    calibration_error: float
    agreement: float | None = None
    agreement5: float | None = None
    kl: float | None = None
    euclidean: float | None = None
    cka: float | None = None
    teacher_top1: float | None = None


def evaluate(
    model: Teacher,
    dataset: Dataset,
    *,
    size_px: int,
    teacher: Teacher | None = None,
    teacher_size_px: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    part: tuple[int, int] = (0, 1),
    reduce: Callable[[Sums], Sums] = lambda sums: sums,
) -> Evaluation:
    """Accuracy and calibration of a model, and its agreement with a teacher where one is given.

    model             what `load_student` or `load_teacher` gives
    dataset           images of the model's classes, shown by `evaluation_view_spec`: once, plain
    size_px           side of the views, in pixels
    teacher           to compare with; None: no figures of agreement
    teacher_size_px   side of the teacher's view of the same boxes, in pixels; None: size_px
    batch_size        images in a forward pass
    workers           threads that decode, as in `Loader`
    progress          is called with the number of rows done so far, of this part
    part              (i, n): this process takes the i-th of n slices of the samples, i from 0
    reduce            adds up the float64 sums, which are on the model's device and have the same
                      names and shapes in each of the n processes, and gives the result to all

    The model's train or eval mode is restored afterwards. Raises NonFinite, in every process, for
    NaN or infinity, naming the first such sample; UsageError for a part that is none.
    """
    i, n = part
    if not 0 <= i < n:
        raise UsageError(f"part must be from 1/{n} to {n}/{n}, not {i + 1}/{n}")
    view = evaluation_view_spec(size_px)
    teacher_view_spec = replace(view, size_px=teacher_size_px) if teacher_size_px else None
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            Loader(
                dataset,
                view,
                batch_size,
                teacher_view_spec=teacher_view_spec,
                workers=workers,
                device=model.device,
            ) as loader,
        ):
            sums = _sums_of_part(model, teacher, loader, part, progress)
    finally:
        model.train(training)
    # Clones, which may be changed in place after inference mode.
    sums = reduce({name: total.clone() for name, total in sums.items()})
    _require_finite(sums, model, teacher, view_order(view, 0, len(dataset)))
    return _evaluation(sums, len(dataset), top5=len(dataset.class_names) > 5)


def _sums_of_part(
    model: Teacher,
    teacher: Teacher | None,
    loader: Loader,
    part: tuple[int, int],
    progress: Callable[[int], None],
) -> Sums:
    i, n = part
    samples = len(loader.dataset)
    start, end = samples * i // n, samples * (i + 1) // n
    # A part without samples gives the sums of no row of a batch, which have the right shapes.
    positions = slice(start, end) if start < end else slice(0, 1)
    total: Sums = {}
    earliest: Sums = {}
    for batch in loader.batches(0, positions):
        used = min(len(batch), end - start)
        sums, bad = _sums_of_batch(model, teacher, batch, used)
        for who, bad_B in bad.items():
            places_B = start + torch.arange(used, device=bad_B.device)
            before = earliest.get(who, torch.tensor([samples], device=bad_B.device))
            found = torch.where(bad_B, places_B, samples)
            earliest[who] = torch.cat([before, found]).amin(0, keepdim=True)
        total = {name: total[name] + x for name, x in sums.items()} if total else sums
        start += used
        progress(start - samples * i // n)
    for who, place in earliest.items():
        # A slot for each part, so that the first bad sample is still known after adding up.
        total[f"bad_{who}"] = torch.zeros(n, dtype=torch.float64, device=place.device)
        total[f"bad_{who}"][i : i + 1] = (samples - place).double()
    return total


def _sums_of_batch(
    model: Teacher, teacher: Teacher | None, batch: Batch, used: int
) -> tuple[Sums, Sums]:
    """Of the first `used` rows: the sums, and by model which rows are not finite."""
    images_BCHW = batch.images_BCHW
    features, logits_BC = (
        model.features(images_BCHW) if teacher is not None else (None, model(images_BCHW))
    )
    # The batch of a part without samples has a row that does not count.
    logits_BC = logits_BC[:used].float()
    sums = accuracy_sums(logits_BC, batch.labels_B[:used])
    bad = {"model": ~logits_BC.isfinite().all(1)}
    if teacher is not None:
        teacher_features, teacher_BC = teacher.features(batch.for_teacher)
        teacher_BC = teacher_BC[:used].float()
        bad["teacher"] = ~teacher_BC.isfinite().all(1)
        sums |= fidelity_sums(logits_BC, teacher_BC)
        sums["teacher_top1"] = accuracy_sums(teacher_BC, batch.labels_B[:used])["top1"]
        if features is not None and teacher_features is not None:
            if max(features.shape[1], teacher_features.shape[1]) <= WIDEST_FEATURES:
                sums |= feature_sums(features[:used], teacher_features[:used])
    return sums, bad


def _require_finite(
    sums: Sums, model: Teacher, teacher: Teacher | None, order: NDArray[np.int64]
) -> None:
    for who, named in (("model", model), ("teacher", teacher)):
        slots = sums.pop(f"bad_{who}", torch.zeros(1))
        if named is not None and (before_end := int(slots.amax())):
            raise NonFinite(
                f"the {who} {named.name} gave NaN or infinity for sample "
                f"{order[len(order) - before_end]} at evaluation"
            )


def _evaluation(sums: Sums, num_samples: int, *, top5: bool) -> Evaluation:
    sums = {name: total.cpu() for name, total in sums.items()}
    mean = {name: float(total) / num_samples for name, total in sums.items() if total.ndim == 0}
    kl = mean.get("kl")
    return Evaluation(
        num_samples,
        mean["top1"],
        mean["top5"] if top5 else None,
        mean["cross_entropy"],
        calibration_error(sums["bins"]),
        mean.get("agreement"),
        mean.get("agreement5") if top5 else None,
        None if kl is None else max(kl, 0.0),  # rounding may give less than 0
        mean.get("euclidean"),
        linear_cka(sums, num_samples) if "xy" in sums else None,
        mean.get("teacher_top1"),
    )
