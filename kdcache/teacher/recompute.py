"""Does the teacher say again what the cache says? Some records, judged by stated tolerances.

In: records of a cache (`verify.read`), its data, its teacher. Out: measures, each with what it may
be. What stays true: who made the cache passes on another device, in another precision, in other
batches. Cost: two forward passes of the teacher over the sampled views.

A logit computed again may differ by what the codec rounds (`codec.error_bound`) and by the
teacher's arithmetic. How much the latter is depends on the network. So the teacher answers a second
time in the other precision that is in question (where both are float32: in bfloat16, an eighth of
whose change counts), and may differ by some times what that changes. In any case it may differ by
some units of u * (largest magnitude in the row), u being the unit roundoff of the coarser
arithmetic; and never by more than LARGEST_ALLOWANCE. We saw, of bfloat16 and float16 against
float32, in these units: at most 7 and in root mean square up to 1.7 for residual networks of ours,
trained, for ResNet-18, ViT-B/16 and ConvNeXt-T with random weights; hundreds for deep batch-
normalised networks with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs.protocol import Allowance, MeasureNames, RowErrors
from kdcache.cache.verify import Picked
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader, render_digest
from kdcache.errors import UsageError
from kdcache.models.classifier import Teacher
from kdcache.spec import Precision
from kdcache.teacher.logits import iter_teacher_logits

Progress = Callable[[int], None]

# A GPU computes float32 convolutions in TF32, whose significand is float16's.
ROUNDOFF = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
COARSE_FIRST: tuple[Precision, ...] = ("bfloat16", "float16")
# In the units above; three times what we saw.
LARGEST_UNITS = 24.0
TYPICAL_UNITS = 5.0
# Times the root mean square that was measured. Of a million errors the largest is 5 times that, and
# both the cache's and ours count.
LARGEST_NOISE = 10.0
TYPICAL_NOISE = 2.0
# Nats, whatever the scale of the logits: arithmetic that changes an answer by more is damage.
LARGEST_ALLOWANCE = 10.0
TYPICAL_ALLOWANCE = 2.0
# What is left of 0 in float32.
LEAST_KL = 1e-6


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


def require_recomputable(cache: LogitCache) -> None:
    """Raise UsageError for a cache whose views are not of kdcache's making."""
    if cache.spec.view_spec is None:
        raise UsageError(
            f"{cache.url} was imported, and its views are not of kdcache's making: its records "
            "cannot be computed again; leave out --data and --teacher to check its shards"
        )


def identify(cache: LogitCache, dataset: Dataset, teacher: Teacher) -> list[Measure]:
    """Whether data, teacher and rendered pixels are those that the cache was made from."""
    spec = cache.spec
    assert spec.view_spec is not None
    data = _same(
        "data",
        "data",
        dataset.content_hash,
        spec.dataset_hash,
        "other images or labels than the cache was made from",
    )
    weights = _same(
        "teacher",
        "teacher",
        teacher.content_hash(),
        spec.teacher_hash,
        "other weights, another type of them, another normalisation, or another "
        "number or order of teachers",
    )
    if cache.render_digest is None:
        return [data, weights]
    why = "the decoder or the view code differs from where the cache was made"
    pixels = _same(
        "pixels",
        "pixels of rendered views",
        render_digest(dataset, spec.view_spec),
        cache.render_digest,
        why if data.ok else "other data look otherwise",
    )
    return [data, weights, pixels]


def recompute(
    cache: LogitCache,
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
    spec = cache.spec
    assert spec.view_spec is not None
    # The views of another number of samples have another order.
    if len(dataset) != spec.num_samples:
        raise UsageError(
            f"{dataset.path} has {len(dataset)} samples, {cache.url} was made from "
            f"{spec.num_samples}: use the data it was made from"
        )
    other, factor = _other_arithmetic(cache, teacher)
    places: list[tuple[int, int]] = []
    asked: list[tuple[Picked, torch.Tensor]] = []
    changes: list[torch.Tensor] = []
    device = teacher.device
    with Loader(dataset, spec.view_spec, batch_size, workers=workers, device=device) as loader:
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
    coder = cache.coder()
    allowances = _allowances([live for _, live in asked], changes, _roundoff(cache, teacher))
    parts = [
        coder.compare(some.records, live, allowance, spec.rows(some.view, some.rows_B))
        for (some, live), allowance in zip(asked, allowances, strict=True)
    ]
    return _measures(RowErrors.concatenate(parts), places, spec.codec.measures)


def _other_arithmetic(cache: LogitCache, teacher: Teacher) -> tuple[Teacher, float]:
    """The teacher in another precision, and by what its change of the answers counts."""
    used = cache.metadata.get("precision"), teacher.precision
    coarse = next((name for name in COARSE_FIRST if name in used), None)
    other = copy.copy(teacher)  # the same network
    if coarse is None:
        other.precision = "bfloat16"
        return other, ROUNDOFF["float32"] / ROUNDOFF["bfloat16"]
    other.precision = "float32" if teacher.precision == coarse else coarse
    return other, 1.0


def _allowances(
    lives: list[torch.Tensor], changes: list[torch.Tensor], roundoff: float
) -> list[Allowance]:
    """What arithmetic may do, by batch."""
    scales = [live_BC.abs().amax(1) for live_BC in lives]
    # A row may have been lucky, so it gets what is usual too.
    usual = (torch.cat(changes) / torch.cat(scales).clamp(min=LEAST_KL)).square().mean().sqrt()
    found = []
    for scale_B, change_B in zip(scales, changes, strict=True):
        unit_B, noise_B = roundoff * scale_B, torch.maximum(change_B, usual * scale_B)
        largest_B = torch.maximum(LARGEST_UNITS * unit_B, LARGEST_NOISE * noise_B)
        typical_B = torch.maximum(TYPICAL_UNITS * unit_B, TYPICAL_NOISE * noise_B)
        found.append(
            Allowance(
                largest_B.clamp(max=LARGEST_ALLOWANCE), typical_B.clamp(max=TYPICAL_ALLOWANCE)
            )
        )
    return found


def _relative(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC - logits_BC.amax(1, keepdim=True)


def _same(name: str, what: str, found: str, expected: str, why: str) -> Measure:
    return Measure(name, what, found, expected, found == expected, "" if found == expected else why)


def _roundoff(cache: LogitCache, teacher: Teacher) -> float:
    """Of the coarser arithmetic: the cache's, or the teacher's here."""
    weights = [str(p.dtype).removeprefix("torch.") for p in teacher.parameters()]
    names = [cache.metadata.get("precision"), teacher.precision, *weights]
    return max(ROUNDOFF.get(str(name), ROUNDOFF["float32"]) for name in names)


def _measures(rows: RowErrors, places: list[tuple[int, int]], names: MeasureNames) -> list[Measure]:
    agreed, ratio = float(rows.agrees.mean()), float(rows.ratio.max())
    typical, allowed = float(rows.typical.mean()), float(rows.allowed.mean())
    worst = int(rows.ratio.argmax())
    view, row = places[worst]
    where = f"worst in view {view} row {row}: {float(rows.largest[worst]):.3g}{names.unit}"
    return [
        Measure(*names.agrees, agreed, 1.0, agreed == 1),
        Measure(*names.typical, typical, allowed, typical <= allowed),
        Measure(*names.ratio, ratio, 1.0, ratio <= 1, where),
    ]
