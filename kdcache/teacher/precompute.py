"""Record a teacher's answers: loader → teacher → codec → tape.

In: a dataset, a frozen teacher, what the tape shall be. Out: a complete tape. What stays true: a
shard is written once it is whole; run again, it does the shards that are missing and no others;
several processes, on one machine or many, do each shard once and give the bytes that one would.
Cost: the teacher's forward pass; records of one shard are held, and written while the next runs.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import sampled
from kdcache.cache.codecs import top_k as codec
from kdcache.cache.records import Records, ValueType
from kdcache.cache.setting import cache_setting_name
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader, render_digest
from kdcache.errors import CacheMismatch, NonFinite, UsageError
from kdcache.models.classifier import LEAST_LOG_P, Teacher
from kdcache.views.order import view_positions
from kdcache.views.settings import RowOrder
from kdcache.views.spec import ViewSpec

Progress = Callable[[int], None]
WAIT_S = 1.0


def make_cache_spec(
    dataset: Dataset,
    teacher: Teacher,
    view: ViewSpec,
    *,
    views: int = 1,
    top_k: int | None = None,
    dtype: ValueType = "float16",
    order: RowOrder = "position",
    average: int = 0,
    draws: int = 0,
    temperature: float = 1.0,
) -> CacheSpec:
    """The spec of a tape of this teacher's answers; top_k None keeps all of the teacher's classes.

    A k whose records would take as many bytes as all logits do becomes "all".
    """
    classes = teacher.num_classes or len(dataset.classes)
    k = min(draws, classes) if draws else classes if top_k is None else top_k
    spec = CacheSpec(
        views,
        len(dataset),
        classes,
        k,
        dtype,
        dataset.fingerprint,
        teacher.fingerprint(),
        view,
        order,
        average,
        draws,
        temperature,
    )
    return spec if draws else replace(spec, top_k=codec.effective_top_k(classes, k, dtype))


def precompute(
    dataset: Dataset,
    teacher: Teacher,
    spec: CacheSpec,
    out: Path | str,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    class_names: Sequence[str] | None = None,
    progress: Progress = lambda rows: None,
) -> LogitCache:
    """Make or finish the tape of `spec` at `out`; `progress` is called with rows done so far.

    part          (i, n): only the i-th of n equal runs of shards, i from 0. Without it, processes
                  that work on one tape in a folder share its shards among them as they come.
    class_names   of the teacher's classes where the data is of another domain; empty where they
                  are not known. None: the data's.

    A shard's bytes depend on the batch size and on what the teacher's arithmetic depends on (the
    device, torch, its number of threads, so OMP_NUM_THREADS, which torchrun sets to 1), not on who
    computes it, when, or after what: where these are equal, any division of the work gives equal
    bytes. Raises NonFinite when the teacher gives NaN or infinity, and what `Tape` and `Loader` do.
    """
    assert spec.view is not None
    i, n = part
    if not 0 <= i < n:
        raise UsageError(f"part must be from 1/{n} to {n}/{n}, not {i + 1}/{n}")
    device = teacher.device
    pixels = render_digest(dataset, spec.view)
    info = _info(teacher, batch_size, dataset.classes if class_names is None else class_names)
    info |= {"setup": cache_setting_name(spec), "other_domain": class_names is not None}
    tape = LogitCache.create(out, spec, info, pixels)
    _require_precision(tape, teacher)
    mine = set(shards_of_part(tape, i, n))
    loader = Loader(dataset, spec.view, batch_size, workers=workers, device=device)
    whole = False
    try:
        with loader, ThreadPoolExecutor(1, "kdcache-writer") as writer:
            while True:
                missing = tape.missing()
                todo = [place for place in missing if place in mine]
                done = sum(tape.rows(s) for _, s in mine) - sum(tape.rows(s) for _, s in todo)
                progress(done)
                if not todo:
                    break
                if _record(loader, teacher, tape, todo, writer, done, progress) == done:
                    time.sleep(WAIT_S)  # what is left is in the hands of others, who may fail
        whole = not missing
    finally:
        tape.store.forget_claims(whole)
    return tape


def shards_of_part(tape: LogitCache, i: int, n: int) -> list[tuple[int, int]]:
    """The i-th of n equal runs of (view, shard) pairs; m runs of it are i * m ... of n * m."""
    places = tape.places()
    return places[len(places) * i // n : len(places) * (i + 1) // n]


def wait_for_parts(tape: LogitCache, i: int, n: int, progress: Progress) -> None:
    """Return when the i-th of n runs of shards is on the tape, whoever puts it there."""
    wanted = set(shards_of_part(tape, i, n))
    while missing := wanted & set(tape.missing()):
        progress(sum(tape.rows(s) for _, s in wanted - missing))
        time.sleep(WAIT_S)


def _record(
    loader: Loader,
    teacher: Teacher,
    tape: LogitCache,
    places: list[tuple[int, int]],
    writer: ThreadPoolExecutor,
    rows: int,
    progress: Progress,
) -> int:
    """Compute what others do not hold, writing one shard as the next runs; `rows` done by then."""
    writing: Future[None] | None = None
    for view, shard in places:
        if not tape.claim(view, shard):
            continue
        if tape.has(view, shard):  # another process was faster
            tape.release(view, shard)
            continue
        parts: list[Records] = []
        positions = np.arange(*tape.shard_range(shard))
        for rows_B, logits_BC in iter_teacher_logits(loader, teacher, tape.spec, view, positions):
            parts.append(encode_records(logits_BC, tape.spec, view, rows_B))
            rows += len(rows_B)
            progress(rows)
            if writing is not None and writing.done():
                writing.result()  # a write that failed ends the work at once
        if writing is not None:
            writing.result()
        writing = writer.submit(_write, tape, view, shard, Records.concatenate(parts))
    if writing is not None:
        writing.result()
    return rows


def _write(tape: LogitCache, view: int, shard: int, records: Records) -> None:
    tape.write(view, shard, records)
    tape.release(view, shard)


def _require_precision(tape: LogitCache, teacher: Teacher) -> None:
    """The teacher's fingerprint is of its weights alone."""
    found = tape.info.get("precision", teacher.precision)
    if found != teacher.precision:
        raise CacheMismatch(
            f"{tape.url} holds another tape (precision: {teacher.precision} here, {found} there): "
            "choose another path, or the same options"
        )


def iter_teacher_logits(
    loader: Loader, teacher: Teacher, spec: CacheSpec, view: int, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Some rows of a view of the tape at a time, and the logits [B, C] that they record.

    Raises NonFinite for a teacher's NaN or infinity, and what the loader's `batches` raises.
    """
    if spec.order == "position":
        for batch in loader.batches(view, rows):
            yield batch.positions_B, teacher_logits(teacher, batch)
        return
    for first in range(0, len(rows), loader.batch_size):
        samples = rows[first : first + loader.batch_size]
        if spec.average:
            yield samples, mean_teacher_log_probabilities(loader, teacher, spec.average, samples)
        else:
            yield samples, _ask_samples(loader, teacher, view, samples)


def mean_teacher_log_probabilities(
    loader: Loader, teacher: Teacher, average: int, samples: NDArray[np.int64], *, wait: bool = True
) -> torch.Tensor:
    """Logarithm, float64 [B, C], of the mean probabilities over views 0 ... average - 1.

    It serves as logits. `wait` is as in `ask`.
    """
    total = torch.zeros((), dtype=torch.float64, device=loader.device)
    for view in range(average):
        logits_BC = _ask_samples(loader, teacher, view, samples, wait=wait)
        total = total + torch.softmax(logits_BC.double(), 1)
    return (total / average).log().clamp_(min=LEAST_LOG_P)


def _ask_samples(
    loader: Loader, teacher: Teacher, view: int, samples: NDArray[np.int64], *, wait: bool = True
) -> torch.Tensor:
    """The teacher's logits [B, C] for a view of these samples, in their order."""
    places = view_positions(loader.spec, view, len(loader.dataset))[samples]
    batches = loader.batches(view, places)
    return torch.cat([teacher_logits(teacher, batch, wait=wait) for batch in batches])


def encode_records(
    logits_BC: torch.Tensor, spec: CacheSpec, view: int, rows_B: NDArray[np.int64]
) -> Records:
    """What a tape of `spec` keeps of the teacher's logits for these rows of a view."""
    if not spec.draws:
        return codec.encode(logits_BC, spec.top_k, spec.dtype)
    assert spec.view is not None
    return sampled.encode(
        logits_BC, spec.draws, spec.temperature, seed=spec.view.seed, view=view, rows_B=rows_B
    )


def teacher_logits(teacher: Teacher, batch: Batch, *, wait: bool = True) -> torch.Tensor:
    """The teacher's logits [B, C] for a batch.

    wait   for the device, and raise NonFinite where a logit is NaN or infinite, naming the first
           such sample. Without, such a row is all NaN, and so is the loss of any student's answer
           to it: a logit of -inf alone would pass for a class of no mass.
    """
    with torch.inference_mode():
        logits_BC: torch.Tensor = teacher(batch.for_teacher)
        fine_B = torch.isfinite(logits_BC).all(1)
        if not wait:
            return logits_BC.masked_fill(~fine_B[:, None], torch.nan)
        if bool(fine_B.all()):
            return logits_BC
    row = int((~fine_B).nonzero()[0])
    raise NonFinite(
        f"the teacher {teacher.name} gave NaN or infinity for sample {batch.samples_B[row]} in "
        f"view {batch.view}: a teacher's answers must be numbers"
    )


def _info(teacher: Teacher, batch_size: int, class_names: Sequence[str]) -> dict[str, object]:
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
