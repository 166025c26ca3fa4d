"""A loader and a cache, joined and checked to belong together: batches with their targets."""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.cache.cache import LogitCache
from kdcache.data.loader import Loader, render_digest
from kdcache.teacher.targets import CachedTargets, FixedTargets


class CachedLoader:
    """(batch, target) pairs, for any training loop.

        for epoch in range(epochs):
            batches.loader.view = epoch
            for batch, target in batches:
                loss = distillation_loss(student(batch.images_BCHW.float()), target)

    loader   plays the student's views; epoch e of a cache with V views is view e mod V
    cache    complete, of the loader's data, and in view order also of its views

    `batch` and `target` have a method `to(device)`, so they pass through Lightning and accelerate.

    Raises CacheMismatch where the cache was made from other data, other views, another seed or
    another JPEG decoder, CacheIncomplete where it lacks a shard, UsageError where a cache in
    dataset order meets mixed views.
    """

    def __init__(self, loader: Loader, cache: LogitCache) -> None:
        self.loader = loader
        self.cache = cache
        dataset, spec = loader.dataset, loader.spec
        self._targets: TargetSource
        if cache.spec.row_order == "view":
            self._targets = CachedTargets(cache, dataset.content_hash, spec)
            cache.require_same_rendering(render_digest(dataset, spec))
        else:
            self._targets = FixedTargets(cache, dataset.content_hash, spec)

    def __len__(self) -> int:
        """Batches of a view."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Batch, Target | TemperedTarget]]:
        """The pairs of the view `loader.view`, modulo the cache's where it is in view order."""
        view = self.loader.view
        if self.cache.spec.row_order == "view":
            view %= self.cache.spec.num_views
        for batch in self.loader.batches(view):
            yield batch, self._targets(batch)
