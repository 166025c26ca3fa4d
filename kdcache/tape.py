"""The tape: a Zarr store of records in position order, view after view.

In: `Records` of one shard of one view at a time. Out: the records of any run of positions. What
stays true: the manifest is written first and says what the tape is; a shard counts once all of its
objects lie in the store under their final names; inner chunks carry a CRC-32C; nothing is written
to or read from a tape whose spec is another.

    logits   [V, N, K]  float32, float16 or uint8    relative to the record's largest
    classes  [V, N, K]  uint16 or uint32             sparse tapes only
    tail     [V, N, 3]  float16 or float32           sparse tapes only

Cost: reading decompresses each inner chunk once when positions are read in order.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
import zarr.errors

from kdcache import codec
from kdcache.codec import Records
from kdcache.errors import StorageError, TapeCorrupt, TapeIncomplete, TapeMismatch, UsageError
from kdcache.spec import TapeSpec, ViewSpec, differences, digest

KEY = "kdcache"
CHUNK_BYTES = 1 << 18
SHARD_BYTES = 1 << 24


@dataclass(frozen=True)
class Layout:
    """Rows of an inner chunk, and of a shard: the unit of work and of commitment."""

    chunk_rows: int
    shard_rows: int

    @staticmethod
    def of(spec: TapeSpec) -> Layout:
        """About 256 KiB of records in a chunk and 16 MiB in a shard, in whole pairs."""
        row = codec.spec_record_bytes(spec)
        chunk = 2
        while chunk < spec.samples and chunk * row < CHUNK_BYTES:
            chunk *= 2
        shards = max(1, min(SHARD_BYTES // (chunk * row), -(-spec.samples // chunk)))
        return Layout(chunk, chunk * shards)


class Tape:
    """A tape that exists. Make one with `create`, or `open` it."""

    def __init__(self, path: Path, spec: TapeSpec, info: dict[str, Any], group: zarr.Group) -> None:
        self.path = path
        self.spec = spec
        self.info = info
        self.layout = Layout.of(spec)
        self._group = group

    @staticmethod
    def create(path: Path, spec: TapeSpec, info: dict[str, Any]) -> Tape:
        """Open the tape of this spec for writing, making it first where there is none.

        `info` is what may differ between equal tapes: teacher's name, software, device. Raises
        UsageError where something else lies at the path, TapeMismatch where another tape does.
        """
        if path.exists() and (path.is_file() or any(path.iterdir())):
            tape = Tape.open(path)
            tape.require(spec)
            return tape
        try:
            _create_arrays(path, spec, info)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        return Tape.open(path)

    @staticmethod
    def open(path: Path) -> Tape:
        """The tape at the path. Raises UsageError for none, TapeCorrupt for a bad manifest."""
        if not path.exists():
            raise UsageError(f"no tape at {path}: make one with `kdcache precompute`")
        try:
            group = zarr.open_group(path, mode="r+")
            manifest: Any = group.attrs[KEY]
        except (KeyError, ValueError, TypeError, OSError, zarr.errors.GroupNotFoundError):
            raise UsageError(f"{path} exists and is not a tape; choose another path") from None
        try:
            spec = TapeSpec.from_json(manifest["spec"])
            info = dict(manifest["info"])
            if manifest["digest"] != digest([spec.to_json(), info]):
                raise ValueError("its digest is not that of its contents")
            _check_arrays(group, spec)
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            line = f"the manifest of {path} is damaged ({error}): make the tape anew"
            raise TapeCorrupt(line) from error
        return Tape(path, spec, info, group)

    def require(self, spec: TapeSpec) -> None:
        """Raise TapeMismatch, naming each difference, unless this tape has exactly this spec."""
        different = differences(spec, self.spec)
        if different:
            raise TapeMismatch(
                f"{self.path} holds another tape ({'; '.join(different)}): choose another path, "
                "or the same options"
            )

    def require_plays(self, dataset: str, view: ViewSpec) -> None:
        """Raise TapeMismatch unless the tape is of this view spec and of the data's fingerprint."""
        if self.spec.dataset != dataset:
            raise TapeMismatch(
                f"{self.path} was made from other data ({self.spec.dataset}) than this "
                f"({dataset}): use the data it was made from, or precompute a tape for this"
            )
        different = differences(view, self.spec.view)
        if different:
            raise TapeMismatch(
                f"{self.path} holds other views ({'; '.join(different)}): in cached mode the view "
                "options come from the tape, so leave them out"
            )

    @property
    def shards_per_view(self) -> int:
        return -(-self.spec.samples // self.layout.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard."""
        start = shard * self.layout.shard_rows
        return start, min(start + self.layout.shard_rows, self.spec.samples)

    def rows(self, shard: int) -> int:
        start, stop = self.shard_range(shard)
        return stop - start

    def has(self, view: int, shard: int) -> bool:
        """Whether all objects of a shard are in the store. An empty one is what a crash left."""
        files = [self.path / name / f"c/{view}/{shard}/0" for name in _array_names(self.spec)]
        return all(file.is_file() and file.stat().st_size > 0 for file in files)

    def missing(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that are not on the tape yet, in order."""
        return [
            (v, s)
            for v in range(self.spec.views)
            for s in range(self.shards_per_view)
            if not self.has(v, s)
        ]

    def require_complete(self) -> None:
        missing = self.missing()
        if missing:
            view, shard = missing[0]
            raise TapeIncomplete(
                f"{self.path} lacks {len(missing)} of {self.spec.views * self.shards_per_view} "
                f"shards, the first is view {view} shard {shard}: run the same "
                "`kdcache precompute` again to finish it"
            )

    def write(self, view: int, shard: int, records: Records) -> None:
        """Put the records of one whole shard on the tape. Raises StorageError."""
        start, stop = self.shard_range(shard)
        assert len(records) == stop - start
        arrays = {"logits": records.logits, "classes": records.classes, "tail": records.tail}
        try:
            # Zarr would read what is there to merge it, and fail where that is damaged.
            self._discard(view, shard)
            for name in _array_names(self.spec):
                self._array(name)[view, start:stop] = arrays[name]
        except OSError as error:
            self._discard(view, shard)
            raise StorageError(
                f"cannot write view {view} of {self.path}: {error.strerror or error}; free space "
                "and run the same command again, finished shards are kept"
            ) from error

    def read(self, view: int, start: int, stop: int) -> Records:
        """Records of positions [start, stop) of a view.

        Raises TapeIncomplete for a shard that is not there and TapeCorrupt for one that is damaged.
        """
        rows = self.layout.shard_rows
        for shard in range(start // rows, -(-stop // rows)):
            if not self.has(view, shard):
                raise TapeIncomplete(f"{self.path} lacks view {view} shard {shard}")
        try:
            names = _array_names(self.spec)
            found = {name: np.asarray(self._array(name)[view, start:stop]) for name in names}
        except (
            ValueError, RuntimeError, OSError, KeyError, TypeError, ArithmeticError
        ) as error:  # fmt: skip
            raise TapeCorrupt(
                f"{self.path}: view {view}, positions {start} to {stop - 1}: a shard is damaged "
                f"({error}); delete {self.path / 'logits' / 'c' / str(view)} and precompute again"
            ) from error
        return Records(found["logits"], found.get("classes"), found.get("tail"))

    def stored_bytes(self) -> int:
        """Bytes of the tape's files."""
        sizes = []
        for file in self.path.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a precompute may be at work
                sizes.append(file.stat().st_size if file.is_file() else 0)
        return sum(sizes)

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def _discard(self, view: int, shard: int) -> None:
        for name in _array_names(self.spec):
            (self.path / name / f"c/{view}/{shard}/0").unlink(missing_ok=True)


def _array_names(spec: TapeSpec) -> tuple[str, ...]:
    return ("logits",) if spec.dense else ("logits", "classes", "tail")


def _columns(spec: TapeSpec) -> dict[str, tuple[int, np.dtype[Any]]]:
    """Width and type of each array."""
    columns = {
        "logits": (spec.top_k, np.dtype(spec.dtype)),
        "classes": (spec.top_k, codec.class_dtype(spec.classes)),
        "tail": (3, codec.tail_dtype(spec.dtype)),
    }
    return {name: columns[name] for name in _array_names(spec)}


def _check_arrays(group: zarr.Group, spec: TapeSpec) -> None:
    """Raise ValueError unless each array is what `_create_arrays` makes: zarr has no checksum for
    its metadata, and reads past the end of a shape are short without a word."""
    layout = Layout.of(spec)
    for name, (width, dtype) in _columns(spec).items():
        array = group[name]
        if not isinstance(array, zarr.Array):
            raise ValueError(f"{name} is not an array")
        found = array.shape, array.dtype, array.chunks, array.shards
        shape = (spec.views, spec.samples, width)
        if found != (shape, dtype, (1, layout.chunk_rows, width), (1, layout.shard_rows, width)):
            raise ValueError(f"{name} has another shape, type or layout than its spec")


def _create_arrays(path: Path, spec: TapeSpec, info: dict[str, Any]) -> None:
    """Write the tape's metadata beside the path and rename it, so that a tape is there or not."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    layout = Layout.of(spec)
    group = zarr.create_group(partial)
    manifest = {"spec": spec.to_json(), "info": info}
    group.attrs[KEY] = {**manifest, "digest": digest([spec.to_json(), info])}
    for name, (width, dtype) in _columns(spec).items():
        group.create_array(
            name,
            shape=(spec.views, spec.samples, width),
            chunks=(1, layout.chunk_rows, width),
            shards=(1, layout.shard_rows, width),
            dtype=dtype,
            fill_value=np.iinfo(dtype).max if dtype.kind == "u" else np.nan,
            compressors=[
                zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
                zarr.codecs.Crc32cCodec(),
            ],
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rmdir()
    partial.rename(path)
