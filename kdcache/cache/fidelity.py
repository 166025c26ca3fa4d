"""How close a student's training from records is to training from the live teacher.

In: a codec, and live logits that its tables were not made from. Out: a `Fidelity` at each of some
temperatures: what the records leave out of the distribution, and out of the gradient that a student
near the teacher gets. A student far from it gets a gradient that is closer to the live one. Cost:
some passes over the logits, [B, C].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.batch import Target, dense_target
from kdcache.cache.codecs import RecordCoder
from kdcache.cache.records import Records
from kdcache.choices import TOP_K_TAIL
from kdcache.losses.distillation import distillation_loss, distillation_losses, spread_tail

TEMPERATURES = (1.0, 2.0, 5.0, 10.0)
# A user is told of records whose cosine is lower at the temperature of training.
CLOSE_COSINE = 0.95
# The near student: the teacher's logits with noise of this standard deviation, in nats.
NEAR_STUDENT_NOISE = 0.7
SEED = 0


@dataclass(frozen=True)
class Fidelity:
    """Of records at one temperature T.

    kl       mean KL(teacher || record) over all classes, in nats
    cosine   between the gradient of the loss that records give a student near the teacher and the
             one that the live teacher gives; over all rows together
    """

    temperature: float
    kl: float
    cosine: float


class LiveError:
    """KL(teacher || record) of some records while they are made, against the live logits.

    count, mean, largest   of the records so far; mean and largest in nats, at T = 1
    """

    ROWS_OF_BATCH = 8

    def __init__(self) -> None:
        self.count = 0
        self._total = self.largest = 0.0

    @property
    def mean(self) -> float:
        return self._total / max(1, self.count)

    def add(self, coder: RecordCoder, records: Records, logits_BC: torch.Tensor) -> None:
        """Measure the first of these records of these logits."""
        some = slice(self.ROWS_OF_BATCH)
        target = coder.decode(records[some], logits_BC.shape[1])
        if not isinstance(target, Target):
            return  # draws: one record says nothing of how good they are
        live = dense_target(logits_BC[some])
        kl_B = distillation_losses(spread_tail(target).to(logits_BC.device), live)
        self.count += len(kl_B)
        self._total += float(kl_B.sum())
        self.largest = max(self.largest, float(kl_B.max()))


def measure_fidelity(
    live_BC: torch.Tensor, target: Target, temperatures: Sequence[float] = TEMPERATURES
) -> tuple[Fidelity, ...]:
    """The fidelity of the target that records of these live logits decode to."""
    live = dense_target(live_BC)
    noise = torch.Generator().manual_seed(SEED)
    student_BC = live.logits_BK + NEAR_STUDENT_NOISE * torch.randn(live_BC.shape, generator=noise)
    return tuple(
        Fidelity(
            T,
            float(distillation_losses(spread_tail(target, T) * T, live, temperature=T).mean())
            / T**2,
            _cosine(_gradient(student_BC, live, T), _gradient(student_BC, target, T)),
        )
        for T in temperatures
    )


def _gradient(student_BC: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """Of the loss, with respect to the student's logits."""
    z_BC = student_BC.clone().requires_grad_()
    with torch.enable_grad():
        loss = distillation_loss(z_BC, target, temperature=temperature, tail=TOP_K_TAIL)
    return torch.autograd.grad(loss, z_BC)[0]


def _cosine(a_BC: torch.Tensor, b_BC: torch.Tensor) -> float:
    a, b = a_BC.double().flatten(), b_BC.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def fidelity_to_json(found: Sequence[Fidelity]) -> list[dict[str, float]]:
    """For a cache's metadata."""
    return [
        {"temperature": x.temperature, "kl": float(f"{x.kl:.3g}"), "cosine": round(x.cosine, 4)}
        for x in found
    ]


def fidelity_from_json(value: Sequence[Mapping[str, Any]]) -> tuple[Fidelity, ...]:
    return tuple(Fidelity(**x) for x in value)


def cosine_at(metadata: Mapping[str, Any], temperature: float) -> float | None:
    """The cosine that a cache's metadata have; None where it was not measured.

    Between the measured temperatures by interpolation over log T; beyond them, the nearest.
    """
    found = fidelity_from_json(metadata.get("fidelity", []))
    if not found:
        return None
    logs = [math.log(x.temperature) for x in found]
    return float(np.interp(math.log(temperature), logs, [x.cosine for x in found]))


def describe_fidelity(found: Sequence[Fidelity]) -> str:
    """Such as "KL 0.083, 0.036 and cosine 0.980, 0.892 at T = 1, 2"."""
    kl = ", ".join(f"{x.kl:.2g}" for x in found)
    cosine = ", ".join(f"{x.cosine:.3f}" for x in found)
    return f"KL {kl}; cosine {cosine}; at T = {', '.join(f'{x.temperature:g}' for x in found)}"
