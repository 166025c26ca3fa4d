"""`RunIdentity`: all that decides a run, as its spec.json and its checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kdcache.data.beton import Dataset
from kdcache.losses.loss import Loss, loss_from_json, loss_to_json
from kdcache.models.classifier import Classifier
from kdcache.training.spec import TrainSpec

_RENAMED_IN_2 = {"first_weights": "initial_weights", "tape": "cache"}


@dataclass(frozen=True)
class RunIdentity:
    """The spec of a run, and content hashes of what it reads.

    student          its name; initial_weights: its content hash before the first step
    data             content hash of the dataset
    cache            identity of the cache that targets come from; teacher: content hash of a live
                     teacher
    loss             None: distillation, as the spec describes it
    """

    spec: TrainSpec
    student: str
    initial_weights: str
    data: str
    cache: str | None = None
    teacher: str | None = None
    loss: Loss | None = None

    @staticmethod
    def of(
        spec: TrainSpec,
        dataset: Dataset,
        student: Classifier,
        *,
        cache: str | None = None,
        teacher: str | None = None,
        loss: Loss | None = None,
    ) -> RunIdentity:
        """Of a run of this student, as it is before the first step."""
        return RunIdentity(
            spec, student.name, student.content_hash(), dataset.content_hash, cache, teacher, loss
        )

    def to_json(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        loss = loss_to_json(self.loss) if self.loss else None
        return {**found, "spec": self.spec.to_json(), "loss": loss}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunIdentity:
        """What any version of kdcache wrote. Raises UsageError for a later one's, KeyError and
        TypeError for what is no identity."""
        found = dict(value)
        if "spec" not in found:  # version 1 had the spec's fields among its own
            found = {_RENAMED_IN_2.get(name, name): x for name, x in found.items()}
            own = {field.name for field in fields(cls)}
            spec = {name: found.pop(name) for name in found.keys() - own}
            found["spec"] = spec
        found["spec"] = TrainSpec.from_json(found["spec"])
        found["loss"] = loss_from_json(found["loss"]) if found.get("loss") else None
        return cls(**found)
