"""`TrainSpec`: what decides a training run besides its data, its student and its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from kdcache.choices import Mode as Mode
from kdcache.choices import OptimizerName as OptimizerName
from kdcache.choices import Tail as Tail
from kdcache.errors import UsageError
from kdcache.spec import (
    Precision,
    digest,
    require,
    require_known_fields,
    require_version,
    spec_to_json,
)
from kdcache.views.spec import MAX_VIEWS, ViewSpec

TRAIN_VERSION = 3
# Version 1 had no version in its JSON, and these names.
_RENAMED_IN_2 = {
    "view": "view_spec",
    "teacher_view": "teacher_view_spec",
    "views": "num_views",
    "setup": "setting",
    "average": "num_averaged_views",
    "ema": "ema_decay",
}


@dataclass(frozen=True)
class TrainSpec:
    """What decides a run besides its data, its student and its teacher.

    mode                where targets come from: labels, cached or online
    view_spec           what the student sees
    teacher_view_spec   what a live teacher sees; None: the student's own pixels
    epochs              passes through the data
    batch_size          images in a step, of all processes together
    lr                  peak learning rate
    weight_decay        decoupled: times the learning rate, as in AdamW
    optimizer           one of OptimizerName
    momentum            of SGD
    warmup              length of the linear warm-up: a fraction of all steps if below 1, else a
                        number of steps
    temperature         T of the distillation loss
    label_weight        w in (1 - w) * distillation + w * cross-entropy with the labels
    ema_decay           decay of an exponential moving average of the parameters, which the run then
                        gives; 0: none
    ema_statistics      images of training views from which the statistics of batch normalisation
                        are computed anew for the averaged parameters; 0: they keep those of
                        training
    precision           of the forward passes of student and live teacher, by autocast
    seed                of the student's initialisation, and of its dropout
    deterministic       one thread and deterministic algorithms
    num_views           number of views that the epochs cycle through; None: a new one each epoch
    setting             the name of the setting (`views/settings.py`)
    num_averaged_views  a live teacher's target is its mean probability over this many views of
                        teacher_view_spec; 0: its logits for one
    tail                what the loss assumes of the classes that a record does not name
                        (`losses.distillation.distillation_loss`)
    decay_embeddings    weight decay falls on all matrices, as before version 3 of this spec; else
                        not on those that `optim.undecayed` names
    """

    mode: Mode
    view_spec: ViewSpec
    epochs: int = 10
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    temperature: float = 1.0
    seed: int = 0
    deterministic: bool = False
    num_views: int | None = None
    setting: str = "function-matching"
    teacher_view_spec: ViewSpec | None = None
    num_averaged_views: int = 0
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    label_weight: float = 0.0
    ema_decay: float = 0.0
    precision: Precision = "float32"
    tail: Tail = "bucket"
    ema_statistics: int = 0
    decay_embeddings: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        require(self.epochs <= MAX_VIEWS, "epochs", f"at most {MAX_VIEWS}", self.epochs)
        require(self.batch_size >= 1, "batch size", "at least 1", self.batch_size)
        require(self.lr > 0, "lr", "above 0", self.lr)
        require(self.lr <= 1000, "lr", "at most 1000", self.lr)
        require(self.weight_decay >= 0, "weight decay", "at least 0", self.weight_decay)
        require(self.weight_decay <= 1000, "weight decay", "at most 1000", self.weight_decay)
        require(
            0 <= self.warmup < 1 or (self.warmup < math.inf and self.warmup == int(self.warmup)),
            "warmup",
            "a share in [0, 1) or a number of steps",
            self.warmup,
        )
        require(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)
        require(0 <= self.seed < 1 << 63, "seed", "in [0, 2^63)", self.seed)
        require(
            self.num_views is None or self.num_views >= 1, "views", "at least 1", self.num_views
        )
        require(
            0 <= self.num_averaged_views <= MAX_VIEWS,
            "average",
            f"0 to {MAX_VIEWS}",
            self.num_averaged_views,
        )
        names = get_args(OptimizerName)
        require(self.optimizer in names, "optimizer", f"one of {', '.join(names)}", self.optimizer)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(0 <= self.label_weight <= 1, "label weight", "in [0, 1]", self.label_weight)
        require(0 <= self.ema_decay < 1, "ema decay", "a decay in [0, 1)", self.ema_decay)
        require(self.ema_statistics >= 0, "ema statistics", "at least 0", self.ema_statistics)
        if self.ema_statistics and not self.ema_decay:
            raise UsageError("--ema-statistics goes with --ema, whose average it is for")
        precisions = get_args(Precision)
        require(
            self.precision in precisions,
            "precision",
            f"one of {', '.join(precisions)}",
            self.precision,
        )
        tails = get_args(Tail)
        require(self.tail in tails, "tail", f"one of {', '.join(tails)}", self.tail)

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The version, and the fields that differ from its defaults."""
        return {"version": TRAIN_VERSION, **spec_to_json(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainSpec:
        """The spec whose `to_json` in any version gave `value`.

        Raises UsageError for one of a later version.
        """
        found = dict(value)
        version = require_version("runs", found.pop("version", 1), TRAIN_VERSION)
        if version < 3:
            found["decay_embeddings"] = True
        if version == 1:
            found = {_RENAMED_IN_2.get(name, name): x for name, x in found.items()}
            found["setting"] = found["setting"].replace("-mild", "-random")
        require_known_fields(cls, found, "the run's spec")
        for name in ("view_spec", "teacher_view_spec"):
            if found.get(name) is not None:
                found[name] = ViewSpec.from_json(found[name])
        return cls(**found)
