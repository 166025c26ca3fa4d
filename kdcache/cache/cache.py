"""The logit cache: records in a store, view after view, that cannot be changed unnoticed.

In: `Records` of one shard of one view at a time. Out: the records of any run of rows. What stays
true: the manifest comes first and says what the cache is; a shard counts once its checksums lie in
the store, and they come last; no byte reaches a reader that is not the one written for this cache,
this view and this place; nothing is written to or read from a cache of another spec; views that are
being added change nothing for a reader until all of them are complete.

    cache = LogitCache.open("cache.zarr")         # or s3://bucket/cache.zarr
    cache[2, 100:200]                             # records, as they are stored
    cache.target(2, positions, temperature=4.0)   # log-probabilities for a loss

The format is in docs/cache-format.md. Cost: reading in order reads and hashes each object once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from kdcache.batch import Target, TemperedTarget
from kdcache.cache import layout as layouts
from kdcache.cache.codecs import RecordCoder, bind
from kdcache.cache.growth import ANOTHER_PATH, finish_growth, grow
from kdcache.cache.layout import GROUP, SEALS
from kdcache.cache.manifest import Manifest, load_manifest, read_tables
from kdcache.cache.records import NO_TABLES, Records, Tables
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import Store, open_store, write_once
from kdcache.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMismatch,
    MissingDependency,
    StorageConflict,
    StorageError,
    UsageError,
)
from kdcache.losses.distillation import temper
from kdcache.paths import PathLike
from kdcache.spec import differences
from kdcache.views.spec import ViewSpec


class LogitCache:
    """A cache that exists. Make one with `create`, or `open` it.

    store        where its objects are
    manifest     what is stored about it; its spec, while views are being added, with these
    url          of its methods: a folder, or s3://bucket/prefix and whatever else fsspec supports
    view, shard  of its methods: numbers from 0; a shard is a run of rows of one view
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.url = store.url
        self.manifest = manifest
        self._stored = manifest  # without the views that are being added
        self._command = "`kdcache precompute`" if manifest.spec.view_spec else "`kdcache import`"
        self._recent: tuple[tuple[int, int], Records] | None = None
        self._coders: dict[torch.device, RecordCoder] = {}

    @property
    def spec(self) -> CacheSpec:
        return self.manifest.spec

    @property
    def metadata(self) -> dict[str, Any]:
        """What may differ between equal caches: teacher's name, software, device."""
        return self.manifest.metadata

    @property
    def render_digest(self) -> str | None:
        """Of some rendered views, where the cache was made."""
        return self.manifest.render_digest

    @property
    def num_stored_views(self) -> int:
        """Views that readers see; fewer than `spec.num_views` while views are being added."""
        return self._stored.spec.num_views

    @staticmethod
    def create(
        url: PathLike,
        spec: CacheSpec,
        metadata: dict[str, Any],
        render_digest: str | None = None,
        tables: Tables = NO_TABLES,
    ) -> LogitCache:
        """Open the cache of this spec for writing, making it first where there is none.

        A cache with fewer views gets more: see `add_views`. One with more keeps them.

        metadata, render_digest   as in `Manifest`
        tables                    what a calibrated record codec's `fit` gave; those of a cache that
                                  is there stay

        Raises UsageError where something else lies at the place, CacheMismatch where another cache
        does.
        """
        store = open_store(url)
        if store.read(GROUP) is None:
            manifest, table_objects = Manifest.of(spec, metadata, render_digest, tables)
            objects = {**manifest.zarr_json, **table_objects}
            # What a killed creation left, or another process is creating, is no obstacle.
            foreign = store.sizes().keys() - objects.keys() or Path(store.url).is_file()
            if foreign and store.read(GROUP) is None:
                raise UsageError(f"{store.url} exists and is not a cache; {ANOTHER_PATH}")
            store.create(objects, last=GROUP)
        cache = LogitCache(store, load_manifest(store, ANOTHER_PATH))
        cache.require(spec)
        cache.require_same_rendering(render_digest)
        cache.manifest = cache._stored = finish_growth(store, cache._stored)
        if spec.num_views > cache.spec.num_views:
            cache.manifest = cache.manifest.grown(spec.num_views)
        return cache

    @staticmethod
    def exists(url: PathLike) -> bool:
        """Whether a cache, or another Zarr group, is there. Raises StorageError."""
        return open_store(url).read(GROUP) is not None

    @staticmethod
    def open(url: PathLike) -> LogitCache:
        """The cache at a path or URL. Raises UsageError for none, CacheCorrupt for damage."""
        store = open_store(url)
        return LogitCache(store, load_manifest(store))

    def require(self, spec: CacheSpec) -> None:
        """Raise CacheMismatch, naming each difference, unless records of `spec` belong here."""
        own = replace(self.spec, num_views=spec.num_views)
        # A cache of version 1 that does not say its precision accepts any.
        if own.precision is None:
            own = replace(own, precision=spec.precision)
        different = differences(spec, own)
        if different:
            raise CacheMismatch(
                f"{self.url} is a different cache ({'; '.join(different)}): {ANOTHER_PATH}, or the "
                "same options"
            )

    def require_same_rendering(self, render_digest: str | None) -> None:
        """Raise CacheMismatch if views are rendered otherwise here than where it was made.

        render_digest   of some views as rendered here; None: nothing is compared
        """
        own = self.render_digest
        if render_digest and own and render_digest != own:
            raise CacheMismatch(
                f"{self.url} was rendered differently ({own}) than the same views are here "
                f"({render_digest}): the JPEG decoder or kdcache's version differs; recreate the "
                "cache here"
            )

    def require_compatible(
        self, dataset_hash: str, view_spec: ViewSpec | None, *, resized: bool = False
    ) -> None:
        """Raise CacheMismatch unless the cache is of this data and, in view order, of these views.

        dataset_hash  of the data in use: `Dataset.content_hash`
        view_spec     of the views in use; None for an imported cache's
        resized       the views may have another size: the student's boxes, pairs and order are
                      still the teacher's
        """
        if self.spec.dataset_hash != dataset_hash:
            raise CacheMismatch(
                f"{self.url} was made from other data ({self.spec.dataset_hash}) than this "
                f"({dataset_hash}): use the data it was made from, or precompute a cache for this"
            )
        if self.spec.row_order != "view":
            return
        if resized and view_spec is not None and self.spec.view_spec is not None:
            view_spec = replace(view_spec, size_px=self.spec.view_spec.size_px)
        different = differences(view_spec, self.spec.view_spec)
        if different:
            raise CacheMismatch(
                f"{self.url} holds other views ({'; '.join(different)}): in cached mode the view "
                "options come from the cache, so leave them out"
            )

    @property
    def shards_per_view(self) -> int:
        return self.manifest.layout.shards(self.spec.num_samples)

    def shards(self) -> list[tuple[int, int]]:
        """Every (view, shard), in order."""
        return [(v, s) for v in range(self.spec.num_views) for s in range(self.shards_per_view)]

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.spec.codec.columns(self.spec.num_classes))

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard."""
        start = shard * self.manifest.layout.shard_rows
        return start, min(start + self.manifest.layout.shard_rows, self.spec.num_samples)

    def num_rows(self, shard: int) -> int:
        """Rows of a shard; the last one of a view may have fewer."""
        start, stop = self.shard_range(shard)
        return stop - start

    def has_shard(self, view: int, shard: int) -> bool:
        """Whether all objects of a shard are in the store."""
        return all(self.store.size(layouts.key(n, view, shard)) for n in (*self._names, SEALS))

    def missing(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs of which any object is not in the store, in order."""
        # One listing, where a size for each object would be a request each in an object store.
        sizes = self.store.sizes()
        names = (*self._names, SEALS)
        return [
            at for at in self.shards() if any(not sizes.get(layouts.key(n, *at)) for n in names)
        ]

    def require_complete(self) -> None:
        """Raise CacheIncomplete, naming the first shard that is missing, unless all are there."""
        missing = self.missing()
        if missing:
            view, shard = missing[0]
            raise CacheIncomplete(
                f"{self.url} lacks {len(missing)} of {len(self.shards())} "
                f"shards, the first is view {view} shard {shard}: run the same "
                f"{self._command} again to finish it"
            )

    def write(self, view: int, shard: int, records: Records) -> None:
        """Store the records of one whole shard, its checksums last.

        Nothing that is there is changed: equal objects are kept, for others StorageConflict is
        raised. Raises StorageError; neither leaves a part of these records. A shard that is there
        and damaged has to be deleted before.
        """
        start, stop = self.shard_range(shard)
        assert len(records) == stop - start
        objects = self.manifest.encode(view, start, records)
        placed = {layouts.key(name, view, shard): objects[name] for name in self._names}
        last = layouts.key(SEALS, view, shard)
        placed[last] = b"".join(self.manifest.seal(n, view, shard, objects[n]) for n in self._names)
        try:
            write_once(self.store, placed, last)
        except StorageConflict as error:
            raise StorageConflict(
                f"view {view} shard {shard}: {error}: another process with other results writes "
                "to this cache; let it finish, or give each its own --part, and run again"
            ) from error
        except StorageError as error:
            raise StorageError(
                f"view {view} shard {shard}: {error}; fix the storage and run the same command "
                "again, finished shards are kept"
            ) from error

    def add_views(self) -> None:
        """Make views that were being added part of the cache: `num_stored_views` is then all.

        Until this returns, every reader sees the cache as it was. Raises CacheIncomplete where one
        of the views lacks a shard, StorageConflict where another process adds other views,
        StorageError.
        """
        if self.num_stored_views >= self.spec.num_views:
            return
        self.require_complete()
        self._stored = grow(self.store, self._stored, self.manifest)

    def delete_shard(self, view: int, shard: int) -> None:
        """Remove a shard, its checksums first."""
        for name in (SEALS, *self._names):
            self.store.delete(layouts.key(name, view, shard))

    def lock_shard(self, view: int, shard: int) -> bool:
        """Whether this process may write the shard; False while another process does.

        What a killed process has left of it is deleted, so that other bytes can take its place. In
        a store without locks, this may delete what a live process with the same part puts just now;
        that process's shard is then missing, and not damaged, unless it pauses between two of its
        puts for as long as this one computes the shard.
        """
        if not self.store.lock_shard(view * self.shards_per_view + shard):
            return False
        if not self.has_shard(view, shard):
            self.delete_shard(view, shard)
        return True

    def unlock_shard(self, view: int, shard: int) -> None:
        """Let other processes write the shard."""
        self.store.unlock_shard(view * self.shards_per_view + shard)

    def read_shard(self, view: int, shard: int) -> Records:
        """All records of a shard.

        Raises CacheIncomplete for a shard that is not there, CacheCorrupt for one that is not what
        was written there, MissingDependency where Zarr or its codecs cannot read what was.
        """
        objects = {}
        for name in (SEALS, *self._names):
            data = self.store.read(layouts.key(name, view, shard))
            if not data:
                raise CacheIncomplete(
                    f"{self.url} lacks view {view} shard {shard} ({name}): run the same "
                    f"{self._command} again to finish it"
                )
            objects[name] = data
        seal = objects.pop(SEALS)
        start, stop = self.shard_range(shard)
        # Before decoding: no byte that is not the one written reaches Zarr's codecs.
        if seal != b"".join(self.manifest.seal(n, view, shard, objects[n]) for n in self._names):
            raise CacheCorrupt(
                f"{self.url}: view {view} shard {shard} (positions {start} to {stop - 1}) is "
                "damaged, or is of another place or cache: `kdcache verify --delete-damaged` "
                f"removes it, then run the same {self._command} again"
            )
        placed = {layouts.key(name, view, shard): data for name, data in objects.items()}
        try:
            return layouts.decode(self.manifest.zarr_json, view, start, stop, placed)
        except layouts.DECODE_ERRORS as error:
            raise MissingDependency(
                f"{self.url}: view {view} shard {shard} is as it was written, and cannot be "
                f"decoded here ({error}): install the zarr and numcodecs that made it"
            ) from error

    def read(self, view: int, start: int, stop: int) -> Records:
        """Records of positions [start, stop) of a view; raises what `read_shard` does."""
        rows = self.manifest.layout.shard_rows
        parts = []
        for shard in range(start // rows, max(-(-stop // rows), start // rows + 1)):
            if self._recent is None or self._recent[0] != (view, shard):
                self._recent = (view, shard), self.read_shard(view, shard)
            first = shard * rows
            parts.append(self._recent[1][slice(max(start - first, 0), max(stop - first, 0))])
        return Records.concatenate(parts)

    def __getitem__(self, place: int | tuple[int, int | slice]) -> Records:
        """cache[view], cache[view, row] or cache[view, start:stop]; IndexError beyond the end."""
        view, rows = place if isinstance(place, tuple) else (place, slice(None))
        if not -self.spec.num_views <= view < self.spec.num_views:
            raise IndexError(f"the cache has views 0 to {self.spec.num_views - 1}, not {view}")
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.spec.num_samples)
            if step != 1:
                raise IndexError("a cache is read in order: the step must be 1")
        else:
            start = range(self.spec.num_samples)[rows]
            stop = start + 1
        return self.read(view % self.spec.num_views, start, max(start, stop))

    def __iter__(self) -> Iterator[tuple[int, int, Records]]:
        """(view, first position, records) of every shard, in order."""
        shards = self.shards()
        yield from ((v, self.shard_range(s)[0], self.read_shard(v, s)) for v, s in shards)

    def coder(self, device: torch.device | str = "cpu") -> RecordCoder:
        """Converts records, to targets on this device. Raises CacheCorrupt for a damaged table."""
        device = torch.device(device)
        if device not in self._coders:
            tables = read_tables(self.store, self.manifest)
            self._coders[device] = bind(self.spec.codec, tables, device)
        return self._coders[device]

    def decode(
        self, records: Records, device: torch.device | str = "cpu"
    ) -> Target | TemperedTarget:
        """Targets, on this device, of records. Raises CacheCorrupt for impossible ones."""
        return self.coder(device).decode(records, self.spec.num_classes).to(device)

    def target(
        self, view: int, positions: ArrayLike, temperature: float | None = None
    ) -> TemperedTarget:
        """Log-probabilities at T of the teacher's softmax for these rows of a view.

        view         0 to num_views - 1
        positions    of the view, or sample ids where rows are in dataset order; any shape
        temperature  T; None: 1, or that of the draws

        Raises UsageError for a temperature at which the records have no targets.
        """
        places = np.asarray(positions, np.int64).reshape(-1)
        order = np.argsort(places, kind="stable")  # so that each shard is read once
        parts = [self[view, int(p)] for p in places[order]] or [self[view, 0:0]]
        target = self.decode(Records.concatenate(parts)[np.argsort(order)])
        if isinstance(target, TemperedTarget):
            if temperature not in (None, target.temperature):
                raise UsageError(
                    f"{self.url} holds draws at T = {target.temperature:g}, not {temperature:g}"
                )
            return target
        T = 1.0 if temperature is None else temperature
        self.spec.codec.require_temperature(T)
        return temper(target, T)

    def stored_bytes(self) -> int:
        """Bytes of the cache's objects."""
        return sum(self.store.sizes().values())
