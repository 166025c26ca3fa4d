"""What decides a training run besides its data, its student and its teacher."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kdcache.spec import Precision, digest, require
from kdcache.views.spec import MAX_VIEWS, ViewSpec

Mode = Literal["labels", "online", "cached"]
OptimizerName = Literal["adamw", "sgd", "soap"]


@dataclass(frozen=True)
class TrainSpec:
    """What decides a run besides its data, its student and its teacher.

    setup         the name of the set-up (`setups.py`)
    view          what the student sees
    teacher_view  what a live teacher sees; None: the student's own pixels
    views         how many different views the epochs cycle through; None: every epoch a new one
    average       a live teacher answers with its mean probability over this many views of
                  teacher_view; 0: with that for one
    batch_size    of all processes together
    lr            the highest learning rate
    weight_decay  as in AdamW: decoupled, times the learning rate
    momentum      of SGD
    warmup        over which the rate rises from 0: below 1 a share of all steps, else their number
    label_weight  w in (1 - w) * distillation + w * cross-entropy with the labels
    ema           decay of a moving average of the weights, which the run then gives; 0: none
    precision     of the arithmetic of student and live teacher, by autocast
    seed          of the student's first weights, and of its dropout
    """

    mode: Mode
    view: ViewSpec
    epochs: int = 10
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    temperature: float = 1.0
    seed: int = 0
    deterministic: bool = False
    views: int | None = None
    setup: str = "function-matching"
    teacher_view: ViewSpec | None = None
    average: int = 0
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    label_weight: float = 0.0
    ema: float = 0.0
    precision: Precision = "float32"

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
        require(self.views is None or self.views >= 1, "views", "at least 1", self.views)
        require(0 <= self.average <= MAX_VIEWS, "average", f"0 to {MAX_VIEWS}", self.average)
        names = get_args(OptimizerName)
        require(self.optimizer in names, "optimizer", f"one of {', '.join(names)}", self.optimizer)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(0 <= self.label_weight <= 1, "label weight", "in [0, 1]", self.label_weight)
        require(0 <= self.ema < 1, "ema", "a decay in [0, 1)", self.ema)
        precisions = get_args(Precision)
        require(
            self.precision in precisions,
            "precision",
            f"one of {', '.join(precisions)}",
            self.precision,
        )

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        seen = self.teacher_view.to_json() if self.teacher_view else None
        numbers = {
            name: float(getattr(self, name))
            for name in (
                "lr",
                "weight_decay",
                "warmup",
                "temperature",
                "momentum",
                "label_weight",
                "ema",
            )
        }
        return {**asdict(self), **numbers, "view": self.view.to_json(), "teacher_view": seen}
