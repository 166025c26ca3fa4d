"""The student's training loop, visible in one place.

In: a `TrainSpec`, a dataset, a student, a `TargetSource`. Out: a run folder with run.json, the
student's weights and a log. What stays true: epoch e plays view e mod V; the loop does not know
where targets come from; with `deterministic`, equal inputs give equal weights to the bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__, models
from kdcache.dataset import Dataset
from kdcache.errors import NonFinite, StorageError, UsageError
from kdcache.evaluate import Evaluation
from kdcache.loader import Loader
from kdcache.loss import check_temperature, distillation_loss
from kdcache.models import Classifier
from kdcache.records import TargetSource
from kdcache.spec import Mode, ViewSpec

LOG_FILE = "log.jsonl"
LOG_EVERY_STEPS = 50
GRADIENT_NORM = 1.0  # the paper clips the global norm there, in every recipe


@dataclass(frozen=True)
class TrainSpec:
    """What decides a run besides its data and its student.

    views         how many different views the epochs cycle through; None: every epoch a new one
    warmup        share of all steps over which the learning rate rises from 0
    weight_decay  as in AdamW: decoupled, times the learning rate
    seed          of the student's first weights, and of its dropout
    """

    mode: Mode
    view: ViewSpec
    epochs: int
    batch_size: int
    lr: float = 3e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    temperature: float = 1.0
    seed: int = 0
    deterministic: bool = False
    views: int | None = None

    def __post_init__(self) -> None:
        for ok, line in (
            (self.epochs >= 1, f"epochs must be at least 1, not {self.epochs}"),
            (self.batch_size >= 1, f"batch size must be at least 1, not {self.batch_size}"),
            (self.lr > 0, f"lr must be above 0, not {self.lr}"),
            (self.lr <= 1000, f"lr must be at most 1000, not {self.lr}"),
            (self.weight_decay >= 0, f"weight decay must be at least 0, not {self.weight_decay}"),
            (
                self.weight_decay <= 1000,
                f"weight decay must be at most 1000, not {self.weight_decay}",
            ),
            (0 <= self.warmup < 1, f"warmup must be in [0, 1), not {self.warmup}"),
            (0 <= self.seed < 1 << 63, f"seed must be in [0, 2^63), not {self.seed}"),
            (self.views is None or self.views >= 1, f"views must be at least 1, not {self.views}"),
        ):
            if not ok:
                raise UsageError(line)
        check_temperature(self.temperature, sparse=False)


@dataclass(frozen=True)
class Step:
    """What is known after a logged step. rate: images per second since the last one."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    rate: float


def learning_rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Linear warm-up from 0, then a half cosine to 0."""
    rise = round(spec.warmup * steps)
    if step < rise:
        return spec.lr * (step + 1) / rise
    return spec.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def set_determinism(spec: TrainSpec) -> None:
    """Seed torch; with `deterministic` also one thread and deterministic algorithms."""
    torch.manual_seed(spec.seed)
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)


def optimizer_of(student: Classifier, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels only, as in the paper's code."""
    weights = list(student.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr)


def train(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    targets: TargetSource,
    *,
    workers: int | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Train the student in place. The last samples of a view that fill no batch are left out.

    Raises NonFinite when the loss or a weight is NaN or infinite, and what loader and targets
    raise.
    """
    torch.manual_seed(spec.seed + 1)  # of dropout, whatever was drawn on the way here
    batches = len(dataset) // spec.batch_size
    if batches == 0:
        raise UsageError(
            f"batch size {spec.batch_size} is more than the {len(dataset)} samples of the data"
        )
    steps = batches * spec.epochs
    optimizer = optimizer_of(student, spec)
    student.train()
    step, images, since = 0, 0, time.perf_counter()
    used = slice(0, batches * spec.batch_size)
    device = student.mean.device
    with Loader(dataset, spec.view, spec.batch_size, workers=workers, device=device) as loader:
        for epoch in range(spec.epochs):
            view = epoch % spec.views if spec.views else epoch
            for batch in loader.batches(view, used):
                target = targets(batch)
                logits = student(batch.images_BCHW)
                loss = distillation_loss(logits, target, temperature=spec.temperature)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(student.parameters(), GRADIENT_NORM)
                rate = learning_rate(spec, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                step, images = step + 1, images + len(batch)
                if step % LOG_EVERY_STEPS == 0 or step == steps:
                    value = _finite(loss, step)
                    now = time.perf_counter()
                    on_step(Step(step, steps, epoch, value, rate, images / (now - since)))
                    images, since = 0, now
    if not all(bool(w.isfinite().all()) for w in student.parameters()):
        raise NonFinite("the last step made a weight NaN or infinite: lower --lr")


def _finite(loss: torch.Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFinite(f"the loss is {value} at step {step}: lower --lr or raise --warmup")
    return value


class Run:
    """A run's folder. It is a finished run once run.json is there, which is written last.

    A resource: use it with `with`. A run that fails leaves its log, or nothing if that is empty.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists():
            raise UsageError(f"{folder} exists; choose another --out, or remove it")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror}") from error
        self.folder = folder
        self._log = (folder / LOG_FILE).open("w")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if (self.folder / LOG_FILE).stat().st_size == 0 and not (
            self.folder / models.RUN_FILE
        ).exists():
            shutil.rmtree(self.folder)

    def log(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def finish(
        self,
        spec: TrainSpec,
        dataset: Dataset,
        student: Classifier,
        evaluation: Evaluation | None,
        **extra: str | float | None,
    ) -> dict[str, Any]:
        """Write weights and run.json, with `extra` fields; the record."""
        record = {
            **asdict(spec),
            "student": student.name,
            "classes": len(dataset.classes),
            "class_names": list(dataset.classes),
            "data": dataset.fingerprint,
            **extra,
            "weights": student.fingerprint(),
            "kdcache": __version__,
            "torch": torch.__version__,
            "evaluation": asdict(evaluation) if evaluation else None,
        }
        try:
            models.save_weights(student, self.folder / models.WEIGHTS_FILE)
            partial = self.folder / (models.RUN_FILE + ".partial")
            partial.write_text(json.dumps(record, indent=2) + "\n")
            partial.replace(self.folder / models.RUN_FILE)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._log.close()
        return record
