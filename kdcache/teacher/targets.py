"""Where a batch's targets come from: the live teacher, the cache, or the labels.

Each class is a `TargetSource`. Online and cached agree: the same teacher logits give the same
target to the bit when the cache keeps all of them as float32. On a GPU no batch waits for the
device: a teacher's NaN is then found in the loss, which it makes NaN.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from kdcache.batch import Batch, Target, TemperedTarget, dense_target
from kdcache.cache.cache import LogitCache
from kdcache.cache.records import Records
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.losses.labels import label_target
from kdcache.models.classifier import Teacher
from kdcache.teacher.logits import mean_teacher_log_probabilities, teacher_logits
from kdcache.views.spec import ViewSpec


class OnlineTargets:
    """Runs the teacher on the batch's images for it. On the CPU a call raises NonFinite."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._wait = teacher.device.type == "cpu"

    def __call__(self, batch: Batch) -> Target:
        # On the CPU the check waits for nothing, and it names the sample.
        return dense_target(teacher_logits(self.teacher, batch, wait=self._wait))


class AverageTargets:
    """Runs the teacher on the first views of each sample, and averages its probabilities.

    The paper's fix/ic_ens, live: as many forward passes for each image of each epoch. A cache with
    averaged views costs them once, and gives these targets.
    """

    def __init__(
        self,
        teacher: Teacher,
        dataset: Dataset,
        view: ViewSpec,
        num_averaged_views: int,
        batch_size: int,
        *,
        workers: int | None = None,
    ) -> None:
        self.teacher = teacher
        self.num_averaged_views = num_averaged_views
        self._wait = teacher.device.type == "cpu"
        self._loader = Loader(dataset, view, batch_size, workers=workers, device=teacher.device)

    def __call__(self, batch: Batch) -> Target:
        return dense_target(
            mean_teacher_log_probabilities(
                self._loader,
                self.teacher,
                self.num_averaged_views,
                batch.sample_ids_B,
                wait=self._wait,
            )
        )


class CachedTargets:
    """Reads a cache in position order. A thread reads ahead by one shard.

    resized    the student's views may have another size than the teacher's
    waited_s   seconds that batches have waited for the disk or the store so far

    Raises CacheMismatch unless the cache was made of this view spec and of the data with this
    content_hash, CacheIncomplete when it lacks a shard.
    """

    def __init__(
        self, cache: LogitCache, content_hash: str, view: ViewSpec, *, resized: bool = False
    ) -> None:
        if cache.spec.row_order != "view":
            raise UsageError(f"{cache.url} is in dataset order: use FixedTargets")
        cache.require_compatible(content_hash, view, resized=resized)
        cache.require_complete()
        self.cache = cache
        self.waited_s = 0.0
        self._shards: dict[tuple[int, int], Future[Records]] = {}
        self._reader = ThreadPoolExecutor(1, "kdcache-cache")
        # The first read overlaps with whatever comes before the first batch.
        self._shards[0, 0] = self._start((0, 0))

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        """Raises CacheCorrupt or CacheIncomplete, naming the view and the shard."""
        rows = self.cache.manifest.layout.shard_rows
        numbers = batch.positions_B // rows
        wanted = [(batch.view, int(s)) for s in np.unique(numbers)]
        # The shards in use and the next one; all others are dropped here.
        keys = [*wanted, self._after(wanted[-1])]
        self._shards = {key: self._shards.get(key) or self._start(key) for key in keys}
        start = time.perf_counter()
        found = {s: self._shards[view, s].result() for view, s in wanted}
        self.waited_s += time.perf_counter() - start
        parts = [found[s][batch.positions_B[numbers == s] - s * rows] for _, s in wanted]
        records = Records.concatenate(parts)
        if (np.diff(numbers) < 0).any():
            # The parts are in order of shards: back into the batch's.
            records = records[np.argsort(np.argsort(numbers, kind="stable"))]
        return _decoded(self.cache, batch, records)

    def _start(self, key: tuple[int, int]) -> Future[Records]:
        return self._reader.submit(self.cache.read_shard, *key)

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        view, shard = key
        if shard + 1 < self.cache.shards_per_view:
            return view, shard + 1
        # The next epoch's first shard, which for the last view is the first view's.
        return (view + 1) % self.cache.spec.num_views, 0


class FixedTargets:
    """Reads a cache in dataset order: the record of a sample, whatever view of it the student sees.

    Epoch v of training gets view v of the cache (modulo its views): with one view this is the
    paper's fixed teacher, with more its independent noise. A view of the cache is held in memory.
    Raises UsageError where the student's views are mixed, CacheMismatch unless the cache is of the
    data with this content_hash, CacheIncomplete when it lacks a shard.
    """

    def __init__(self, cache: LogitCache, content_hash: str, view: ViewSpec) -> None:
        if view.mixup:
            raise UsageError(f"{cache.url} holds records of single images: train with --mixup 0")
        cache.require_compatible(content_hash, view)
        cache.require_complete()
        self.cache = cache
        self._view: tuple[int, Records] | None = None

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        """Raises CacheCorrupt or CacheIncomplete, naming the view and the shard."""
        view = batch.view % self.cache.spec.num_views
        if self._view is None or self._view[0] != view:
            self._view = view, self.cache[view]
        return _decoded(self.cache, batch, self._view[1][batch.sample_ids_B])


def _decoded(cache: LogitCache, batch: Batch, records: Records) -> Target | TemperedTarget:
    try:
        return cache.decode(records, batch.images_BCHW.device)
    except CacheCorrupt as error:
        at = f"{batch.positions_B.min()} to {batch.positions_B.max()}"
        raise CacheCorrupt(f"{cache.url}: view {batch.view}, positions {at}: {error}") from error


class LabelTargets:
    """The ground truth, mixed as the pixels are: at most two classes with mass."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, batch: Batch) -> Target:
        return label_target(batch, self.num_classes)
