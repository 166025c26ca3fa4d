"""Live logits: a teacher's, for a batch, for rows of a cache, or averaged over views.

In: a teacher, and a batch or a loader. Out: logits [B, C] on the teacher's device. What stays true:
where it is waited for, no NaN and no infinity leaves here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.cache.spec import CacheSpec
from kdcache.data.loader import Loader
from kdcache.errors import NonFinite, UsageError
from kdcache.models.classifier import LEAST_LOG_P, Teacher
from kdcache.views.order import view_positions

# Nats below a row's largest logit. A class further below has no probability at any temperature in
# use; masked classes have -1e9, or the least of their type.
LOGIT_RANGE = 1000.0


def iter_teacher_logits(
    loader: Loader, teacher: Teacher, spec: CacheSpec, view: int, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Some rows of a view of the cache at a time, and the logits [B, C] that they record.

    Raises NonFinite for a teacher's NaN or infinity, and what the loader's `batches` raises.
    """
    if spec.row_order == "view":
        for batch in loader.batches(view, rows):
            yield batch.positions_B, teacher_logits(teacher, batch)
        return
    for first in range(0, len(rows), loader.batch_size):
        samples = rows[first : first + loader.batch_size]
        if spec.num_averaged_views:
            yield (
                samples,
                mean_teacher_log_probabilities(loader, teacher, spec.num_averaged_views, samples),
            )
        else:
            yield samples, _logits_of_samples(loader, teacher, view, samples)


def mean_teacher_log_probabilities(
    loader: Loader,
    teacher: Teacher,
    num_averaged_views: int,
    samples: NDArray[np.int64],
    *,
    wait: bool = True,
) -> torch.Tensor:
    """Logarithm, float64 [B, C], of the mean probabilities over views 0 ... average - 1.

    It serves as logits. `wait` is as in `teacher_logits`.
    """
    total = torch.zeros((), dtype=torch.float64, device=loader.device)
    for view in range(num_averaged_views):
        logits_BC = _logits_of_samples(loader, teacher, view, samples, wait=wait)
        # float64: the sum may be over a thousand views.
        total = total + torch.softmax(logits_BC.double(), 1)
    # A probability of 0 would be -inf, which is no logit.
    return (total / num_averaged_views).log().clamp_(min=LEAST_LOG_P)


def _logits_of_samples(
    loader: Loader, teacher: Teacher, view: int, samples: NDArray[np.int64], *, wait: bool = True
) -> torch.Tensor:
    """The teacher's logits [B, C] for a view of these samples, in their order."""
    # The loader counts in positions of a view; which sample is where differs by view.
    places = view_positions(loader.spec, view, len(loader.dataset))[samples]
    batches = loader.batches(view, places)
    return torch.cat([teacher_logits(teacher, batch, wait=wait) for batch in batches])


def teacher_logits(teacher: Teacher, batch: Batch, *, wait: bool = True) -> torch.Tensor:
    """The teacher's logits [B, C] for a batch, none more than LOGIT_RANGE below its row's largest.

    wait   for the device, and raise NonFinite where a logit is NaN or infinite, naming the first
           such sample. Without, such a row is all NaN, and so is the loss of any student's answer
           to it: a logit of -inf alone would pass for a class of no mass.

    Raises UsageError for another number of rows or classes than expected.
    """
    with torch.inference_mode():
        logits_BC: torch.Tensor = teacher(batch.for_teacher)
        expected = (len(batch), teacher.num_classes or logits_BC.shape[-1])
        if logits_BC.shape != expected:
            raise UsageError(
                f"the teacher {teacher.name} gave logits of shape {list(logits_BC.shape)} for view "
                f"{batch.view}: expected {list(expected)}, a row for each image"
            )
        fine_B = torch.isfinite(logits_BC).all(1)
        logits_BC = torch.maximum(logits_BC, logits_BC.amax(1, keepdim=True) - LOGIT_RANGE)
        if not wait:
            return logits_BC.masked_fill(~fine_B[:, None], torch.nan)
        if bool(fine_B.all()):
            return logits_BC
    row = int((~fine_B).nonzero()[0])
    raise NonFinite(
        f"the teacher {teacher.name} gave NaN or infinity for sample {batch.sample_ids_B[row]} in "
        f"view {batch.view}: a teacher's answers must be numbers"
    )
