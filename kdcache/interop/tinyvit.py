"""TinyViT's saved logits: a cache to a folder of them, and the reverse.

In: a cache, or a folder as TinyViT saves it (`tinyvit_reader.py`). Out: the other. What stays true:
at T = 1 both hold the same probabilities, to float16's rounding; an exported folder is there whole
or not at all; an import that was killed is finished by the same command. Cost: an import holds 4
bytes for each sample and, where it averages, for each epoch of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache import files
from kdcache.batch import Target
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Sampled, TopK, ValueType, bind, choose_codec
from kdcache.cache.records import Records, RecordsBuffer
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.errors import StorageError, UsageError
from kdcache.interop import tinyvit_reader
from kdcache.interop.tinyvit_reader import MAX_CLASSES, Rows, SavedLogits, record_dtype
from kdcache.losses.distillation import log_probabilities
from kdcache.paths import PathLike
from kdcache.views.order import view_order
from kdcache.views.philox import Purpose, draw

Progress = Callable[[int], None]

DEFAULT_TOP_K = 100  # TinyViT's own
# Half of the least number that float16 has: what a probability that rounded to 0 may have been.
LEAST = 2.0**-25
PIECE_VALUES = 1 << 23  # of all classes of some records, at once in memory


# --- out -------------------------------------------------------------------------------------


def exported_top_k(spec: CacheSpec, top_k: int | None) -> int:
    """The k to export. Raises UsageError for a cache, or a k, that TinyViT's layout cannot hold."""
    if isinstance(spec.codec, Sampled):
        raise UsageError("TinyViT's layout keeps the top k: it has no place for random draws")
    if spec.view_spec is not None and spec.view_spec.mixup:
        raise UsageError(
            f"the cache is of mixed pairs (mixup {spec.view_spec.mixup:g}), which TinyViT would "
            "not show its student: precompute a cache with --mixup 0"
        )
    if spec.num_classes > MAX_CLASSES:
        raise UsageError(
            f"TinyViT's int16 names at most {MAX_CLASSES} classes, the cache has {spec.num_classes}"
        )
    # TinyViT divides by the number of classes that are not named.
    named = spec.codec.num_named(spec.num_classes)
    most = min(named, spec.num_classes - 1)
    usual = DEFAULT_TOP_K if named == spec.num_classes else named
    k = min(usual, most) if top_k is None else top_k
    if not 1 <= k <= most:
        raise UsageError(f"top-k must be 1 to {most} for this cache, not {k}")
    return k


def export(
    cache: LogitCache, out: PathLike, top_k: int, progress: Progress = lambda rows: None
) -> int:
    """Write a folder for each view, of one rank; the bytes written.

    Records lie in the cache's order, which TinyViT does not mind: keys say which sample each one
    answers. The seed is what TinyViT's student draws its own view by: 31 bits, a function of (view
    seed, view, sample). Raises UsageError where `out` exists, CacheIncomplete, CacheCorrupt,
    StorageError.
    """
    cache.require_complete()
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists; choose another folder")
    written, lock = 0, out.with_name(out.name + files.LOCK)
    try:
        # Beside its place and renamed at the end, so that a folder is there whole or not at all.
        with files.hold(lock), files.replace_folder(out) as partial:
            for view in range(cache.spec.num_views):
                folder = partial / f"logits_top{top_k}_epoch{view}"
                folder.mkdir()
                with (folder / "rank0-keys.txt").open("wb") as keys:
                    with (folder / "rank0-values.bin").open("wb") as values:
                        for samples, rows in _exported(cache, view, top_k):
                            written += keys.write(b"".join(b"%d\n" % s for s in samples.tolist()))
                            written += values.write(rows.tobytes())
                            progress(
                                view * cache.spec.num_samples + int(values.tell()) // rows.itemsize
                            )
                        for file in (keys, values):
                            file.flush()
                            os.fsync(file.fileno())
    except files.Taken as taken:
        raise UsageError(
            f"another process exports to {out} ({taken}): wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    return written


def _exported(cache: LogitCache, view: int, top_k: int) -> Iterator[tuple[NDArray[np.int64], Rows]]:
    spec = cache.spec
    samples = np.arange(spec.num_samples)
    if spec.row_order == "view":
        assert spec.view_spec is not None
        samples = view_order(spec.view_spec, view, spec.num_samples)
    seed = spec.view_spec.seed if spec.view_spec else 0
    for shard in range(cache.shards_per_view):
        mine = samples[slice(*cache.shard_range(shard))]
        rows = np.zeros(len(mine), record_dtype(top_k))
        # 31 bits: TinyViT's field is an int32, and a seed is not negative.
        rows["seed"] = draw(seed, view, mine, Purpose.SEED)[0] >> np.uint64(1)
        target = cache.decode(cache.read_shard(view, shard))
        assert isinstance(target, Target)
        log_p_BK, place_Bk = log_probabilities(target)[0].topk(top_k, dim=1)
        classes = target.class_ids_BK
        rows["classes"] = place_Bk if classes is None else classes.gather(1, place_Bk)
        rows["values"] = log_p_BK.exp().half()
        yield mine, rows


# --- in -------------------------------------------------------------------------------------


def make_cache_spec(
    saved: SavedLogits, dataset: Dataset, *, dtype: ValueType = "float16", average: bool = False
) -> CacheSpec:
    """The spec of the cache of these answers: a view an epoch, or one of their mean."""
    epochs = len(saved.epochs)
    return CacheSpec(
        num_views=1 if average else epochs,
        num_samples=saved.num_samples,
        num_classes=saved.num_classes,
        codec=choose_codec(saved.num_classes, saved.top_k, dtype),
        dataset_hash=dataset.content_hash,
        teacher_hash=saved.digest,
        view_spec=None,
        row_order="dataset",
        num_averaged_views=epochs if average else 0,
        precision=None,
    )


def import_cache(
    saved: SavedLogits,
    dataset: Dataset,
    spec: CacheSpec,
    out: PathLike,
    progress: Progress = lambda rows: None,
) -> LogitCache:
    """Make or finish the cache of `spec` at `out`. Raises what `LogitCache` does."""
    numbers = [epoch.number for epoch in saved.epochs]
    metadata = {
        "teacher": f"TinyViT's saved logits, top {saved.top_k}",
        "class_names": list(dataset.class_names),
        "imported_from": str(saved.folder.resolve()),
        "epochs": numbers,
    }
    cache = LogitCache.create(out, spec, metadata)
    done = cache.spec.num_views * cache.spec.num_samples - sum(
        cache.num_rows(s) for _, s in cache.missing()
    )
    rows_of: dict[int, NDArray[np.int32]] = {}
    for view, shard in cache.missing():
        if not cache.lock_shard(view, shard):
            raise UsageError(f"another process writes to {out}: let it finish, or stop it")
        wanted = range(len(saved.epochs)) if spec.num_averaged_views else range(view, view + 1)
        # Only the epochs of this shard: a map takes 4 bytes for each sample.
        rows_of = {e: rows_of[e] for e in wanted if e in rows_of}
        for e in wanted:
            if e not in rows_of:
                rows_of[e] = tinyvit_reader.rows_of(saved.epochs[e], saved.places, dataset.path)
        buffer = RecordsBuffer(cache.num_rows(shard))
        for start, stop in _pieces(cache, shard):
            read = (tinyvit_reader.read(saved.epochs[e], rows_of[e][start:stop]) for e in wanted)
            buffer.append(
                _averaged(read, spec) if spec.num_averaged_views else _records(next(read), spec)
            )
            done += stop - start
            progress(done)
        cache.write(view, shard, buffer.records())
        cache.unlock_shard(view, shard)
    cache.add_views()
    cache.store.release_locks(whole=not cache.missing())
    return cache


def _pieces(cache: LogitCache, shard: int) -> Iterator[tuple[int, int]]:
    """Runs of samples of a shard that take little memory with all classes of each."""
    start, stop = cache.shard_range(shard)
    rows = max(1, PIECE_VALUES // cache.spec.num_classes)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


def _records(rows: Rows, spec: CacheSpec) -> Records:
    class_ids_BK, p_BK, rest_B = _named(rows, spec.num_classes)
    codec = spec.codec
    if not isinstance(codec, TopK):
        p_BC = _spread(class_ids_BK, p_BK, rest_B, spec.num_classes)
        logits_BC = torch.from_numpy(np.log(p_BC))
        return bind(codec, {}).encode(logits_BC, spec.rows(0, np.arange(len(p_BC))))
    left = spec.num_classes - p_BK.shape[1]
    # The tail is uniform, so its logits have a variance of 0.
    log_p_BK, log_rest_B = np.log(p_BK), np.log(rest_B)
    at_one_B = log_rest_B - log_p_BK[:, 0]
    tail_B3 = np.stack([at_one_B, at_one_B - math.log(left), np.zeros_like(at_one_B)], 1)
    return codec.pack(
        torch.from_numpy(log_p_BK - log_p_BK[:, :1]).float(),
        torch.from_numpy(class_ids_BK),
        torch.from_numpy(tail_B3).float(),
        spec.num_classes,
    )


def _averaged(epochs: Iterator[Rows], spec: CacheSpec) -> Records:
    total: Any = 0
    for rows in epochs:
        p_BC = _spread(*_named(rows, spec.num_classes), spec.num_classes)
        # Each epoch has the same weight, whatever float16 has made of its sum.
        total = total + p_BC / p_BC.sum(1, keepdims=True)
    mean_BC = torch.from_numpy(total / spec.num_averaged_views)
    return bind(spec.codec, {}).encode(mean_BC.log(), spec.rows(0, np.arange(len(mean_BC))))


def _named(
    rows: Rows, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Classes and probabilities of a record, falling, and what is left for all other classes.

    float16 makes 0 of small probabilities, and 1 or more of the sum: both get at least LEAST, half
    of float16's least number. Nor do the others get more than if each had as much as the last one
    named: what looks like more is rounding of the first.
    """
    # Stable: numbers that float16 has made equal keep TinyViT's order.
    falling = np.argsort(-rows["values"], 1, kind="stable")
    p_BK = np.take_along_axis(rows["values"], falling, 1).astype(np.float64)
    rest_B = 1 - p_BK.sum(1)
    p_BK = np.maximum(p_BK, LEAST)
    most_B = (num_classes - p_BK.shape[1]) * p_BK[:, -1]
    class_ids_BK = np.take_along_axis(rows["classes"], falling, 1).astype(np.int64)
    return class_ids_BK, p_BK, np.minimum(np.maximum(rest_B, LEAST), most_B)


def _spread(
    class_ids_BK: NDArray[np.int64],
    p_BK: NDArray[np.float64],
    rest_B: NDArray[np.float64],
    num_classes: int,
) -> NDArray[np.float64]:
    """Probabilities of all classes [B, C]: TinyViT's reading, an equal share for each other one."""
    share_B = rest_B / max(1, num_classes - p_BK.shape[1])
    p_BC = np.repeat(share_B[:, None], num_classes, 1)
    np.put_along_axis(p_BC, class_ids_BK, p_BK, 1)
    return p_BC
