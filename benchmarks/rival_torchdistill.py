"""torchdistill's logit distillation: its DistillationBox, KDLoss and MetricLogger.

The loop is the one of its `examples/torchvision/image_classification.py`, with the plain loop's
DataLoader settings, normalisation and mixing. `pip install 'kdcache[rivals]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import RandomSampler
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.misc.log import MetricLogger, SmoothedValue

from benchmarks import rivals
from benchmarks.step_cases import Case


def configuration(case: Case, workers: int) -> dict[str, Any]:
    """As its YAML files give it. Its KDLoss leaves T^2 to the weight where alpha is 0."""
    logits = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
    }
    kd = {**logits, "temperature": rivals.TEMPERATURE, "alpha": 0, "reduction": "batchmean"}
    term = {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": rivals.TEMPERATURE**2}
    optimizer = {"lr": rivals.LR, "weight_decay": rivals.WEIGHT_DECAY, "fused": True}
    return {
        "num_epochs": case.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": rivals.loader_settings(case, workers),
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
        "optimizer": {"key": "AdamW", "kwargs": optimizer, "max_grad_norm": rivals.CLIP},
        "scheduler": {
            "key": "CosineAnnealingLR",
            "kwargs": {"T_max": case.epochs * case.batches},
            "scheduling_step": 1,
        },
    }


def box_of(case: Case, workers: int) -> DistillationBox:
    return get_distillation_box(
        case.teacher().network,
        case.student().network,
        {"train": case.items},
        configuration(case, workers),
        case.device,
        None,
        False,
        1,
    )


def torchdistill(case: Case, workers: int) -> Callable[[], int]:
    def run() -> int:
        box = box_of(case, workers)
        for epoch in range(case.epochs):
            box.pre_epoch_process(epoch=epoch)
            _one_epoch(box, case)
            box.post_epoch_process()
        box.clean_modules()
        return case.images

    return run


def _one_epoch(box: DistillationBox, case: Case) -> None:
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    for images, labels, extra in logger.log_every(box.train_data_loader, rivals.LOG_EVERY_STEPS):
        x = rivals.prepare(images, case.device)
        box.pre_forward_process()
        loss = box.forward_process(x, labels.to(case.device, non_blocking=True), extra)
        box.post_forward_process(loss=loss)
        logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
