"""The tape: records in a store, view after view, that cannot be changed unnoticed.

In: `Records` of one shard of one view at a time. Out: the records of any run of positions. What
stays true: the manifest comes first and says what the tape is; a shard counts once its seal lies
in the store, and the seal comes last; no byte reaches a reader that is not the one written for
this tape, this view and this place; nothing is written to or read from a tape of another spec.

    tape = Tape.open("tape.zarr")                 # or s3://bucket/tape.zarr
    tape[2, 100:200]                              # records, as they lie on the tape
    for view, start, records in tape: ...         # all of them, shard by shard
    tape.target(2, positions, temperature=4.0)    # log-probabilities for a loss

The format is in docs/tape-format.md. Cost: reading in order reads and hashes each object once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from kdcache.batch import Target, TemperedTarget
from kdcache.cache import layout as shards
from kdcache.cache.codecs import sampled, top_k
from kdcache.cache.layout import GROUP, Layout
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec, require_cache_version
from kdcache.cache.store import Store, open_store
from kdcache.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMismatch,
    MissingDependency,
    StorageError,
    UsageError,
)
from kdcache.losses.distillation import check_temperature, log_probabilities
from kdcache.spec import differences
from kdcache.views.spec import ViewSpec

KEY = "kdcache"
ANOTHER_PATH = "choose another path"
WHAT_IS_A_CACHE = "a tape is the folder that `kdcache precompute --out` or `kdcache import` made"
NO_DIGEST = "0" * 64


class LogitCache:
    """A tape that exists. Make one with `create`, or `open` it."""

    def __init__(
        self,
        store: Store,
        spec: CacheSpec,
        layout: Layout,
        info: dict[str, Any],
        pixels: str | None,
        zarr_json: dict[str, bytes],
    ) -> None:
        self.store = store
        self.url = store.url
        self.spec = spec
        self.layout = layout
        self.info = info
        self.pixels = pixels
        self._zarr_json = zarr_json
        self._names = tuple(shards.columns(spec))
        self._command = "`kdcache precompute`" if spec.view else "`kdcache import`"
        self._recent: tuple[tuple[int, int], Records] | None = None

    @staticmethod
    def create(
        url: str | Path, spec: CacheSpec, info: dict[str, Any], pixels: str | None = None
    ) -> LogitCache:
        """Open the tape of this spec for writing, making it first where there is none.

        `info` is what may differ between equal tapes: teacher's name, software, device. `pixels` is
        the digest of some rendered views (`loader.pixel_digest`). Raises UsageError where something
        else lies at the place, TapeMismatch where another tape does.
        """
        store = open_store(url)
        if store.read(GROUP) is None:
            objects = _manifest(spec, Layout.of(spec), info, pixels)
            # What a killed creation left, or another process is creating, is no obstacle.
            foreign = store.sizes().keys() - objects.keys() or Path(store.url).is_file()
            if foreign and store.read(GROUP) is None:
                raise UsageError(f"{store.url} exists and is not a tape; {ANOTHER_PATH}")
            store.create(objects, last=GROUP)
        tape = _open(store, ANOTHER_PATH)
        tape.require(spec)
        tape.require_pixels(pixels)
        return tape

    @staticmethod
    def open(url: str | Path) -> LogitCache:
        """The tape at a path or URL. Raises UsageError for none, TapeCorrupt for damage."""
        return _open(open_store(url), WHAT_IS_A_CACHE)

    def require(self, spec: CacheSpec) -> None:
        """Raise TapeMismatch, naming each difference, unless this tape has exactly this spec."""
        different = differences(spec, self.spec)
        if different:
            line = (
                f"{self.url} holds another tape ({'; '.join(different)}): {ANOTHER_PATH}, "
                "or the same options"
            )
            if spec.views != self.spec.views:
                line += "; a tape cannot grow: another number of views needs another path"
            raise CacheMismatch(line)

    def require_pixels(self, pixels: str | None) -> None:
        """Raise TapeMismatch if views are rendered otherwise here than where the tape was made."""
        if pixels and self.pixels and pixels != self.pixels:
            raise CacheMismatch(
                f"{self.url} was made from other pixels ({self.pixels}) than the same views have "
                f"here ({pixels}): another JPEG decoder or kdcache; precompute the tape here"
            )

    def require_plays(self, dataset: str, view: ViewSpec | None, *, resized: bool = False) -> None:
        """Raise TapeMismatch unless the tape is of this data and, if it plays views, of these.

        With `resized`, the views may have another size: the student's boxes, pairs and order are
        still the teacher's.
        """
        if self.spec.dataset != dataset:
            raise CacheMismatch(
                f"{self.url} was made from other data ({self.spec.dataset}) than this "
                f"({dataset}): use the data it was made from, or precompute a tape for this"
            )
        if resized and view is not None and self.spec.view is not None:
            view = replace(view, size_px=self.spec.view.size_px)
        different = differences(view, self.spec.view) if self.spec.order == "position" else None
        if different:
            raise CacheMismatch(
                f"{self.url} holds other views ({'; '.join(different)}): in cached mode the view "
                "options come from the tape, so leave them out"
            )

    @property
    def shards_per_view(self) -> int:
        return self.layout.shards(self.spec.samples)

    def places(self) -> list[tuple[int, int]]:
        """Every (view, shard), in order."""
        return [(v, s) for v in range(self.spec.views) for s in range(self.shards_per_view)]

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard."""
        start = shard * self.layout.shard_rows
        return start, min(start + self.layout.shard_rows, self.spec.samples)

    def rows(self, shard: int) -> int:
        start, stop = self.shard_range(shard)
        return stop - start

    def has(self, view: int, shard: int) -> bool:
        """Whether all objects of a shard are in the store."""
        return all(self.store.size(shards.key(n, view, shard)) for n in (*self._names, "seals"))

    def missing(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs of which any object is not in the store, in order."""
        sizes = self.store.sizes()
        names = (*self._names, "seals")
        return [at for at in self.places() if any(not sizes.get(shards.key(n, *at)) for n in names)]

    def require_complete(self) -> None:
        missing = self.missing()
        if missing:
            view, shard = missing[0]
            raise CacheIncomplete(
                f"{self.url} lacks {len(missing)} of {len(self.places())} "
                f"shards, the first is view {view} shard {shard}: run the same "
                f"{self._command} again to finish it"
            )

    def write(self, view: int, shard: int, records: Records) -> None:
        """Put the records of one whole shard on the tape, its seal last. Raises StorageError."""
        start, stop = self.shard_range(shard)
        assert len(records) == stop - start
        objects = shards.encode(self._zarr_json, view, start, records)
        seal = b"".join(self._seal(name, view, shard, objects[name]) for name in self._names)
        try:
            self.store.delete(shards.key("seals", view, shard))
            for name in self._names:
                self.store.write(shards.key(name, view, shard), objects[name])
            self.store.write(shards.key("seals", view, shard), seal)
        except StorageError as error:
            with contextlib.suppress(StorageError):
                self.discard(view, shard)
            raise StorageError(
                f"view {view} shard {shard}: {error}; mend that and run the same command again, "
                "finished shards are kept"
            ) from error

    def discard(self, view: int, shard: int) -> None:
        """Take a shard off the tape, the seal first."""
        for name in ("seals", *self._names):
            self.store.delete(shards.key(name, view, shard))

    def claim(self, view: int, shard: int) -> bool:
        """Whether this process may write the shard; False while another process does."""
        return self.store.claim(view * self.shards_per_view + shard)

    def release(self, view: int, shard: int) -> None:
        self.store.release(view * self.shards_per_view + shard)

    def read_shard(self, view: int, shard: int) -> Records:
        """All records of a shard.

        Raises TapeIncomplete for a shard that is not there, TapeCorrupt for one that is not what
        was written there, MissingDependency where Zarr or its codecs cannot read what was.
        """
        objects = {}
        for name in ("seals", *self._names):
            data = self.store.read(shards.key(name, view, shard))
            if not data:
                raise CacheIncomplete(
                    f"{self.url} lacks view {view} shard {shard} ({name}): run the same "
                    f"{self._command} again to finish it"
                )
            objects[name] = data
        seal = objects.pop("seals")
        start, stop = self.shard_range(shard)
        if seal != b"".join(self._seal(n, view, shard, objects[n]) for n in self._names):
            raise CacheCorrupt(
                f"{self.url}: view {view} shard {shard} (positions {start} to {stop - 1}) is "
                "damaged, or is of another place or tape: `kdcache verify --discard` takes it off "
                f"the tape, then run the same {self._command} again"
            )
        placed = {shards.key(name, view, shard): data for name, data in objects.items()}
        try:
            return shards.decode(self._zarr_json, view, start, stop, placed)
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise MissingDependency(
                f"{self.url}: view {view} shard {shard} is as it was written, and cannot be "
                f"decoded here ({error}): install the zarr and numcodecs that made it"
            ) from error

    def read(self, view: int, start: int, stop: int) -> Records:
        """Records of positions [start, stop) of a view; raises what `read_shard` does."""
        rows = self.layout.shard_rows
        parts = []
        for shard in range(start // rows, max(-(-stop // rows), start // rows + 1)):
            if self._recent is None or self._recent[0] != (view, shard):
                self._recent = (view, shard), self.read_shard(view, shard)
            first = shard * rows
            parts.append(self._recent[1][slice(max(start - first, 0), max(stop - first, 0))])
        return Records.concatenate(parts)

    def __getitem__(self, place: int | tuple[int, int | slice]) -> Records:
        """tape[view], tape[view, position] or tape[view, start:stop]; IndexError beyond the end."""
        view, rows = place if isinstance(place, tuple) else (place, slice(None))
        if not -self.spec.views <= view < self.spec.views:
            raise IndexError(f"the tape has views 0 to {self.spec.views - 1}, not {view}")
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.spec.samples)
            if step != 1:
                raise IndexError("a tape is read in order: the step must be 1")
        else:
            start = range(self.spec.samples)[rows]
            stop = start + 1
        return self.read(view % self.spec.views, start, max(start, stop))

    def __iter__(self) -> Iterator[tuple[int, int, Records]]:
        """(view, first position, records) of every shard, in order."""
        for view, shard in self.places():
            yield view, self.shard_range(shard)[0], self.read_shard(view, shard)

    def decode(self, records: Records) -> Target | TemperedTarget:
        """Targets of records of this tape. Raises TapeCorrupt for what no teacher can have said."""
        if self.spec.draws:
            return sampled.decode(
                records, self.spec.draws, self.spec.temperature, self.spec.classes
            )
        return top_k.decode(records, self.spec.classes)

    def target(
        self, view: int, positions: ArrayLike, temperature: float | None = None
    ) -> TemperedTarget:
        """Log-probabilities at T of the teacher's answers to these positions of a view.

        `temperature` is 1 by default, on a tape of draws that of the draws. Raises UsageError for a
        temperature that the tape does not serve.
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
        check_temperature(T, sparse=target.tail_B3 is not None)
        log_p_BK, log_tail_B = log_probabilities(target, T)
        classes_BK = target.classes_BK
        if classes_BK is None:
            classes_BK = torch.arange(target.num_classes).expand_as(log_p_BK)
        return TemperedTarget(log_p_BK, classes_BK, log_tail_B, T, target.num_classes)

    def stored_bytes(self) -> int:
        """Bytes of the tape's objects."""
        return sum(self.store.sizes().values())

    def _seal(self, name: str, view: int, shard: int, data: bytes) -> bytes:
        """SHA-256 of an object and of where it belongs."""
        place = f"kdcache {self.spec.digest} {name} {view} {shard}\n".encode()
        return hashlib.sha256(place + data).digest()


def _manifest(
    spec: CacheSpec, layout: Layout, info: dict[str, Any], pixels: str | None
) -> dict[str, bytes]:
    """Every zarr.json of a new tape. The group's holds the digests of the arrays', and its own."""
    arrays = shards.metadata(spec, layout, {})
    manifest = {
        "digest": NO_DIGEST,
        "spec": spec.to_json(),
        "layout": asdict(layout),
        "arrays": {
            name.partition("/")[0]: hashlib.sha256(text).hexdigest()
            for name, text in arrays.items()
            if name != GROUP
        },
        "pixels": pixels,
        "info": info,
    }
    objects = shards.metadata(spec, layout, {KEY: manifest})
    text = objects[GROUP]
    own = hashlib.sha256(text).hexdigest()
    return {**objects, GROUP: text.replace(NO_DIGEST.encode(), own.encode())}


def _open(store: Store, remedy: str) -> LogitCache:
    """`Tape.open`; the remedy is for something else at the place."""
    foreign = f"{store.url} exists and is not a tape; {remedy}"
    text = store.read(GROUP)
    if text is None:
        if store.sizes() or Path(store.url).is_file():
            raise UsageError(foreign)
        raise UsageError(f"no tape at {store.url}: make one with `kdcache precompute`")
    try:
        return _read_manifest(store, text)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if KEY.encode() not in text:
            raise UsageError(foreign) from None
        line = f"the manifest of {store.url} is damaged ({error}): make the tape anew"
        raise CacheCorrupt(line) from error


def _read_manifest(store: Store, text: bytes) -> LogitCache:
    """Raises UsageError for another version, ValueError and its like for anything else wrong."""
    manifest = json.loads(text)["attributes"][KEY]
    require_cache_version(manifest["spec"]["version"])
    own = manifest["digest"].encode()
    if hashlib.sha256(text.replace(own, NO_DIGEST.encode())).hexdigest().encode() != own:
        raise ValueError("its digest is not that of its contents")
    zarr_json = {GROUP: text}
    for name, expected in manifest["arrays"].items():
        key = f"{name}/{GROUP}"
        found = store.read(key)
        if found is None or hashlib.sha256(found).hexdigest() != expected:
            raise ValueError(f"{key} is {'missing' if found is None else 'not what was written'}")
        zarr_json[key] = found
    spec = CacheSpec.from_json(manifest["spec"])
    layout = Layout(**manifest["layout"])
    return LogitCache(store, spec, layout, manifest["info"], manifest["pixels"], zarr_json)
