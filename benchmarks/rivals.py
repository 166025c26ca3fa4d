"""Distillation as others do it: the plain PyTorch loop. `rival_torchdistill` shares its settings.

Both get what helps them: a tuned number of DataLoader workers that live as long as the run, uint8
between processes, one normalisation for teacher and student, channels-last memory, the fused AdamW,
pinned memory on a GPU. Both mix as timm does, a batch with itself reversed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.step_cases import Case, Item
from kdcache.models.load import OWN_MEAN, OWN_STD

LR, WEIGHT_DECAY, CLIP, TEMPERATURE = 3e-3, 1e-2, 1.0, 1.0
LOG_EVERY_STEPS = 50


def loader_settings(case: Case, workers: int) -> dict[str, object]:
    """Of the DataLoader, for either rival."""
    return {
        "batch_size": case.batch_size,
        "num_workers": workers,
        "drop_last": True,
        "persistent_workers": workers > 0,
        "pin_memory": case.device.type == "cuda",
    }


def prepare(images_BCHW: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [B, 1 or 3, H, W] to mixed, normalised float32 [B, 3, H, W].

    In the order that costs least: the layout is changed in bytes, grey images are mixed as grey.
    """
    images = images_BCHW.to(device, non_blocking=True)
    x = images.contiguous(memory_format=torch.channels_last).float()
    x = x.flip(0).lerp_(x, float(np.random.beta(1.0, 1.0)))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (OWN_MEAN, OWN_STD))
    return x.sub(255 * mean).div_(255 * std).contiguous(memory_format=torch.channels_last)


def kd_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(student_BC / TEMPERATURE, 1)
    q = F.softmax(teacher_BC / TEMPERATURE, 1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def plain(case: Case, workers: int) -> Callable[[], int]:
    """The loop that one writes: DataLoader, live teacher, F.kl_div, AdamW, cosine, clipping."""
    teacher = case.teacher().network

    def run() -> int:
        student = case.student().network.train()
        optimizer = torch.optim.AdamW(
            student.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True
        )
        steps = case.epochs * case.batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        settings = loader_settings(case, workers)
        loader: DataLoader[Item] = DataLoader(case.items, shuffle=True, **settings)  # type: ignore[arg-type]
        step = 0
        for _ in range(case.epochs):
            for images, _ in loader:
                x = prepare(images, case.device)
                with torch.inference_mode():
                    answers = teacher(x)
                # The loss keeps what it reads, and autograd keeps no tensor of inference mode.
                loss = kd_loss(student(x), answers.clone())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                step += 1
                if step % LOG_EVERY_STEPS == 0:
                    loss.item()
        loss.item()
        return case.images

    return run


def rates_by_workers(case: Case, candidates: list[int]) -> dict[int, float]:
    """Images a second of the plain loop with so many workers, each run twice, the second counts."""
    runs = {str(workers): plain(case, workers) for workers in candidates}
    return {int(name): found.rates[0] for name, found in harness.interleave(runs, 1).items()}
