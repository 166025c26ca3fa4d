"""Does the teacher say again what the tape says? Some records, judged by stated tolerances.

In: records of a tape (`verify.read`), its data, its teacher. Out: measures, each with what it may
be. What stays true: who made the tape passes on another device, in another precision, in other
batches. Cost: two forward passes of the teacher over the sampled views.

A logit computed again may differ by what the codec rounds (`codec.error_bound`) and by the
teacher's arithmetic. How much the latter is depends on the network. So the teacher answers a second
time in the other precision that is in question (where both are float32: in bfloat16, an eighth of
whose change counts), and may differ by some times what that changes. In any case it may differ by
some units of u * (largest magnitude in the row), u being the unit roundoff of the coarser
arithmetic. We saw, of bfloat16 and float16 against float32, in these units: at most 7 and in root
mean square up to 1.7 for residual networks of ours, trained, for ResNet-18, ViT-B/16 and ConvNeXt-T
with random weights; hundreds for deep batch-normalised networks with random weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kdcache.batch import Target
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import sampled, top_k
from kdcache.cache.verify import Picked
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader, render_digest
from kdcache.errors import UsageError
from kdcache.losses.distillation import distillation_losses
from kdcache.models.classifier import Teacher
from kdcache.spec import Precision
from kdcache.teacher.precompute import iter_teacher_logits

Progress = Callable[[int], None]

# A GPU computes float32 convolutions in TF32, whose significand is float16's.
ROUNDOFF = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
COARSE_FIRST: tuple[Precision, ...] = ("bfloat16", "float16")
# In the units above; three times what we saw.
LARGEST_UNITS = 24.0
TYPICAL_UNITS = 5.0
# Times the root mean square that was measured. Of a million errors the largest is 5 times that, and
# both the tape's and ours count.
LARGEST_NOISE = 10.0
TYPICAL_NOISE = 2.0
# What is left of 0 in float32.
LEAST_KL = 1e-6
LEAST_DISTANCE = 1e-6


@dataclass(frozen=True)
class Measure:
    """What was found beside what may be: a text that must be equal, or a bound.

    note   where the worst was found, or what a difference means
    """

    name: str
    what: str
    found: float | str
    tolerance: float | str
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class _Allowance:
    """What the teacher's arithmetic may change of a row's logits, in nats [B]."""

    largest_B: torch.Tensor
    typical_B: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """Of each row, as float64 [B]: what is measured, and what of it is allowed.

    agrees    1 where the tape's first class is the live one, near ties aside; of draws, the share
              that hit the class they would hit live, near its boundary aside
    typical   KL(tape || live) in nats; of draws, the mean distance to where they would lie live
    largest   error of a kept logit or number of the tail, in nats; of draws, their distance
    share     the largest ratio of such an error to what is allowed of it
    """

    agrees: torch.Tensor
    typical: torch.Tensor
    allowed: torch.Tensor
    largest: torch.Tensor
    share: torch.Tensor

    @staticmethod
    def concatenate(parts: Sequence[_Rows]) -> _Rows:
        return _Rows(*(torch.cat(x) for x in zip(*(vars(p).values() for p in parts), strict=True)))


def require_recomputable(tape: LogitCache) -> None:
    """Raise UsageError for a tape whose views are not of kdcache's making."""
    if tape.spec.view is None:
        raise UsageError(
            f"{tape.url} was imported, and its views are not of kdcache's making: its records "
            "cannot be computed again; leave out --data and --teacher to check its shards"
        )


def identify(tape: LogitCache, dataset: Dataset, teacher: Teacher) -> list[Measure]:
    """Whether data, teacher and rendered pixels are those that the tape was made from."""
    spec = tape.spec
    assert spec.view is not None
    data = _same(
        "data",
        "data",
        dataset.fingerprint,
        spec.dataset,
        "other images or labels than the tape was made from",
    )
    weights = _same(
        "teacher",
        "teacher",
        teacher.fingerprint(),
        spec.teacher,
        "other weights, another type of them, another normalisation, or another "
        "number or order of teachers",
    )
    if tape.pixels is None:
        return [data, weights]
    why = "the decoder or the view code differs from where the tape was made"
    pixels = _same(
        "pixels",
        "pixels of rendered views",
        render_digest(dataset, spec.view),
        tape.pixels,
        why if data.ok else "other data look otherwise",
    )
    return [data, weights, pixels]


def recompute(
    tape: LogitCache,
    dataset: Dataset,
    teacher: Teacher,
    picked: list[Picked],
    *,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress = lambda records: None,
) -> list[Measure]:
    """Measures of the picked records against the teacher's answers to the same views.

    `progress` is called with records done so far. Raises UsageError where the data has not as many
    samples, NonFinite for a teacher's NaN, and what the loader raises.
    """
    spec = tape.spec
    assert spec.view is not None
    if len(dataset) != spec.samples:
        raise UsageError(
            f"{dataset.path} has {len(dataset)} samples, {tape.url} was made from {spec.samples}: "
            "use the data it was made from"
        )
    other, factor = _other_arithmetic(tape, teacher)
    places: list[tuple[int, int]] = []
    asked: list[tuple[Picked, torch.Tensor]] = []
    changes: list[torch.Tensor] = []
    device = teacher.device
    with Loader(dataset, spec.view, batch_size, workers=workers, device=device) as loader:
        for some in picked:
            done = 0
            for (rows_B, logits_BC), (_, other_BC) in zip(
                iter_teacher_logits(loader, teacher, spec, some.view, some.rows_B),
                iter_teacher_logits(loader, other, spec, some.view, some.rows_B),
                strict=True,
            ):
                records = some.records[slice(done, done + len(rows_B))]
                live_BC = logits_BC.double().cpu()
                asked.append((Picked(some.view, rows_B, records), live_BC))
                change_BC = _relative(other_BC.double().cpu()) - _relative(live_BC)
                changes.append(factor * change_BC.square().mean(1).sqrt())
                places += [(some.view, int(row)) for row in rows_B]
                done += len(rows_B)
                progress(len(places))
    if not asked:
        return []
    allowances = _allowances([live for _, live in asked], changes, _roundoff(tape, teacher))
    judge = _judge_draws if spec.draws else _judge_logits
    parts = [judge(tape, *one, may) for one, may in zip(asked, allowances, strict=True)]
    return _measures(_Rows.concatenate(parts), places, draws=spec.draws)


def _other_arithmetic(tape: LogitCache, teacher: Teacher) -> tuple[Teacher, float]:
    """The teacher in another precision, and by what its change of the answers counts."""
    used = tape.info.get("precision"), teacher.precision
    coarse = next((name for name in COARSE_FIRST if name in used), None)
    other = copy.copy(teacher)  # the same network
    if coarse is None:
        other.precision = "bfloat16"
        return other, ROUNDOFF["float32"] / ROUNDOFF["bfloat16"]
    other.precision = "float32" if teacher.precision == coarse else coarse
    return other, 1.0


def _allowances(
    lives: list[torch.Tensor], changes: list[torch.Tensor], roundoff: float
) -> list[_Allowance]:
    """What arithmetic may do, by batch."""
    scales = [live_BC.abs().amax(1) for live_BC in lives]
    # A row may have been lucky, so it gets what is usual too.
    usual = (torch.cat(changes) / torch.cat(scales).clamp(min=LEAST_KL)).square().mean().sqrt()
    found = []
    for scale_B, change_B in zip(scales, changes, strict=True):
        unit_B, noise_B = roundoff * scale_B, torch.maximum(change_B, usual * scale_B)
        largest_B = torch.maximum(LARGEST_UNITS * unit_B, LARGEST_NOISE * noise_B)
        typical_B = torch.maximum(TYPICAL_UNITS * unit_B, TYPICAL_NOISE * noise_B)
        found.append(_Allowance(largest_B, typical_B))
    return found


def _relative(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC - logits_BC.amax(1, keepdim=True)


def _same(name: str, what: str, found: str, expected: str, why: str) -> Measure:
    return Measure(name, what, found, expected, found == expected, "" if found == expected else why)


def _roundoff(tape: LogitCache, teacher: Teacher) -> float:
    """Of the coarser arithmetic: the tape's, or the teacher's here."""
    weights = [str(p.dtype).removeprefix("torch.") for p in teacher.parameters()]
    names = [tape.info.get("precision"), teacher.precision, *weights]
    return max(ROUNDOFF.get(str(name), ROUNDOFF["float32"]) for name in names)


def _judge_logits(
    tape: LogitCache, picked: Picked, live_BC: torch.Tensor, may: _Allowance
) -> _Rows:
    spec = tape.spec
    target = tape.decode(picked.records)
    assert isinstance(target, Target)
    relative_BC = _relative(live_BC)
    arithmetic_B1 = may.largest_B[:, None]

    first_B1 = target.logits_BK.argmax(1, keepdim=True)
    if target.classes_BK is not None:
        first_B1 = target.classes_BK.gather(1, first_B1)
    lag_B1 = -relative_BC.gather(1, first_B1)
    agrees_B1 = lag_B1 <= arithmetic_B1 + top_k.error_bound(lag_B1, spec.dtype)

    kl_B = distillation_losses(live_BC, target)
    # What the codec alone makes of these answers. Errors e of the logits give a KL of about
    # e^2 / 2, so that of two errors is at most twice the sum of each one's.
    again = top_k.decode(top_k.encode(live_BC, spec.top_k, spec.dtype), spec.classes)
    codec_B = distillation_losses(live_BC, again).clamp(min=0)
    allowed_B = 2 * codec_B + may.typical_B.square() + LEAST_KL

    live_BK, tape_BK, rounding_BK = relative_BC, target.logits_BK.double(), -relative_BC
    if target.classes_BK is not None and target.tail_B3 is not None:
        left = spec.classes - target.classes_BK.shape[1]
        kept_BK = relative_BC.gather(1, target.classes_BK)
        tail_B3 = _tail_of(relative_BC, target.classes_BK)
        live_BK = torch.cat([kept_BK, tail_B3], 1)
        tape_BK = torch.cat([tape_BK, _tail_numbers(target.tail_B3.double(), left)], 1)
        rounding_BK = live_BK.abs()
        if spec.dtype != "uint8":  # the others keep the log-sum-exp
            rounding_BK[:, -3] += math.log(left)
    limit = top_k.limit(spec.dtype)
    gap_BK = (tape_BK - live_BK.clamp(min=-limit, max=limit)).abs()
    allowed_BK = arithmetic_B1 + top_k.error_bound(rounding_BK, spec.dtype) + LEAST_KL
    largest_B, _ = gap_BK.max(1)
    share_B, _ = (gap_BK / allowed_BK).max(1)
    return _Rows(agrees_B1[:, 0].double(), kl_B, allowed_B, largest_B, share_B)


def _tail_of(relative_BC: torch.Tensor, classes_BK: torch.Tensor) -> torch.Tensor:
    """Log-mean-exp, mean and standard deviation [B, 3] of all logits but those of some classes."""
    named_BC = torch.zeros_like(relative_BC, dtype=torch.bool).scatter_(1, classes_BK, True)
    left = relative_BC.shape[1] - classes_BK.shape[1]
    tail_BT = relative_BC[~named_BC].view(-1, left)
    log_mean_exp_B = tail_BT.logsumexp(1) - math.log(left)
    return torch.stack([log_mean_exp_B, tail_BT.mean(1), tail_BT.std(1, correction=0)], 1)


def _tail_numbers(tail_B3: torch.Tensor, left: int) -> torch.Tensor:
    """The same three numbers of a target's summary of the tail."""
    at_one_B, mean_B, variance_B = tail_B3.unbind(1)
    return torch.stack([at_one_B - math.log(left), mean_B, variance_B.clamp(min=0).sqrt()], 1)


def _judge_draws(tape: LogitCache, picked: Picked, live_BC: torch.Tensor, may: _Allowance) -> _Rows:
    """Errors e of the logits move a boundary between two classes by at most e / 2."""
    spec = tape.spec
    assert spec.view is not None
    distance_Bn = sampled.distances(
        picked.records,
        live_BC,
        spec.temperature,
        seed=spec.view.seed,
        view=picked.view,
        rows_B=picked.rows_B,
    )
    largest_B = may.largest_B / spec.temperature / 2 + LEAST_DISTANCE
    typical_B = may.typical_B / spec.temperature / 2 + LEAST_DISTANCE
    return _Rows(
        (distance_Bn <= largest_B[:, None]).double().mean(1),
        distance_Bn.mean(1),
        typical_B,
        distance_Bn.amax(1),
        distance_Bn.amax(1) / largest_B,
    )


def _measures(rows: _Rows, places: list[tuple[int, int]], *, draws: int) -> list[Measure]:
    agreed, share = float(rows.agrees.mean()), float(rows.share.max())
    typical, allowed = float(rows.typical.mean()), float(rows.allowed.mean())
    worst = int(rows.share.argmax())
    view, row = places[worst]
    where = f"worst in view {view} row {row}: {float(rows.largest[worst]):.3g}"
    if draws:
        texts = (
            "equal draws, boundaries aside",
            "mean distance of a draw",
            "largest distance, of what is allowed",
        )
    else:
        texts = (
            "top-1 agreement, near ties aside",
            "mean KL(tape || live), nats",
            "largest gap, of what is allowed",
        )
        where += " nats"
    names = ("drawn", "distance", "reach") if draws else ("top1", "kl", "gap")
    return [
        Measure(names[0], texts[0], agreed, 1.0, agreed == 1),
        Measure(names[1], texts[1], typical, allowed, typical <= allowed),
        Measure(names[2], texts[2], share, 1.0, share <= 1, where),
    ]
