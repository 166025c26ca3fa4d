"""Record a teacher's logits: loader, teacher, record codec, cache.

In: a dataset, a frozen teacher, the spec of a cache. Out: a complete cache. What stays true: a
shard is written once it is whole; run again, it does the shards that are missing and no others;
several processes, on one machine or many, do each shard once and give the bytes that one would;
views that are added to a cache become part of it once all of them are complete. Cost: the
teacher's forward pass; records of one shard are held, and written while the next runs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import CalibratedCodec, CodecSpec
from kdcache.cache.fidelity import LiveError, fidelity_to_json
from kdcache.cache.records import Records, RecordsBuffer
from kdcache.cache.setting import cache_setting_name
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader, render_digest
from kdcache.errors import UsageError
from kdcache.models.classifier import Teacher
from kdcache.paths import PathLike
from kdcache.teacher.calibration import RecordChoice, calibrate, measure_codec
from kdcache.teacher.logits import iter_teacher_logits
from kdcache.views.settings import RowOrder
from kdcache.views.spec import ViewSpec
from kdcache.waiting import DEFAULT_TIMEOUT_S, Wait

Progress = Callable[[int], None]
HELD = "end the process that is to write them, and run the same command again"


def make_cache_spec(
    dataset: Dataset,
    teacher: Teacher,
    view_spec: ViewSpec,
    codec: CodecSpec,
    *,
    num_views: int = 1,
    row_order: RowOrder = "view",
    num_averaged_views: int = 0,
) -> CacheSpec:
    """The spec of a cache of this teacher's logits for a dataset.

    view_spec, codec, num_views, row_order, num_averaged_views   as in `CacheSpec`
    """
    return CacheSpec(
        num_views=num_views,
        num_samples=len(dataset),
        num_classes=teacher.num_classes or len(dataset.class_names),
        codec=codec,
        dataset_hash=dataset.content_hash,
        teacher_hash=teacher.content_hash(),
        view_spec=view_spec,
        row_order=row_order,
        num_averaged_views=num_averaged_views,
        precision=teacher.precision,
    )


def precompute(
    dataset: Dataset,
    teacher: Teacher,
    spec: CacheSpec,
    out: PathLike,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    class_names: Sequence[str] | None = None,
    choice: RecordChoice | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    error: LiveError | None = None,
    on_start: Callable[[LogitCache], None] = lambda cache: None,
    progress: Progress = lambda rows: None,
) -> LogitCache:
    """Make, finish or extend the cache of `spec` at `out`.

    A cache that is there with fewer views than `spec` gets the others.

    dataset, teacher   those that `spec` was made of

    batch_size    images in a forward pass of the teacher
    workers       threads that decode; None: half of the cores for a teacher on the CPU, else all
    part          (i, n): only the i-th of n equal runs of shards, i from 0. Without it, processes
                  that work on one cache in a folder share its shards among them as they come.
    class_names   of the teacher's classes where the data is of another domain; empty where they
                  are not known. None: the data's.
    choice        of the spec's codec, as `calibration.py` measured it; None: a codec that needs
                  tables is calibrated here. A cache that is there keeps its tables.
    timeout_s     how long to wait for shards that other processes hold, while none comes
    error         gets the divergence of some records of each batch from the live logits
    on_start      is called with the cache before the first record; its `num_stored_views` are then
                  those that it had
    progress      is called with the number of rows done so far

    A shard's bytes depend on the batch size and on what the teacher's arithmetic depends on (the
    device, torch, its number of threads, so OMP_NUM_THREADS, which torchrun sets to 1), not on who
    computes it, when, or after what: where these are equal, any division of the work gives equal
    bytes. Raises NonFinite when the teacher gives NaN or infinity, TimedOut, and what `LogitCache`
    and `Loader` raise.
    """
    assert spec.view_spec is not None
    i, n = part
    if not 0 <= i < n:
        raise UsageError(f"part must be from 1/{n} to {n}/{n}, not {i + 1}/{n}")
    names = dataset.class_names if class_names is None else class_names
    metadata = {
        **_metadata(teacher, batch_size, names),
        "setting": cache_setting_name(spec),
        "unlabeled": class_names is not None,
    }
    # Before the first record: a cache of another JPEG decoder's pixels is refused at once.
    digest = render_digest(dataset, spec.view_spec)
    loader = Loader(dataset, spec.view_spec, batch_size, workers=workers, device=teacher.device)
    if choice is None and isinstance(spec.codec, CalibratedCodec) and not LogitCache.exists(out):
        with loader:
            live = calibrate(loader, teacher, spec, spec.codec.num_calibration_records)
        choice = measure_codec(spec, live)
    if choice is not None:
        metadata["fidelity"] = fidelity_to_json(choice.fidelity)
    cache = LogitCache.create(out, spec, metadata, digest, choice.tables if choice else {})
    on_start(cache)
    mine = set(shards_of_part(cache, i, n))
    whole, left = False, len(mine)
    wait = Wait("shards that other processes hold", timeout_s, HELD)
    try:
        # One writer, so that at most one shard waits beside the one that is being made.
        with loader, ThreadPoolExecutor(1, "kdcache-writer") as writer:
            while True:
                # Looked up anew each round: other processes finish shards meanwhile.
                missing = cache.missing()
                todo = [place for place in missing if place in mine]
                done = sum(cache.num_rows(s) for _, s in mine) - sum(
                    cache.num_rows(s) for _, s in todo
                )
                progress(done)
                if not todo:
                    break
                if len(todo) < left:
                    left = len(todo)
                    wait.progressed()
                if _record(loader, teacher, cache, todo, writer, done, progress, error) == done:
                    wait.pause(f"{left} of {out}")  # other processes hold the rest, and may fail
        whole = not missing
        if whole:
            cache.add_views()
    finally:
        # Lock files stay while the work is not whole: another process may hold a byte of them.
        cache.store.release_locks(whole)
    return cache


def shards_of_part(cache: LogitCache, i: int, n: int) -> list[tuple[int, int]]:
    """The i-th of n equal runs of (view, shard) pairs; m runs of it are i * m ... of n * m.

    Of a cache that gets more views, a run of those that it had and one of those that it gets.
    """
    shards = cache.shards()
    old = cache.num_stored_views * cache.shards_per_view
    return [
        place
        for some in (shards[:old], shards[old:])
        for place in some[len(some) * i // n : len(some) * (i + 1) // n]
    ]


def wait_for_parts(
    cache: LogitCache, i: int, n: int, progress: Progress, timeout_s: float = DEFAULT_TIMEOUT_S
) -> None:
    """Return when the i-th of n runs of shards is in the cache, whoever puts it there.

    Raises TimedOut where none of it comes for so many seconds.
    """
    wanted = set(shards_of_part(cache, i, n))
    wait, left = Wait("the other processes' shards", timeout_s, HELD), len(wanted)
    while missing := wanted & set(cache.missing()):
        progress(sum(cache.num_rows(s) for _, s in wanted - missing))
        if len(missing) < left:
            left = len(missing)
            wait.progressed()
        wait.pause(f"{left} of {cache.url}")


def _record(
    loader: Loader,
    teacher: Teacher,
    cache: LogitCache,
    places: list[tuple[int, int]],
    writer: ThreadPoolExecutor,
    rows: int,
    progress: Progress,
    error: LiveError | None,
) -> int:
    """Compute what others do not hold, writing one shard as the next runs; `rows` done by then."""
    writing: Future[None] | None = None
    coder = cache.coder(teacher.device)
    for view, shard in places:
        if not cache.lock_shard(view, shard):
            continue
        if cache.has_shard(view, shard):  # another process was faster
            cache.unlock_shard(view, shard)
            continue
        buffer = RecordsBuffer(cache.num_rows(shard))
        # Batches begin at the shard's first row, so that its bytes do not depend on what ran
        # before.
        positions = np.arange(*cache.shard_range(shard))
        for rows_B, logits_BC in iter_teacher_logits(loader, teacher, cache.spec, view, positions):
            records = coder.encode(logits_BC, cache.spec.rows(view, rows_B))
            if error is not None:
                error.add(coder, records, logits_BC)
            buffer.append(records)
            rows += len(rows_B)
            progress(rows)
            if writing is not None and writing.done():
                writing.result()  # a write that failed ends the work at once
        if writing is not None:
            writing.result()
        writing = writer.submit(_write, cache, view, shard, buffer.records())
    if writing is not None:
        writing.result()
    return rows


def _write(cache: LogitCache, view: int, shard: int, records: Records) -> None:
    cache.write(view, shard, records)
    cache.unlock_shard(view, shard)


def _metadata(teacher: Teacher, batch_size: int, class_names: Sequence[str]) -> dict[str, object]:
    device = teacher.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "teacher": teacher.name,
        "class_names": list(class_names),
        "batch_size": batch_size,
        "precision": teacher.precision,
        "device": f"{device.type} ({name})",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
