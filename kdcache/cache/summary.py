"""What a cache holds, in figures.

In: a cache. Out: a `Summary` of all of it (coverage, size, how sure and how right the teacher was),
or an `Entry`: one record as probabilities. Cost: some shards are read, spread over the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Target, TemperedTarget
from kdcache.cache.cache import LogitCache
from kdcache.cache.spec import CacheSpec
from kdcache.errors import UsageError
from kdcache.losses.distillation import log_probabilities
from kdcache.views.mixing import MIX_UNIT, pair_mix_weights
from kdcache.views.order import view_order, view_positions

SUMMARY_ROWS = 65_536
SUMMARY_SHARDS = 32


@dataclass(frozen=True)
class Distribution:
    """Of one number over records: its mean and its quantiles at 5 to 95 percent."""

    mean: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float

    @staticmethod
    def of(values: NDArray[np.float64]) -> Distribution:
        quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        return Distribution(float(values.mean()), *map(float, quantiles))


@dataclass(frozen=True)
class Accuracy:
    """Shares of records whose first class is the sample's own, or else its partner's.

    The own class has at least half of a mixed view. partner is None where views are not mixed.
    """

    own: float
    partner: float | None


@dataclass(frozen=True)
class Gap:
    """The shards that a view lacks, rising."""

    view: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """Distributions are over `rows` records of shards that are there, spread over the cache, at T.

    entropy       nats, the tail taken as evenly spread; tail_mass and largest are shares of 1
    temperature   1, or that of the draws
    """

    views_complete: int
    shards: int
    shards_missing: int
    missing: tuple[Gap, ...]
    stored_bytes: int
    bytes_per_record: float | None
    rows: int
    temperature: float
    entropy: Distribution | None
    largest_probability: Distribution | None
    tail_mass: Distribution | None
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Entry:
    """One record: where it lies, what the teacher saw, and the classes it named, likeliest first.

    weight   the partner's share of the view; partner is None where nothing is mixed
    tail     the mass of all classes that are not named
    """

    view: int
    position: int
    sample: int
    partner: int | None
    weight: float
    temperature: float
    classes: list[int]
    names: list[str]
    probabilities: list[float]
    tail: float
    entropy: float


def summarise(cache: LogitCache, labels: NDArray[np.int64] | None = None) -> Summary:
    """Coverage, size and the teacher's statistics; its accuracy where labels [N] are given.

    Raises CacheCorrupt for a damaged shard among those that are read.
    """
    spec = cache.spec
    missing = cache.missing()
    absent = gaps(missing)
    parts, hits = [], []
    for view, rows_B in _rows(cache, missing):
        target = cache.decode(cache.read(view, int(rows_B[0]), int(rows_B[-1]) + 1))
        named = _Named.of(target)[rows_B - rows_B[0]]
        parts.append(named.figures(spec))
        if labels is not None:
            hits.append(_hits(spec, view, rows_B, named.first(), labels))
    stored = cache.stored_bytes()
    recorded = spec.num_views * spec.num_samples - sum(
        cache.num_rows(shard) for _, shard in missing
    )
    entropy = largest = tail_mass = None
    if parts:
        entropy, largest, tail_mass = (Distribution.of(x) for x in np.concatenate(parts, 1))
    accuracy = None
    if hits:
        own, partner = (float(x) for x in np.concatenate(hits, 1).mean(1))
        accuracy = Accuracy(own, partner if spec.view_spec and spec.view_spec.mixup else None)
    return Summary(
        spec.num_views - len(absent),
        len(cache.shards()),
        len(missing),
        absent,
        stored,
        stored / recorded if recorded else None,
        sum(part.shape[1] for part in parts),
        spec.codec.default_temperature,
        entropy,
        largest,
        tail_mass,
        accuracy,
    )


def entry(cache: LogitCache, sample: int, view: int, names: Sequence[str] | None = None) -> Entry:
    """The record of a sample in a view; names are the classes', by default those on the cache.

    Raises UsageError for a sample or view that the cache does not have, CacheIncomplete for a
    shard.
    """
    spec = cache.spec
    for what, number, count in (
        ("sample", sample, spec.num_samples),
        ("view", view, spec.num_views),
    ):
        if not 0 <= number < count:
            raise UsageError(f"{what} must be 0 to {count - 1} on {cache.url}, not {number}")
    position, partner, weight = sample, None, 0.0
    if spec.row_order == "view":
        assert spec.view_spec is not None
        position = int(view_positions(spec.view_spec, view, spec.num_samples)[sample])
        share = int(pair_mix_weights(spec.view_spec, view, position, spec.num_samples))
        if share:
            partner = int(view_order(spec.view_spec, view, spec.num_samples)[position ^ 1])
            weight = share / MIX_UNIT
    target = cache.decode(cache[view, position])
    named = _Named.of(target)
    found = [(p, c) for p, c in zip(*named.sorted(), strict=True) if p > 0]
    if names is None:
        names = cache.metadata.get("class_names") or [str(c) for c in range(spec.num_classes)]
    entropy, _, tail = named.figures(spec)[:, 0]
    return Entry(
        view,
        position,
        sample,
        partner,
        weight,
        spec.codec.default_temperature,
        [c for _, c in found],
        [names[c] for _, c in found],
        [p for p, _ in found],
        float(tail),
        float(entropy),
    )


def gaps(missing: Iterable[tuple[int, int]]) -> tuple[Gap, ...]:
    """(view, shard) pairs, in order, by view."""
    lacks: dict[int, list[int]] = {}
    for view, shard in missing:
        lacks.setdefault(view, []).append(shard)
    return tuple(Gap(view, tuple(shards)) for view, shards in lacks.items())


def coverage(cache: LogitCache, absent: Sequence[Gap]) -> str:
    """Such as "views 0-3, 5 whole; view 4 lacks shards 1, 7; views 6-9 lack all"."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for gap in absent:
        alike.setdefault(gap.shards, []).append(gap.view)
    whole = sorted(set(range(cache.spec.num_views)) - {gap.view for gap in absent})
    phrases = [f"{_plural('view', whole)} whole"] if whole else []
    for shards, where in alike.items():
        some = len(shards) < cache.shards_per_view
        what = _plural("shard", shards) if some else "all"
        phrases.append(f"{_plural('view', where)} {'lack' if len(where) > 1 else 'lacks'} {what}")
    return "; ".join(phrases)


def spans(numbers: Iterable[int]) -> str:
    """Rising numbers with their runs drawn together: "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _plural(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {spans(numbers)}"


@dataclass(frozen=True)
class _Named:
    """Log-probabilities of named classes and of the tail."""

    log_p_BK: torch.Tensor
    class_ids_BK: torch.Tensor | None
    log_tail_B: torch.Tensor | None

    @staticmethod
    def of(target: Target | TemperedTarget) -> _Named:
        if isinstance(target, TemperedTarget):
            return _Named(target.log_p_BK, target.class_ids_BK, target.log_tail_B)
        log_p_BK, log_tail_B = log_probabilities(target)
        return _Named(log_p_BK, target.class_ids_BK, log_tail_B)

    def __getitem__(self, rows: NDArray[np.int64]) -> _Named:
        classes, tail = self.class_ids_BK, self.log_tail_B
        return _Named(
            self.log_p_BK[rows],
            None if classes is None else classes[rows],
            None if tail is None else tail[rows],
        )

    def figures(self, spec: CacheSpec) -> NDArray[np.float64]:
        """Entropy, largest probability and tail mass [3, B]."""
        # entr gives 0 for a probability of 0, where p log p is NaN.
        entropy_B = torch.special.entr(self.log_p_BK.exp()).sum(1)
        mass_B = torch.zeros_like(entropy_B)
        if self.log_tail_B is not None:
            mass_B = self.log_tail_B.exp()
            # The tail is taken as evenly spread: each of its classes has 1 / left of its mass.
            left = float(np.log(spec.num_classes - self.log_p_BK.shape[1]))
            entropy_B = entropy_B - mass_B * (self.log_tail_B - left)
        largest_B = self.log_p_BK.amax(1).exp()
        return torch.stack([entropy_B, largest_B, mass_B]).double().numpy()

    def first(self) -> NDArray[np.int64]:
        """The likeliest class [B]."""
        first_B1 = self.log_p_BK.argmax(1, keepdim=True)
        if self.class_ids_BK is not None:
            first_B1 = self.class_ids_BK.gather(1, first_B1)
        return first_B1[:, 0].numpy()

    def sorted(self) -> tuple[list[float], list[int]]:
        """Probabilities and classes of the one row, likeliest first."""
        p_K, at_K = self.log_p_BK[0].exp().sort(descending=True, stable=True)
        classes_K = at_K if self.class_ids_BK is None else self.class_ids_BK[0][at_K]
        return p_K.tolist(), classes_K.tolist()


def _rows(cache: LogitCache, missing: list[tuple[int, int]]) -> list[tuple[int, NDArray[np.int64]]]:
    """Views, and rows of one shard of each, spread over what is there."""
    absent = set(missing)
    there = [place for place in cache.shards() if place not in absent]
    shards = min(len(there), SUMMARY_SHARDS)
    chosen = [there[len(there) * i // shards] for i in range(shards)]
    found = []
    for view, shard in chosen:
        start, stop = cache.shard_range(shard)
        count = min(stop - start, max(1, SUMMARY_ROWS // len(chosen)))
        found.append((view, start + np.arange(count) * (stop - start) // count))
    return found


def _hits(
    spec: CacheSpec,
    view: int,
    rows_B: NDArray[np.int64],
    first_B: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether the first class is the sample's own, and whether it is its partner's only [2, B]."""
    if spec.row_order == "dataset":
        own_B = first_B == labels[rows_B]
        return np.stack([own_B, np.zeros_like(own_B)])
    assert spec.view_spec is not None
    order = view_order(spec.view_spec, view, spec.num_samples)
    own_B = first_B == labels[order[rows_B]]
    mixed_B = pair_mix_weights(spec.view_spec, view, rows_B, spec.num_samples) > 0
    # The last of an odd count has no partner; its weight of 0 leaves it out below.
    partner_labels_B = order[np.minimum(rows_B ^ 1, spec.num_samples - 1)]
    return np.stack([own_B, ~own_B & mixed_B & (first_B == labels[partner_labels_B])])
