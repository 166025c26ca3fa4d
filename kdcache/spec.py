"""Frozen specs: what decides pixels, and what decides a tape.

A spec validates itself when it is built, prints as canonical JSON and hashes to a digest. Only what
changes the teacher's answers is part of a spec.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from kdcache.errors import UsageError

Crop = Literal["inception", "random", "center", "whole"]
ValueType = Literal["float32", "float16", "uint8"]
Mode = Literal["labels", "online", "cached"]
Split = Literal["train", "test"]
OnError = Literal["fail", "skip"]
Order = Literal["position", "sample"]
Precision = Literal["float32", "bfloat16", "float16"]
OptimizerName = Literal["adamw", "sgd", "soap"]

VIEW_VERSION = 1
TAPE_VERSION = 1

# A view and a sample share 64 bits; `rng.py` gives a view 24 of them.
MAX_VIEWS = 1 << 24

# The classic evaluation crop: 224 of 256 px, so (7/8)^2 of the largest square.
MILD_AREA = (7 / 8) ** 2
# Up to this side images are small enough that evaluation shows them whole, and that we keep
# their pixels rather than a JPEG.
SMALL_PX = 64


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """The first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def _need(ok: bool, field: str, expected: str, found: object) -> None:
    if not ok:
        raise UsageError(f"{field} must be {expected}, not {found!r}")


@dataclass(frozen=True)
class ViewSpec:
    """Everything that decides the pixels of a view.

    size_px   side of the square view, in pixels
    crop      "inception": 10 tries for a box with an area of min_area to 1 of the image and an
              aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015); "random": a square of min_area of
              the largest square, anywhere; "center": the same square in the middle; "whole": all
              of the image, squashed into the square
    min_area  the area above, in (0, 1]; 1 for "whole"
    flip      mirror left to right with probability 1/2
    mixup     alpha of Beta(alpha, alpha) for pair mixing (Zhang et al. 2018); 0 turns it off
    seed      64 bits that key every draw
    """

    size_px: int
    crop: Crop = "inception"
    min_area: float = 0.05
    flip: bool = True
    mixup: float = 1.0
    seed: int = 0
    version: int = VIEW_VERSION

    def __post_init__(self) -> None:
        _need(1 <= self.size_px <= 4096, "size", "a side of 1 to 4096 px", self.size_px)
        _need(self.crop in get_args(Crop), "crop", f"one of {', '.join(get_args(Crop))}", self.crop)
        _need(0 < self.min_area <= 1, "min-area", "in (0, 1]", self.min_area)
        if self.crop == "whole":
            _need(self.min_area == 1, "min-area", "1 for all of the image", self.min_area)
        _need(self.mixup == 0 or 0.05 <= self.mixup <= 100, "mixup", "0 or 0.05 to 100", self.mixup)
        _need(0 <= self.seed < 1 << 64, "view-seed", "in [0, 2^64)", self.seed)
        _need(self.version == VIEW_VERSION, "view spec version", str(VIEW_VERSION), self.version)

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        # 1 and 1.0 are equal here and two texts in JSON; equal specs have one digest.
        return {**asdict(self), "min_area": float(self.min_area), "mixup": float(self.mixup)}


def evaluation_views(size_px: int) -> ViewSpec:
    """The one plain view that accuracy is measured on: a centre crop, or all of a small image."""
    area = 1.0 if size_px <= SMALL_PX else MILD_AREA
    return ViewSpec(size_px, crop="center", min_area=area, flip=False, mixup=0)


def require_tape_version(version: object) -> None:
    """Raise UsageError for a tape of another version, whose spec may have other fields."""
    if version != TAPE_VERSION:
        raise UsageError(
            f"this kdcache reads tapes of version {TAPE_VERSION}, the tape has version "
            f"{version}: install the kdcache that made it"
        )


@dataclass(frozen=True)
class TapeSpec:
    """What a tape is: whose answers, to which views, kept how.

    classes      C, the number of classes of the teacher
    top_k        k <= C classes kept for each record; k = C keeps all logits, without indices
    dtype        how a kept logit is stored: "float32", "float16", or "uint8"
    dataset      fingerprint of the samples; teacher: fingerprint of the weights
    view         what the teacher saw; None where it is not a view of ours (an imported cache)
    order        "position": row p of view v answers position p of that view, for training on the
                 same views; "sample": row i answers sample i, for training on others (the "fixed
                 teacher" and "independent noise" of Beyer et al. 2022, section 3)
    average      each record is of the mean probabilities over views 0 ... average - 1; 0: it is of
                 one view
    draws        keep this many random draws from softmax(logits / temperature) instead of the top k
                 (Random Sampling KD, arXiv 2503.16870); top_k is then the most classes of a record
    temperature  of the draws, and so of training from them; 1 without draws
    """

    views: int
    samples: int
    classes: int
    top_k: int
    dtype: ValueType
    dataset: str
    teacher: str
    view: ViewSpec | None
    order: Order = "position"
    average: int = 0
    draws: int = 0
    temperature: float = 1.0
    version: int = TAPE_VERSION

    def __post_init__(self) -> None:
        _need(1 <= self.views <= MAX_VIEWS, "views", f"1 to {MAX_VIEWS}", self.views)
        _need(self.samples >= 1, "samples", "at least 1", self.samples)
        _need(self.classes >= 2, "classes", "at least 2", self.classes)
        _need(
            1 <= self.top_k <= self.classes,
            "top-k",
            f"1 to {self.classes}, the number of classes, or 'all'",
            self.top_k,
        )
        _need(
            self.dtype in get_args(ValueType),
            "dtype",
            f"one of {', '.join(get_args(ValueType))}",
            self.dtype,
        )
        _need(self.order in get_args(Order), "order", " or ".join(get_args(Order)), self.order)
        _need(0 <= self.average <= MAX_VIEWS, "average", f"0 to {MAX_VIEWS}", self.average)
        _need(0 <= self.draws <= 255, "sampled", "1 to 255 draws", self.draws)
        _need(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)
        require_tape_version(self.version)
        if self.view is None and self.order == "position":
            raise UsageError("a tape in position order needs the spec of its views")
        if self.average and (self.views != 1 or self.order != "sample"):
            raise UsageError("an averaged tape has one view, in sample order")
        if self.order == "sample" and self.view is not None and self.view.mixup:
            raise UsageError("a tape in sample order answers single images: it needs --mixup 0")
        if not self.draws and self.temperature != 1:
            raise UsageError("only draws have a temperature: the top k serve any T >= 1")
        if self.draws and self.top_k != min(self.draws, self.classes):
            raise UsageError(f"{self.draws} draws name at most {self.draws} classes")

    @property
    def dense(self) -> bool:
        """Every class's logit is kept."""
        return self.top_k == self.classes and not self.draws

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        view = self.view.to_json() if self.view else None
        return {**asdict(self), "view": view, "temperature": float(self.temperature)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TapeSpec:
        view = ViewSpec(**value["view"]) if value["view"] else None
        return TapeSpec(**{**value, "view": view})


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
        _need(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _need(self.epochs <= MAX_VIEWS, "epochs", f"at most {MAX_VIEWS}", self.epochs)
        _need(self.batch_size >= 1, "batch size", "at least 1", self.batch_size)
        _need(self.lr > 0, "lr", "above 0", self.lr)
        _need(self.lr <= 1000, "lr", "at most 1000", self.lr)
        _need(self.weight_decay >= 0, "weight decay", "at least 0", self.weight_decay)
        _need(self.weight_decay <= 1000, "weight decay", "at most 1000", self.weight_decay)
        _need(
            0 <= self.warmup < 1 or (self.warmup < math.inf and self.warmup == int(self.warmup)),
            "warmup",
            "a share in [0, 1) or a number of steps",
            self.warmup,
        )
        _need(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)
        _need(0 <= self.seed < 1 << 63, "seed", "in [0, 2^63)", self.seed)
        _need(self.views is None or self.views >= 1, "views", "at least 1", self.views)
        _need(0 <= self.average <= MAX_VIEWS, "average", f"0 to {MAX_VIEWS}", self.average)
        names = get_args(OptimizerName)
        _need(self.optimizer in names, "optimizer", f"one of {', '.join(names)}", self.optimizer)
        _need(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _need(0 <= self.label_weight <= 1, "label weight", "in [0, 1]", self.label_weight)
        _need(0 <= self.ema < 1, "ema", "a decay in [0, 1)", self.ema)
        precisions = get_args(Precision)
        _need(
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


def differences(expected: object, found: object) -> list[str]:
    """The fields in which two specs of one type differ, as "field: expected, found" phrases."""
    out: list[str] = []
    for field in fields(expected):  # type: ignore[arg-type]
        a, b = getattr(expected, field.name), getattr(found, field.name)
        if isinstance(a, ViewSpec) and isinstance(b, ViewSpec):
            out += differences(a, b)
        elif a != b:
            out.append(f"{field.name}: {_short(a)} here, {_short(b)} there")
    return out


def _short(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
