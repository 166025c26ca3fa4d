"""How good is a model, and how close is it to its teacher, on the plain view of a dataset.

All figures are shares of 1, but kl, which is KL(teacher || student) in nats at T = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kdcache.codec import dense_target
from kdcache.dataset import Dataset
from kdcache.loader import Loader
from kdcache.loss import distillation_losses
from kdcache.models import Classifier
from kdcache.spec import evaluation_views


@dataclass(frozen=True)
class Evaluation:
    """top5 is absent below six classes; agreement and kl without a teacher."""

    samples: int
    top1: float
    top5: float | None
    cross_entropy: float
    agreement: float | None = None
    kl: float | None = None


def evaluate(
    model: Classifier,
    dataset: Dataset,
    *,
    size_px: int,
    teacher: Classifier | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Accuracy of `model`, and its agreement and KL with the teacher where one is given.

    The model's train or eval mode is restored afterwards.
    """
    training = model.training
    model.eval()
    names = ("top1", "top5", "cross_entropy", "agreement", "kl")
    sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
    rows = 0
    device = model.mean.device
    views = evaluation_views(size_px)
    loader = Loader(dataset, views, batch_size, workers=workers, device=device)
    try:
        with torch.inference_mode(), loader:
            for batch in loader.batches(0):
                logits = model(batch.images_BCHW).float()
                found = _sums(logits, batch.labels_B)
                if teacher is not None:
                    teacher_logits = teacher(batch.images_BCHW).float()
                    found["agreement"] = (logits.argmax(1) == teacher_logits.argmax(1)).sum()
                    found["kl"] = distillation_losses(logits, dense_target(teacher_logits)).sum()
                for name, value in found.items():
                    sums[name] = sums[name] + value.double().cpu()
                rows += len(batch)
                progress(rows)
    finally:
        model.train(training)
    mean = {name: float(total) / rows for name, total in sums.items()}
    return Evaluation(
        rows,
        mean["top1"],
        mean["top5"] if len(dataset.classes) > 5 else None,
        mean["cross_entropy"],
        mean["agreement"] if teacher is not None else None,
        max(mean["kl"], 0.0) if teacher is not None else None,  # rounding may give less than 0
    )


def _sums(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> dict[str, torch.Tensor]:
    ranked = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
    hits = ranked == labels_B[:, None]
    return {
        "top1": hits[:, 0].sum(),
        "top5": hits.any(1).sum(),
        "cross_entropy": functional.cross_entropy(logits_BC, labels_B, reduction="sum"),
    }
