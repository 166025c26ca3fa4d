"""What a teacher's first answers say of it, before anything long begins.

In: a teacher, and data. Out: a line for each thing that is probably wrong. What stays true: nothing
is refused here, for each of these may be meant. Cost: a forward pass over some hundred images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.models import load
from kdcache.models.classifier import Classifier, Ensemble, Teacher
from kdcache.teacher.logits import LOGIT_RANGE
from kdcache.views.spec import evaluation_view_spec

IMAGES = 256
BATCH_SIZE = 64
# Standard deviations above the accuracy of chance.
ABOVE_CHANCE = 3.0
SUM_TOLERANCE = 1e-2  # of probabilities in half precision


def check_teacher(
    teacher: Teacher, names: Sequence[str], dataset: Dataset, size_px: int, *, labeled: bool
) -> list[str]:
    """Lines about a teacher of these names, for views of this size of these data.

    labeled   the labels are the teacher's classes
    """
    members = [teacher] if isinstance(teacher, Classifier) else _members(teacher)
    lines = [
        line
        for name, member in zip(names, members, strict=True)
        for line in _about(name, member, size_px)
    ]
    sides = dataset.sides_px.max(1)
    small = float((sides < size_px).mean())
    if small > 0.5:
        lines.append(
            f"{small:.0%} of the images are smaller than the views of {size_px} px: they are "
            f"enlarged; the median has {int(np.median(sides))} px"
        )
    answers = _answers(members, dataset, size_px)
    for member, (logits_BC, labels_B) in zip(members, answers, strict=True):
        if not logits_BC.isfinite().all():
            continue  # recording them is an error, which says where
        lines += _about_output(member, logits_BC)
        if labeled and not member.matched:
            lines += _about_accuracy(member, logits_BC, labels_B)
    return lines


def _members(teacher: Ensemble) -> list[Classifier]:
    return [x for x in teacher.members if isinstance(x, Classifier)]


def _about(name: str, member: Classifier, size_px: int) -> list[str]:
    lines = []
    own_px = load.trained_size_px(name)
    if own_px not in (None, size_px):
        lines.append(f"{name} was made for views of {own_px} px and is shown views of {size_px} px")
    if member.assumed_norm:
        lines.append(
            f"{name} has no attributes mean and std: its images are normalised as ImageNet's are"
        )
    if member.output_part:
        lines.append(f"the logits of {name} are taken from what it gives: {member.output_part}")
    if member.class_ids_C is not None:
        lines.append(
            f"{member.num_classes} of the {member.num_outputs} classes of {name} are used, in the "
            "order of the data, which are found by name"
        )
    return lines


def _answers(
    members: Sequence[Classifier], dataset: Dataset, size_px: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each gives for some images, and their labels."""
    view_spec, device = evaluation_view_spec(size_px), members[0].device
    logits: list[list[torch.Tensor]] = [[] for _ in members]
    labels = []
    # The first of a view are of random classes.
    rows = np.arange(min(IMAGES, len(dataset)))
    with Loader(dataset, view_spec, BATCH_SIZE, device=device) as loader, torch.inference_mode():
        for batch in loader.batches(0, rows):
            labels.append(batch.labels_B)
            for member, parts in zip(members, logits, strict=True):
                parts.append(member(batch.images_BCHW).float())
    return [(torch.cat(parts), torch.cat(labels)) for parts in logits]


def _about_output(member: Classifier, logits_BC: torch.Tensor) -> list[str]:
    if member.output != "logits" or not len(logits_BC):
        return []
    least, largest = float(logits_BC.min()), float(logits_BC.max())
    if least >= 0 and largest <= 1 + SUM_TOLERANCE:
        sums_B = logits_BC.sum(1)
        ones = bool(((sums_B - 1).abs() < SUM_TOLERANCE).all()) and member.class_ids_C is None
        what = "sum to 1, as softmax gives" if ones else "lie in 0 to 1, as sigmoid gives"
        return [
            f"what {member.name} gives for an image are numbers that {what}: logits are expected; "
            "give --teacher-output probabilities"
        ]
    masked_BC = logits_BC < logits_BC.amax(1, keepdim=True) - LOGIT_RANGE
    if masked := float(masked_BC.any(1).float().mean()):
        return [
            f"{member.name} gives some classes of {masked:.0%} of the images logits more than "
            f"{LOGIT_RANGE:,.0f} below the largest: they are taken as {LOGIT_RANGE:,.0f} below it"
        ]
    return []


def _about_accuracy(
    member: Classifier, logits_BC: torch.Tensor, labels_B: torch.Tensor
) -> list[str]:
    count, chance = len(labels_B), 1 / member.num_classes
    accuracy = float((logits_BC.argmax(1) == labels_B).float().mean()) if count else 1.0
    if accuracy > chance + ABOVE_CHANCE * math.sqrt(chance * (1 - chance) / max(1, count)):
        return []
    return [
        f"{member.name} is right for {accuracy:.1%} of {count} images, hardly more than by chance: "
        "its classes may be in another order than the data's; name them with --class-names, or "
        "give --unlabeled if they are others"
    ]
