"""Is a cache all there, and as it was written? Read every shard; keep some records on the way.

In: a cache. Out: its faults, and a random sample of its records, which `recompute.py` judges. What
stays true: one damaged shard hides no other; equal caches give equal samples. Cost: the cache is
read once, a shard at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.cache import LogitCache
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.errors import CacheCorrupt, CacheIncomplete, StorageError
from kdcache.views.philox import Purpose, below, draw

Progress = Callable[[int], None]
Kind = Literal["missing", "damaged", "unreadable"]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Fault:
    """A shard that is not as it should be. Unreadable: the store refused, which is no damage."""

    view: int
    shard: int
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Picked:
    """Records of some rows of a view, rising."""

    view: int
    rows_B: I64
    records: Records


def sample(spec: CacheSpec, count: int) -> dict[int, I64]:
    """Rows to recompute, by view: `count` of them or all, spread evenly over the cache.

    Where views are mixed they are whole pairs, of which the last of a view may lack its partner.
    """
    # The teacher saw mixed images, for which the loader needs both of a pair.
    unit = 2 if spec.view_spec is not None and spec.view_spec.mixup else 1
    per_view = -(-spec.num_samples // unit)
    whole = spec.num_views * per_view
    taken = min(-(-count // unit), whole)
    # One from each of `taken` equal stretches of the cache.
    edges = np.arange(taken + 1) * whole // taken
    # The seed is the cache's identity, so that each check of it takes the same rows.
    word = draw(int(spec.identity, 16), 0, np.arange(taken), Purpose.VERIFY)[0]
    units = edges[:-1] + below(word, np.diff(edges)).astype(np.int64)
    found = {}
    for view in np.unique(units // per_view):
        first = units[units // per_view == view] % per_view * unit
        rows = (first[:, None] + np.arange(unit)).reshape(-1)
        found[int(view)] = rows[rows < spec.num_samples]
    return found


def read(
    cache: LogitCache, wanted: dict[int, I64], progress: Progress = lambda rows: None
) -> tuple[list[Fault], list[Picked]]:
    """Read and decode every shard as training would: what is wrong, and the wanted rows' records.

    `progress` is called with rows read so far. Raises CacheCorrupt for a damaged table, without
    which no record can be decoded, and MissingDependency where this zarr cannot decode what was
    written.
    """
    # Before any shard, none of which is damaged where a table is.
    cache.coder()
    faults: list[Fault] = []
    parts: dict[int, list[tuple[I64, Records]]] = {}
    done = 0
    for view, shard in cache.shards():
        done += cache.num_rows(shard)
        records = _read_shard(cache, view, shard)
        if isinstance(records, Fault):
            faults.append(records)
        elif view in wanted:
            start, stop = cache.shard_range(shard)
            rows = wanted[view][(wanted[view] >= start) & (wanted[view] < stop)]
            if len(rows):
                parts.setdefault(view, []).append((rows, records[rows - start]))
        progress(done)
    picked = []
    for view, some in parts.items():
        rows = np.concatenate([rows for rows, _ in some])
        picked.append(Picked(view, rows, Records.concatenate([records for _, records in some])))
    return faults, picked


def delete_damaged(cache: LogitCache, faults: list[Fault]) -> list[Fault]:
    """Delete the damaged shards among the faulty ones; which these are."""
    damaged = [fault for fault in faults if fault.kind == "damaged"]
    for fault in damaged:
        cache.delete_shard(fault.view, fault.shard)
    return damaged


def _read_shard(cache: LogitCache, view: int, shard: int) -> Records | Fault:
    try:
        records = cache.read_shard(view, shard)
    except CacheIncomplete:
        return Fault(view, shard, "missing", "it is not there")
    except CacheCorrupt:
        return Fault(view, shard, "damaged", "it is not what was written at this place")
    except StorageError as error:
        # Never deleted: the store may give the same object at the next try.
        return Fault(view, shard, "unreadable", str(error))
    try:
        cache.decode(records)
    except CacheCorrupt as error:
        return Fault(view, shard, "damaged", str(error))
    return records
