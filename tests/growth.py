"""Helpers for tests of a cache that gets more views: small caches of digits, and kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kdcache.cache import verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import FolderStore, ObjectStore, Store, open_store
from kdcache.data.beton import Dataset
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.views.spec import ViewSpec
from tests.conftest import cache_spec

VIEW = ViewSpec(8, min_scale=0.5, seed=3)
OLD, NEW = 3, 6
WRITES = ("write_new", "replace")


class Killed(BaseException):
    """Not a KDCacheError: nothing is cleaned up, as after SIGKILL."""


def spec_of(data: Dataset, teacher: Classifier, num_views: int, **fields: Any) -> CacheSpec:
    return cache_spec(data, teacher, VIEW, **{"num_views": num_views, "dtype": "float32", **fields})


def record(
    data: Dataset, teacher: Classifier, out: object, num_views: int, **options: Any
) -> LogitCache:
    """`precompute` of so many views, in batches and threads that are always the same."""
    spec = spec_of(data, teacher, num_views)
    return precompute(data, teacher, spec, str(out), batch_size=16, workers=1, **options)


def objects(url: object) -> dict[str, bytes | None]:
    store = open_store(str(url))
    return {key: store.read(key) for key in store.sizes()}


def of_shards(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Of some objects, those of shards."""
    return {key: data for key, data in found.items() if not key.endswith("zarr.json")}


def columns(cache: LogitCache, num_views: int) -> dict[str, np.ndarray[Any, Any]]:
    """The records of the first views, as arrays [num_views, num_samples, width]."""
    views = [cache[view].columns for view in range(num_views)]
    return {name: np.stack([view[name] for view in views]) for name in views[0]}


def require_readable(url: object, expected: LogitCache, *, sizes: tuple[int, ...]) -> int:
    """Open a cache as a reader: all its views are complete and equal to the expected ones."""
    cache = LogitCache.open(str(url))
    num_views = cache.spec.num_views
    assert num_views in sizes
    assert cache.manifest.identity == expected.manifest.identity
    assert cache.missing() == []
    assert verify.read(cache, {})[0] == []
    for view in range(num_views):
        ours, theirs = cache[view].columns, expected[view].columns
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    return num_views


@contextmanager
def before_writes(action: Callable[[int, Store, str], None]) -> Iterator[list[str]]:
    """Call `action(number, store, key)` before each write of any store; gives the keys so far."""
    keys: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (FolderStore, ObjectStore):
            for name in WRITES:
                patch.setattr(kind, name, _noted(getattr(kind, name), action, keys))
        yield keys


def _noted(
    write: Callable[..., Any], action: Callable[[int, Store, str], None], keys: list[str]
) -> Callable[..., Any]:
    def noted(store: Store, key: str, *data: bytes) -> Any:
        keys.append(key)
        action(len(keys) - 1, store, key)
        return write(store, key, *data)

    return noted


def kill_before(number: int) -> Callable[[int, Store, str], None]:
    """For `before_writes`: no write from this one on takes place."""

    def action(current: int, store: Store, key: str) -> None:
        if current >= number:
            raise Killed

    return action
