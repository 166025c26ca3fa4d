"""`TrainingRun` and `RunOptions`: what `loop.train` gets.

A `TrainingRun` is all that decides the resulting weights, loaded and checked. `RunOptions` decide
what is written and when, and may differ each time that a run is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdcache import __version__
from kdcache.batch import TargetSource
from kdcache.data.beton import Dataset
from kdcache.losses.loss import Distillation, Loss
from kdcache.models.classifier import Classifier, Teacher
from kdcache.spec import facts
from kdcache.training.identity import RunIdentity
from kdcache.training.spec import TrainSpec


@dataclass(frozen=True)
class TrainingRun:
    """A run, loaded.

    targets            of each batch: labels, a live teacher, or a cache
    loss               None: `Distillation` with the temperature, tail and label weight of the spec
    val                images to evaluate on
    reference_teacher  the teacher that an evaluation compares the student with; it sees images of
                       reference_size_px; None: of the student's size
    cache              identity of the cache that targets come from
    teacher            content hash of the live teacher
    class_names        where they are not the dataset's
    metadata           goes into run.json as it is
    warnings           lines that the user should read before the first step
    """

    spec: TrainSpec
    dataset: Dataset
    student: Classifier
    targets: TargetSource
    loss: Loss | None = None
    val: Dataset | None = None
    reference_teacher: Teacher | None = None
    reference_size_px: int | None = None
    cache: str | None = None
    teacher: str | None = None
    class_names: tuple[str, ...] | None = None
    metadata: dict[str, str | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def identity(self) -> RunIdentity:
        """What decides the weights; to be read before the first step changes the student."""
        return RunIdentity.of(
            self.spec,
            self.dataset,
            self.student,
            cache=self.cache,
            teacher=self.teacher,
            loss=self.loss,
        )

    def facts(self) -> dict[str, str]:
        """What all processes of the run must have in common, by name, as text."""
        seen = {"data to evaluate on": self.val.content_hash if self.val else ""}
        if self.reference_teacher:
            seen["teacher to compare with"] = self.reference_teacher.content_hash()
        versions = {"version of kdcache": __version__, "version of torch": torch.__version__}
        return {**facts(self.identity), **seen, **versions}

    def make_loss(self) -> Loss:
        """`loss`, or the distillation loss that the spec defines."""
        spec = self.spec
        return self.loss or Distillation(
            spec.temperature, tail=spec.tail, label_weight=spec.label_weight
        )
